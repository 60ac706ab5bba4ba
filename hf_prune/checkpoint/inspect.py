"""Sparsity and pattern of any safetensors checkpoint, read tensor by tensor; early checks that its files are whole."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hf_prune.checkpoint.folder import PLAN_FILE
from hf_prune.errors import BadInputError
from hf_prune.layers import expert_tensors, is_experts, routers

logger = logging.getLogger(__name__)

GROUP_SIZES = (4, 8, 16)  # each twice the one before
CHUNK = 2**24  # weights looked at together: 64 MB of float32
BLOCK_KINDS = ("linear", "conv1d", "experts")
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Inspection(NamedTuple):
    """`rows`: one per matrix; `summary`: totals."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


@dataclass
class Tally:
    """Counts over a weight that arrives in chunks of outputs."""

    numel: int = 0
    nonzeros: int = 0
    fullest: dict[int, int] = field(default_factory=dict)  # m -> most weights kept in any m consecutive inputs

    def add(self, kept: torch.Tensor, grouped: bool) -> None:
        """Count a boolean chunk; with `grouped` it is [outputs, inputs] and its n:m groups are looked at too."""
        self.numel += kept.numel()
        if not grouped or not kept.numel() or kept.shape[1] % GROUP_SIZES[0]:
            self.nonzeros += int(kept.sum())
            return
        counts = kept.reshape(kept.shape[0], -1, GROUP_SIZES[0]).sum(-1, dtype=torch.uint8)
        self.nonzeros += int(counts.sum())
        for m in GROUP_SIZES:
            self.fullest[m] = max(self.fullest.get(m, 0), int(counts.max()))
            if counts.shape[1] % 2:
                break
            counts = counts[:, ::2] + counts[:, 1::2]

    @property
    def density(self) -> float:
        """Share of weights that are not zero."""
        return self.nonzeros / self.numel if self.numel else 1.0

    @property
    def pattern(self) -> str:
        """`dense` (no zero at all), the tightest `n:m` that holds, or `unstructured`.

        m is 4, 8 or 16 and n at most m / 2. Tightest is the smallest n / m; among equals the smallest m, which implies
        the others. A pattern must also explain the zeros: where the density is below 3/4 of n / m, the groups of a very
        sparse weight merely happen to hold few.
        """
        if self.nonzeros == self.numel:
            return "dense"
        holding = [(n / m, m, n) for m, n in self.fullest.items() if 0 < n <= m / 2 and self.density >= 0.75 * n / m]
        if not holding:
            return "unstructured"
        _, m, n = min(holding)
        return f"{n}:{m}"


