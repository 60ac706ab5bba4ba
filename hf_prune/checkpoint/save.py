"""Writing a model folder as stock transformers does, also where the weights never are in memory all at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from hf_prune.checkpoint.folder import check_free_space
from hf_prune.checkpoint.inspect import INDEX
from hf_prune.checkpoint.offloaded import Shards, shards_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | os.PathLike[str]
) -> None:
    """Write config, safetensors, generation config, tokenizer and chat template as stock transformers does.

    The dtype is the model's own; tied weights are stored once. Raises RunError at once where the disk has no room.
    """
    shards = shards_of(model)
    if shards is None:
        # parameters() yields a tied weight once, as the file does.
        check_free_space(Path(folder), sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()))
        model.save_pretrained(folder)
    else:
        # Everything but the weights.
        model.save_pretrained(folder, state_dict={})
        _save_shards(model, shards, Path(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_shards(model: PreTrainedModel, shards: Shards, folder: Path) -> None:
    """One safetensors file for what is in no block and one for each block, and the index last."""
    weight_map: dict[str, str] = {}
    units = (shards.count, *range(shards.count))
    for number, unit in enumerate(units, start=1):
        name = f"model-{number:05}-of-{len(units):05}.safetensors"
        shards.save(unit, folder / name)
        with safe_open(folder / name, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), name)
    sizes = [(tensor.numel(), tensor.element_size()) for tensor in model.parameters()]
    metadata = {
        "total_parameters": sum(numel for numel, _ in sizes),
        "total_size": sum(numel * size for numel, size in sizes),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
