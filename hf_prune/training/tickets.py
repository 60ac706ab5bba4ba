"""Iterative pruning with rewinding: rounds of training through a transformers Trainer, each kept in a folder.

    FOLDER/initial.safetensors       the weights that everything began with
    FOLDER/rewind/                   the Trainer's checkpoint at the rewind step
    FOLDER/round-00/                 the dense training, shared by all measures
    FOLDER/IDENTITY/round-01/ ...    the tickets of one measure, rate and floor, and their controls

A round's folder takes its name once its training is over; an unfinished one holds the Trainer's own checkpoints, from
which the next run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.engine import distributed
from hf_prune.errors import BadInputError, RunError
from hf_prune.methods.lottery_ticket import LotteryTicketConfig, next_masks, random_masks
from hf_prune.progress import progress
from hf_prune.training.checkpoints import StopAtNaN, last_checkpoint
from hf_prune.training.masks import MaskCallback

WEIGHTS, MASKS, RESULT, CHECKPOINTS = "model.safetensors", "masks.safetensors", "round.json", "checkpoints"


class MakeTrainer(Protocol):
    """A Trainer for a model, its checkpoints below a folder; the same seed makes the same batches every time."""

    def __call__(self, model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer: ...


@dataclass
class Round:
    """One training and what came of it.

    Attributes:
        number: of the round; 0 is the dense training.
        kind: `ticket`, or the control that it is.
        kept: weights left, of `total`.
        collapsed: layers without any weight left.
        held: layers that the floor held.
        layers: weights left by layer.
        metrics: what the evaluation said of the trained model.
    """

    number: int
    kind: str
    kept: int
    total: int
    layers: dict[str, int]
    collapsed: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the weights that are gone."""
        return 1 - self.kept / self.total


