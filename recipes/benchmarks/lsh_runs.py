"""What is kept of each training of a truth table, and whose table a folder holds.

A run is one safetensors file, a `Run`; the dense twin's is `dense`. `recipe.json` says what all of them were made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_prune.checkpoint.work import difference

DENSE, RECIPE = "dense", "recipe.json"


@dataclass(frozen=True)
class Run:
    """One training to its last epoch: float64 [epochs] each, losses in nats a token, and two of other shapes.

    Attributes:
        losses: of held-out windows of the training text, as a search sees them.
        validation_losses: of another text, which chooses the epoch that is kept.
        seconds: of training.
        spectrum_seconds: of the spectrum; the loss, which every search measures, is left out.
        spectra: [epochs, exponents] in bits a step.
        test_loss: [1], of the epoch that is kept, on a third text, which nothing is chosen by.
    """

    losses: Tensor
    validation_losses: Tensor
    seconds: Tensor
    spectrum_seconds: Tensor
    spectra: Tensor
    test_loss: Tensor

    @property
    def best_epoch(self) -> int:
        """That of the lowest validation loss, from 1; the first of equal ones."""
        return int(self.validation_losses.argmin()) + 1

    @property
    def validation_loss(self) -> float:
        """The lowest one."""
        return float(self.validation_losses.min())

    @property
    def perplexity(self) -> float:
        """Of the epoch that is kept, on text that nothing is chosen by."""
        return float(self.test_loss.exp())


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Say what a folder's runs are made of; several processes may do so at the same moment.

    Raises:
        SystemExit: its runs are made of something else; in one sentence, and what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, part = folder / RECIPE, folder / f"{RECIPE}.{os.getpid()}"
    if not file.exists() and any(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder} holds runs and no {RECIPE}: they are of another release; name another folder")
    part.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    try:
        # Unlike a replacement it never takes the place of what another process has put there.
        os.link(part, file)
    except FileExistsError:
        pass
    finally:
        part.unlink()
    before, mine = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(identity))
    different = [key for key in {**before, **mine} if before.get(key) != mine.get(key)]
    if different:
        said = "; ".join(difference(key, before.get(key), mine.get(key)) for key in different)
        raise SystemExit(f"{folder} holds runs of another recipe: {said}; put that back, or name another folder")


def is_there(folder: Path, name: str) -> bool:
    """Whether a run is finished."""
    return (folder / f"{name}.safetensors").is_file()


def save_run(folder: Path, name: str, run: Run) -> None:
    """Complete or absent: a run that is there is finished."""
    partial = folder / f"{name}.tmp"
    save_file({key: value.double().clone() for key, value in vars(run).items()}, partial)
    partial.replace(folder / f"{name}.safetensors")


def load_run(folder: Path, name: str) -> Run:
    """What `save_run` left."""
    return Run(**load_file(folder / f"{name}.safetensors"))


def load_truth(folder: Path) -> tuple[Run, dict[str, Run]]:
    """The dense run and the candidates by name; of candidates that were trained alike, the first, as published.

    Other words need not mean another training: where each layer loses the same share of its weights, redistribution by
    what is left gives each its own back.
    """
    runs = {file.stem: load_run(folder, file.stem) for file in sorted(folder.glob("*.safetensors"))}
    dense = runs.pop(DENSE)
    different: dict[tuple[float, ...], str] = {}
    for name, run in runs.items():
        different.setdefault((*run.losses.tolist(), *run.test_loss.tolist()), name)
    return dense, {name: runs[name] for name in different.values()}


def figures(dense: Run, candidates: dict[str, Run]) -> dict[str, Any]:
    """The truth table as plain data, spectra as their raw distance to the dense one at each epoch."""

    def row(run: Run) -> dict[str, Any]:
        pairs = zip(dense.spectra, run.spectra, strict=True)
        return {
            "perplexity": round(run.perplexity, 4),
            "best_epoch": run.best_epoch,
            "losses": [round(own, 5) for own in run.losses.tolist()],
            "validation_losses": [round(own, 5) for own in run.validation_losses.tolist()],
            "distances": [round(float(torch.linalg.vector_norm(one - other)), 4) for one, other in pairs],
            "seconds": round(float(run.seconds.sum()), 1),
            "spectrum_seconds": round(float(run.spectrum_seconds.sum()), 1),
        }

    return {name: row(run) for name, run in {DENSE: dense, **candidates}.items()}
