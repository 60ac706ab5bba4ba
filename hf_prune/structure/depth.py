"""Whole blocks: which ones change the hidden states least, and a model without them (ShortGPT, Men et al., 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.stream import Stream
from hf_prune.progress import progress
from hf_prune.structure.groups import block_shape
from hf_prune.structure.stock import set_sizes
from hf_prune.weights import find_blocks


def block_influence(model: nn.Module, input_ids: Tensor) -> Tensor:
    """1 - mean cosine between what a block is handed and what it hands on, float64 [blocks] (ShortGPT, equation 1).

    Args:
        input_ids: int64 [samples, tokens].
    """
    with BlockRunner(model) as runner, torch.no_grad():
        influence = torch.zeros(len(runner.blocks), dtype=torch.float64)
        tokens = torch.zeros(1, dtype=torch.float64)
        stream = Stream(runner, input_ids)
        for index in progress(range(len(runner.blocks)), "measuring blocks", total=len(runner.blocks)):
            before = _advance_and_see(stream, index)
            for old, new in zip(before, stream.hidden, strict=True):
                assert new is not None
                cosine = torch.nn.functional.cosine_similarity(old.float(), new.float(), dim=-1)
                influence[index] += float((1 - cosine).sum())
                tokens += cosine.numel() if index == 0 else 0
    distributed.sum_everywhere(influence)
    distributed.sum_everywhere(tokens)
    return influence / tokens


def _advance_and_see(stream: Stream, index: int) -> list[Tensor]:
    """Move past a block; what it was handed, a tensor for each of the stream's chunks."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = stream.runner.blocks[index].register_forward_pre_hook(look, with_kwargs=True)
    try:
        stream.advance(index)
    finally:
        handle.remove()
    return seen


def remove_blocks(model: nn.Module, count: int, input_ids: Tensor) -> tuple[list[int], float]:
    """Remove the `count` blocks of least influence in place, config included; (their numbers, forward passes taken)."""
    influence = block_influence(model, input_ids)
    gone = sorted(influence.argsort(stable=True)[:count].tolist())
    blocks = find_blocks(model)[1]
    kept = [index for index in range(len(blocks)) if index not in gone]
    drop_blocks(model, kept)
    return gone, 1.0


def drop_blocks(model: nn.Module, kept: list[int]) -> None:
    """Keep some blocks, in order, and number them anew; the config says so."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    shape = block_shape(model)
    name, blocks = find_blocks(model)
    parent, _, last = name.rpartition(".")
    left = nn.ModuleList(blocks[index] for index in kept)
    setattr(model.get_submodule(parent), last, left)
    for index, block in enumerate(left):
        for module in block.modules():
            for attribute in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)
    set_sizes(config, shape, kept)