def inspect_checkpoint(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Inspection:
    """Sparsity and pattern of every matrix in a local folder, or a Hub model from the cache or the network.

    Rows are {"name", "block", "kind", "shape", "density", "zeros", "pattern"} in the order of the blocks. kind is
    `linear`, `conv1d` (GPT-2's, stored [in, out] and shown as [out, in] like the others), `embedding`, `head` (a linear
    layer outside the blocks), `experts` (a mixture's, where the file keeps them in one 3-D tensor; its pattern is that
    of all together) or `other` (anything else of two or more dimensions, routers of mixtures among them). block: None
    outside the blocks.
    The summary counts the blocks' linear weights (`block_*`) and every parameter in the files (`total_*`; a tied head
    is stored once). Integer tensors, as quantized checkpoints hold, are listed under `skipped`.

    Memory stays bounded by a chunk of one tensor. Raises BadInputError where there is no such folder or a broken one.
    """
    folder = local_folder(path_or_id, revision)
    kinds, ignored = _layer_kinds(folder)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    total, blocks = Tally(), Tally()
    for shard in check_safetensors(folder):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.offset_keys():  # in the order of the file
                if ignored and re.search(ignored, name):
                    continue
                tally, row = _inspect_tensor(tensors, name, kinds)
                if tally is None:
                    skipped.append(name)
                    continue
                for totals in (total, blocks) if row["kind"] in BLOCK_KINDS else (total,):
                    totals.numel += tally.numel
                    totals.nonzeros += tally.nonzeros
                if len(row["shape"]) > 1:
                    rows.append(row)
    rows.sort(key=lambda row: (row["block"] is None, row["block"] or 0))
    block_rows = [row for row in rows if row["kind"] in BLOCK_KINDS]
    summary = {
        "block_parameters": blocks.numel,
        "block_nonzeros": blocks.nonzeros,
        "block_sparsity": 1 - blocks.density,
        "total_parameters": total.numel,
        "total_nonzeros": total.nonzeros,
        "total_sparsity": 1 - total.density,
        "patterns": dict(Counter(row["pattern"] for row in block_rows)),
        "skipped": skipped,
    }
    return Inspection(rows, summary)


def check_safetensors(folder: str | os.PathLike[str]) -> list[Path]:
    """The shards of a local checkpoint, after checking that each is whole and that the index finds all its tensors.

    Reads headers only. Raises BadInputError naming the shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no such folder; give a checkpoint folder or a Hub model id.")
    weight_map: dict[str, str] = {}
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInputError(f"{folder / INDEX}: this is no index of safetensors; download it again.") from None
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        found = f"only pickled weights ({pickles[0]}), never read as they can run code" if pickles else "no weights"
        raise BadInputError(f"{folder}: holds {found}; hf_prune needs *.safetensors files.")
    held = {name: _tensor_names(folder / name) for name in names}
    lost = [(tensor, shard) for tensor, shard in weight_map.items() if tensor not in held[str(shard)]]
    if lost:
        tensor, shard = lost[0]
        raise BadInputError(
            f"{folder / shard}: {len(lost)} tensors of the index are not in this or other shards, first {tensor}; "
            "download the checkpoint again."
        )
    return [folder / name for name in names]


def _tensor_names(shard: Path) -> set[str]:
    """The names in the header; opening checks the header, and the file's length against it."""
    if not shard.is_file():
        raise BadInputError(f"{shard}: this shard is missing; download the checkpoint again.")
    try:
        with safe_open(shard, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"{shard}: truncated or no safetensors file ({error}); download or save the checkpoint again."
        ) from None


def local_folder(path_or_id: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder itself, or a Hub model's config, weights and pruning plan from the cache or the network.

    Raises:
        BadInputError: there is neither.
    """
    path = Path(path_or_id)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_id)):
        return path  # check_safetensors says what is wrong with it
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "model*.safetensors", INDEX, PLAN_FILE]
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's, the HTTP client's and the operating system's errors share no base class
        logger.debug("snapshot_download failed", exc_info=True)
        raise BadInputError(
            f"{path_or_id}: no such folder here, and no such model from the Hub ({type(error).__name__}); "
            "check the name, the network and your login."
        ) from error


def _layer_kinds(folder: Path) -> tuple[dict[str, str], str]:
    """Kind of each layer by the last part of its name, as file and model may differ in the first (GPT-2's do).

    Also a pattern of the names that the model ignores when loading (GPT-2's stored attention masks). Both are empty
    where transformers cannot build the config: the raw names must then do.
    """
    from transformers import AutoModel
    from transformers.pytorch_utils import Conv1D

    from hf_prune.models import AutoConfig, AutoModelForCausalLM

    model: Any = None
    for auto_class in (AutoModelForCausalLM, AutoModel):
        try:
            with torch.device("meta"):
                model = auto_class.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
            break
        except Exception as error:
            logger.info("no %s from the config of %s: %s", auto_class.__name__, folder, error)
    if model is None:
        return {}, ""
    classes = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
    kinds = {}
    for name, module in model.named_modules():
        kind = next((kind for layer, kind in classes.items() if isinstance(module, layer)), None)
        if kind:
            kinds[name.rpartition(".")[-1]] = kind
        if is_experts(module):
            turned = " transposed" if module.is_transposed else ""
            kinds |= {f"{name.rpartition('.')[-1]}.{tensor}": f"experts{turned}" for tensor in expert_tensors(module)}
    for router in routers(model):
        own = router.split(".")
        kinds.setdefault(own[-1], "other")
        # A layer inside one may be called as others are elsewhere.
        kinds[".".join(own[-2:])] = "other"
    ignored = [rf"(?:^|\.)(?:{pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return kinds, "|".join(ignored)


def _inspect_tensor(tensors: Any, name: str, kinds: dict[str, str]) -> tuple[Tally | None, dict[str, Any]]:
    shape = tensors.get_slice(name).get_shape()
    number = re.search(r"\.(\d+)\.", f".{name}")  # the outermost: experts are numbered within their block
    block = int(number[1]) if number else None
    kind = _kind(name, len(shape), block, kinds)
    turned = kind in ("conv1d", "experts transposed")
    kind = kind.removesuffix(" transposed")
    tally = Tally()
    for chunk in _chunks(tensors, name):
        if not chunk.is_floating_point():
            return None, {}
        kept = chunk != 0
        kept = kept.transpose(-2, -1) if turned else kept
        tally.add(kept.flatten(0, 1) if kind == "experts" else kept, grouped=len(shape) == 2 or kind == "experts")
    return tally, {
        "name": name.removesuffix(".weight"),
        "block": block,
        "kind": kind,
        "shape": [*shape[:-2], shape[-1], shape[-2]] if turned else shape,
        "density": tally.density,
        "zeros": tally.numel - tally.nonzeros,
        "pattern": tally.pattern,
    }


def _kind(name: str, dimensions: int, block: int | None, kinds: dict[str, str]) -> str:
    if dimensions == 3:
        return kinds.get(".".join(name.split(".")[-2:]), "other")
    if dimensions != 2 or not name.endswith(".weight"):
        return "other"
    by_name = "embedding" if re.search(r"embed|\bwte\b|\bwpe\b", name) else "linear"
    layer = name.split(".")[:-1]
    kind = kinds.get(".".join(layer[-2:]), kinds.get(layer[-1], by_name))
    return "head" if kind == "linear" and block is None else kind


def _chunks(tensors: Any, name: str) -> Iterator[torch.Tensor]:
    """The tensor in slices of its first axis, whole n:m groups of a transposed one together."""
    stored = tensors.get_slice(name)
    shape = stored.get_shape()
    if not shape:
        yield tensors.get_tensor(name)
        return
    whole = GROUP_SIZES[-1]
    step = max(CHUNK // max(math.prod(shape[1:]), 1) // whole, 1) * whole
    for start in range(0, shape[0], step):
        yield stored[start : start + step]
