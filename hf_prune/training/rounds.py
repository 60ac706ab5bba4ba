"""What stays of each round: a folder with its weights, its mask and what came of it, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_prune.checkpoint.files import write_whole
from hf_prune.checkpoint.folder import beside, explained_disk_errors
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.structure.paths import collapsed_layers
from hf_prune.training.checkpoints import IDENTITY, claim, last_checkpoint
from hf_prune.training.trainer import only_weights_change, train

INITIAL = "initial.safetensors"
# Step, figure, and seconds of the training up to there, as far as looks before a cut reach.
Look = tuple[int, float, float]
WEIGHTS, MASKS, RESULT, CHECKPOINTS = "model.safetensors", "masks.safetensors", "round.json", "checkpoints"


@dataclass
class Round:
    """One training and what came of it.

    Attributes:
        number: of the round; 0 is the dense training.
        kind: `ticket`, or the control that it is.
        kept: weights left, of `total`.
        collapsed: layers without a path from input to output through their weights (structure/paths.py).
        held: layers that have more weights left than their importance would have kept, because of the floor.
        layers: weights left by layer.
        metrics: what the evaluation said of the trained model.
        evaluation: fingerprint of that evaluation.
        steps: that the training took.
        looks: where a figure was watched.
        moved: by layer, the norm of what it has moved up to each look since the one before; empty where that was cut.
        seconds: of the training, over all its sessions as far as its checkpoints reach, and of the evaluation.
    """

    number: int
    kind: str
    kept: int = 0
    total: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    collapsed: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: str = ""
    steps: int = 0
    looks: list[Look] = field(default_factory=list)
    moved: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the weights that are gone."""
        return 1 - self.kept / self.total


@dataclass
class Trained:
    """What a training says of itself; see `Round`."""

    steps: int
    looks: list[Look] = field(default_factory=list)
    moved: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Measuring:
    """How trained modules are measured.

    Args:
        evaluate: what is worth knowing of a trained module.
        identity: fingerprint of the evaluation; rounds that another one has measured are measured again.
    """

    evaluate: Callable[[nn.Module], dict[str, Any]]
    identity: str = ""


class MakeTrainer(Protocol):
    """A Trainer for a model, its checkpoints below a folder; the same seed makes the same batches every time."""

    def __call__(self, model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer: ...


def rounds_place(output_dir: str | Path, named: str | None) -> Path:
    """Where the rounds of a recipe are kept: its `rounds_folder`, else beside its output folder.

    Raises:
        BadInputError: that is in the output folder.
    """
    place, output = beside(named, "") if named else beside(output_dir, ".rounds"), beside(output_dir, "")
    if output in (place, *place.parents):
        raise BadInputError(
            f"rounds_folder: {place} lies in output_dir, which is written as a whole; name a folder beside it."
        )
    return place


def begin(
    folder: Path, identity: Mapping[str, Any], model: nn.Module, began: bool, leftovers: Sequence[str] = ()
) -> None:
    """Make `folder` this run's, with the weights that it begins with.

    Args:
        began: a run of the same identity has left something worth keeping there.
        leftovers: folders in it that are of a run whose checkpoints are gone, where it has not.

    Raises:
        BadInputError: another run's state is there.
    """
    claim(folder, {**identity, "processes": distributed.world_size()}, began)
    if distributed.rank() == 0 and not began:
        for name in leftovers:
            shutil.rmtree(folder / name, ignore_errors=True)
        save_weights(model, folder / INITIAL)
    distributed.barrier()


def train_round(
    folder: Path,
    make_trainer: MakeTrainer,
    model: nn.Module,
    callbacks: Sequence[TrainerCallback],
    checkpoints: Path,
    checkpoint: Path | None,
) -> tuple[Trainer, float]:
    """One training; the Trainer behind it, and the seconds that it took over all its sessions.

    Args:
        folder: of all rounds; no checkpoint stays there where this one is refused as it begins.
        callbacks: in the order in which they are heard.
        checkpoint: to go on from.

    Raises:
        BadInputError, RunError: see `train`.
    """
    with only_weights_change(model):
        trainer = make_trainer(model, checkpoints, list(callbacks))
        try:
            seconds = train(trainer, checkpoint)
        except BadInputError:
            leave(folder, checkpoints)
            raise
    return trainer, seconds


def make_round(
    folder: Path,
    begun: Round,
    model: nn.Module,
    masks: Mapping[str, Tensor],
    train: Callable[[Path], Trained],
    measuring: Measuring,
) -> Round:
    """Train and measure, or read what a run before has kept; `model` has the round's weights behind it.

    Args:
        folder: takes its name once the training is over; `FOLDER.unfinished` holds the Trainer's own checkpoints.
        begun: what is known beforehand; counts follow from the masks.
        train: trains `model` under `masks` with its checkpoints in the folder given.

    Raises:
        RunError: the disk is full.
    """
    result = read_round(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if result is None:
        trained = train(unfinished / CHECKPOINTS)
        began = perf_counter()
        kept = {layer: int(mask.sum()) for layer, mask in masks.items()}
        result = replace(
            begun,
            kept=sum(kept.values()),
            total=sum(mask.numel() for mask in masks.values()),
            layers=kept,
            collapsed=collapsed_layers(model, masks),
            metrics=measuring.evaluate(model),
            evaluation=measuring.identity,
            steps=trained.steps,
            looks=trained.looks,
            moved=trained.moved,
            seconds=trained.seconds + perf_counter() - began,
        )
        if distributed.rank() == 0:
            keep_round(folder, model, masks, result)
        distributed.barrier()
    else:
        load_weights(model, folder / WEIGHTS)
        # An earlier release may have counted otherwise.
        result.collapsed = collapsed_layers(model, load_file(folder / MASKS))
    if distributed.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    load_weights(model, folder / WEIGHTS)
    if result.evaluation != measuring.identity:
        result.metrics, result.evaluation = measuring.evaluate(model), measuring.identity
        # Nobody writes before everybody has read.
        distributed.barrier()
        if distributed.rank() == 0:
            keep_result(folder, result)
    return result


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


def leave(folder: Path, unfinished: Path) -> None:
    """Remove what was made for a training that never began, and that of all rounds where nothing else is there.

    Args:
        folder: of all rounds.
        unfinished: of the Trainer's checkpoints of this one.
    """
    if distributed.rank() == 0 and last_checkpoint(unfinished) is None:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        if not any(path.is_dir() for path in folder.iterdir()):
            for name in (INITIAL, IDENTITY):
                (folder / name).unlink(missing_ok=True)


def keep_result(folder: Path, result: Round) -> None:
    """Write, or replace, what came of a round."""
    # Tensors and numbers of numpy that hold one value are as good as floats.
    write_whole(folder / RESULT, json.dumps(asdict(result), indent=1, default=float) + "\n")


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