@dataclass
class TicketSearch:
    """The procedure, for any module that a Trainer can train.

    Args:
        make_model: a freshly initialised module, by seed; None seed is the run's own initialisation.
        names: parameters that are pruned.
        make_trainer: see `MakeTrainer`.
        evaluate: what is worth knowing of a trained module.
        config: rounds, measure, rewinding, floor, controls.
        folder: where rounds are kept; a second run with the same arguments goes on where the first was cut.
        fingerprint: of everything else that decides how a training goes; a folder of another one is refused.
    """

    make_model: Callable[[int | None], nn.Module]
    names: Sequence[str]
    make_trainer: MakeTrainer
    evaluate: Callable[[nn.Module], dict[str, Any]]
    config: LotteryTicketConfig
    folder: Path
    fingerprint: str = ""

    def run(self) -> tuple[nn.Module, list[Round]]:
        """The module with the last ticket's trained weights, and every round in order, controls behind their ticket.

        Raises:
            BadInputError: the folder belongs to another run, the masks do not fit, the rewind step is past the end.
            RunError: the loss is not a number, or a layer has collapsed and `on_collapse` is `stop`.
        """
        self._claim()
        model = self.make_model(None)
        weights = {name: model.get_parameter(name) for name in self.names}
        masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
        held: list[str] = []
        self._keep_initial(model)
        rounds = []
        for number in progress(range(self.config.rounds + 1), "rounds", total=self.config.rounds + 1):
            if number:
                trained = {name: weight.detach().cpu() for name, weight in weights.items()}
                kept = self.config.kept(number)
                masks, held = next_masks(trained, masks, self.config.importance, kept, self.config.min_keep_ratio)
            rounds.append(self._round(number, "ticket", model, masks, held))
            self._check_collapse(rounds[-1])
            if number and self.config.wants_controls(number):
                rounds += self._controls(number, masks)
        return model, rounds

    def _claim(self) -> None:
        """This run's folder, or a refusal where another run's state is there."""
        file = self.folder / "run.json"
        state = {"fingerprint": self.fingerprint, "rewind_step": self.config.rewind_step}
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != state:
                raise BadInputError(
                    f"output_dir: {self.folder} holds rounds of a run with another model, text or training; choose "
                    "another output_dir or remove that folder."
                )
        elif distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(file, json.dumps(state))
        distributed.barrier()

    def _keep_initial(self, model: nn.Module) -> None:
        file = self.folder / "initial.safetensors"
        if not file.is_file() and distributed.rank() == 0:
            save_file(_state(model), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        distributed.barrier()

    def ticket_folder(self) -> Path:
        """Where tickets of this measure, rate and floor are."""
        own = {key: getattr(self.config, key) for key in ("importance", "pruning_rate", "min_keep_ratio")}
        digest = hashlib.sha256(json.dumps([own, sorted(self.names)]).encode()).hexdigest()[:8]
        return self.folder / f"{self.config.importance}-{digest}"

    def _round(
        self, number: int, kind: str, model: nn.Module, masks: dict[str, Tensor], held: Sequence[str] = ()
    ) -> Round:
        """Train `model` under `masks` from where this kind of round begins; its result is read where it exists."""
        name = f"round-{number:02d}" + (f"-{kind}" if kind != "ticket" else "")
        folder = (self.ticket_folder() if number else self.folder) / name
        if not (folder / RESULT).is_file():
            start = perf_counter()
            self._train(model, masks, kind, number, folder.with_name(f"{name}.unfinished"))
            kept = {layer: int(mask.sum()) for layer, mask in masks.items()}
            result = Round(
                number,
                kind,
                kept=sum(kept.values()),
                total=sum(mask.numel() for mask in masks.values()),
                layers=kept,
                collapsed=[layer for layer, count in kept.items() if not count],
                held=list(held),
                metrics=self.evaluate(model),
                seconds=perf_counter() - start,
            )
            if distributed.rank() == 0:
                self._keep(model, masks, result, folder)
            distributed.barrier()
        model.load_state_dict(load_file(folder / WEIGHTS))
        return Round(**json.loads((folder / RESULT).read_text(encoding="utf-8")))

    def _train(self, model: nn.Module, masks: dict[str, Tensor], kind: str, number: int, unfinished: Path) -> None:
        step = self.config.rewind_step
        rewind = self.folder / "rewind"
        where = f"round {number}" + (f" ({kind.replace('_', ' ')})" if kind != "ticket" else "")
        callbacks: list[TrainerCallback] = [StopAtNaN(where, unfinished / CHECKPOINTS)]
        callbacks.append(MaskCallback(masks) if number else KeepCheckpoint(step, rewind))
        trainer = self.make_trainer(model, unfinished / CHECKPOINTS, callbacks)
        checkpoint = last_checkpoint(unfinished / CHECKPOINTS)
        if checkpoint is None and kind != "fresh_initialization":
            if number and step:
                checkpoint = rewind
            model.load_state_dict(load_file(self.folder / "initial.safetensors"))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not number and step and not (rewind / WEIGHTS).is_file():
            raise BadInputError(
                f"rewind_step: {step} is past the end of the training, which took {trainer.state.global_step} steps; "
                "lower it or train longer."
            )
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(f"{where}: {name} is not finite after the training; lower learning_rate.")
        model.zero_grad(set_to_none=True)

    def _keep(self, model: nn.Module, masks: dict[str, Tensor], result: Round, folder: Path) -> None:
        """The round's folder, whole or not at all."""
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(_state(model), part / WEIGHTS)
        save_file(masks, part / MASKS)
        (part / RESULT).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
        part.rename(folder)
        shutil.rmtree(folder.with_name(f"{folder.name}.unfinished"), ignore_errors=True)

    def _controls(self, number: int, masks: dict[str, Tensor]) -> list[Round]:
        """The ticket's mask on other initial weights, and a random mask of its densities on the ticket's own."""
        done = []
        for kind in self.config.controls:
            fresh = kind == "fresh_initialization"
            model = self.make_model(1000 + number if fresh else None)
            own = masks if fresh else random_masks(masks, seed=number)
            done.append(self._round(number, kind, model, own))
        return done

    def _check_collapse(self, result: Round) -> None:
        if result.collapsed and self.config.on_collapse == "stop":
            raise RunError(
                f"round {result.number}: {result.collapsed[0]} has no weight left at {result.sparsity:.1%} sparsity; "
                "set min_keep_ratio above 0, choose another importance, or go on with on_collapse: record."
            )


class KeepCheckpoint(TrainerCallback):
    """Copies the Trainer's checkpoint of one step to a folder: weights, optimizer, schedule and random state."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step and state.is_world_process_zero and not self.folder.is_dir():
            part = self.folder.with_name(f"{self.folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            assert args.output_dir is not None
            shutil.copytree(Path(args.output_dir) / f"checkpoint-{self.step}", part)
            part.rename(self.folder)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The weights on the CPU, each tied one once under its first name, as `load_state_dict` needs all names: copied."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)
