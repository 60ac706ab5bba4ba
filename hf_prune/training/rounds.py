"""What stays of each round: a folder with its weights, its mask and what came of it, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_prune.checkpoint.folder import explained_disk_errors
from hf_prune.training.checkpoints import write_whole

WEIGHTS, MASKS, RESULT = "model.safetensors", "masks.safetensors", "round.json"


@dataclass
class Round:
    """One training and what came of it.

    Attributes:
        number: of the round; 0 is the dense training.
        kind: `ticket`, or the control that it is.
        kept: weights left, of `total`.
        collapsed: layers without any weight left.
        held: layers that have more weights left than their importance would have kept, because of the floor.
        layers: weights left by layer.
        metrics: what the evaluation said of the trained model.
        evaluation: fingerprint of that evaluation.
        seconds: of the training and evaluation, since it was last gone on with.
    """

    number: int
    kind: str
    kept: int
    total: int
    layers: dict[str, int]
    collapsed: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: str = ""
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the weights that are gone."""
        return 1 - self.kept / self.total


def keep_round(folder: Path, model: nn.Module, masks: Mapping[str, Tensor], result: Round) -> None:
    """Write a round's folder.

    Raises:
        RunError: the disk is full.
    """
    part = folder.with_name(f"{folder.name}.part")
    with explained_disk_errors(part, folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_weights(model, part / WEIGHTS)
        save_file(dict(masks), part / MASKS)
        keep_result(part, result)
        part.rename(folder)


def keep_result(folder: Path, result: Round) -> None:
    """Write, or replace, what came of a round."""
    write_whole(folder / RESULT, json.dumps(asdict(result), indent=1) + "\n")


def read_round(folder: Path) -> Round | None:
    """What came of a round; None where there is none."""
    if not (folder / RESULT).is_file():
        return None
    return Round(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def save_weights(model: nn.Module, file: Path) -> None:
    """Every entry of the state dict, tied ones as often as they have names, as `load_state_dict` wants them."""
    part = file.with_suffix(".part")
    save_file({name: own.detach().cpu().clone().contiguous() for name, own in model.state_dict().items()}, part)
    part.replace(file)


def load_weights(model: nn.Module, file: Path) -> None:
    """Read what `save_weights` wrote."""
    model.load_state_dict(load_file(file))
