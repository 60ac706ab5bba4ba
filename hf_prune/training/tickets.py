"""Iterative pruning with rewinding: rounds of training through a transformers Trainer, each kept in a folder.

    FOLDER/run.json                  what decides how the dense training goes
    FOLDER/initial.safetensors       the weights that everything began with
    FOLDER/rewind/                   the Trainer's checkpoint at the rewind step
    FOLDER/round-00/                 the dense training, shared by all measures
    FOLDER/IDENTITY/round-01/ ...    the tickets of one measure, rate and floor, and their controls

A round's folder takes its name once its training is over; an unfinished one holds the Trainer's own checkpoints, from
which the next run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import BadInputError, RunError
from hf_prune.methods.lottery_ticket import LotteryTicketConfig, check_floor, next_masks, random_masks
from hf_prune.progress import progress
from hf_prune.structure.paths import collapsed_layers
from hf_prune.training.checkpoints import KeepCheckpoint, StopAtNaN, alone_in, claim, fingerprint, last_checkpoint
from hf_prune.training.masks import MaskCallback
from hf_prune.training.rounds import (
    CHECKPOINTS,
    INITIAL,
    MASKS,
    MakeTrainer,
    Measuring,
    Round,
    Trained,
    begin,
    load_weights,
    make_round,
    train_round,
)


@dataclass
class TicketSearch:
    """The procedure, for any module that a Trainer can train.

    Args:
        make_model: a freshly initialised module, by seed; None seed is the run's own initialisation.
        names: parameters that are pruned.
        make_trainer: see `MakeTrainer`.
        evaluate: what is worth knowing of a trained module, in values that JSON can hold.
        config: rounds, measure, rewinding, floor, controls.
        folder: where rounds are kept; a second run with the same arguments goes on where the first was cut.
        fingerprint: of the text and the recipe of the training; a folder of another one is refused.
        evaluation: fingerprint of the evaluation; rounds that another one has measured are measured again.
        seed: of random masks.
    """

    make_model: Callable[[int | None], nn.Module]
    names: Sequence[str]
    make_trainer: MakeTrainer
    evaluate: Callable[[nn.Module], dict[str, Any]]
    config: LotteryTicketConfig
    folder: Path
    fingerprint: str = ""
    evaluation: str = ""
    seed: int = 0

    def run(self) -> tuple[nn.Module, list[Round]]:
        """The module with the last ticket's trained weights, and every round in order, controls behind their ticket.

        Raises:
            BadInputError: the folder belongs to another run, or one is at it, the masks do not fit, the rewind step is
                past the end, the floor leaves no room for the last round.
            RunError: the loss is not a number, or a layer has collapsed and `on_collapse` is `stop`.
        """
        with alone_in(self.folder):
            return self._run()

    def _run(self) -> tuple[nn.Module, list[Round]]:
        model = self.make_model(None)
        weights = {name: model.get_parameter(name) for name in self.names}
        check_floor([weight.numel() for weight in weights.values()], self.config)
        self._check_ties(model)
        self._claim(model)
        masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
        rounds = [self._round(0, "ticket", model, masks)]
        for number in progress(range(1, self.config.rounds + 1), "rounds", total=self.config.rounds):
            trained = {name: weight.detach().cpu() for name, weight in weights.items()}
            kept = self.config.kept(number)
            masks, held = next_masks(trained, masks, self.config.importance, kept, self.config.min_keep_ratio)
            self._check_collapse(number, model, masks)
            rounds.append(self._round(number, "ticket", model, masks, held))
            if self.config.wants_controls(number):
                rounds += self._controls(number, masks)
        return model, rounds

    @property
    def ticket_folder(self) -> Path:
        """Where tickets of this measure, rate and floor are."""
        own = {key: getattr(self.config, key) for key in ("importance", "pruning_rate", "min_keep_ratio")}
        return self.folder / f"{self.config.importance}-{fingerprint([own, sorted(self.names)], {})[:8]}"

    def _claim(self, model: nn.Module) -> None:
        """This run's folder with the weights that it begins with, or a refusal where another run's state is there."""
        identity = {
            "training": self.fingerprint,
            "weights": fingerprint("", model.state_dict()),
            "rewind_step": self.config.rewind_step,
        }
        unfinished = self.folder / "round-00.unfinished" / CHECKPOINTS
        began = (self.folder / "round-00").is_dir() or last_checkpoint(unfinished) is not None
        begin(self.folder, identity, model, began, leftovers=["rewind"])

    def _round(
        self, number: int, kind: str, model: nn.Module, masks: dict[str, Tensor], held: Sequence[str] = ()
    ) -> Round:
        """Train `model` under `masks` from where this kind of round begins; its result is read where it exists."""
        name = f"round-{number:02d}" + (f"-{kind}" if kind != "ticket" else "")
        folder = (self.ticket_folder if number else self.folder) / name

        def train_it(checkpoints: Path) -> Trained:
            return self._train(model, masks, kind, number, checkpoints)

        begun = Round(number, kind, held=list(held))
        self._check_masks(folder / MASKS, masks)
        return make_round(folder, begun, model, masks, train_it, Measuring(self.evaluate, self.evaluation))

    def _check_masks(self, file: Path, masks: dict[str, Tensor]) -> None:
        """Raise BadInputError where a round was trained under another mask than today's."""
        if not file.is_file():
            return
        before = load_file(file)
        if before.keys() != masks.keys() or any(not torch.equal(before[name], own) for name, own in masks.items()):
            raise BadInputError(
                f"rounds_folder: {file.parent} was trained under another mask, by another seed, `ignore` or release; "
                "remove it and the later rounds."
            )

    def _train(self, model: nn.Module, masks: dict[str, Tensor], kind: str, number: int, folder: Path) -> Trained:
        where = f"round {number}" + (f" ({kind.replace('_', ' ')})" if kind != "ticket" else "")
        rewind = KeepCheckpoint(self.config.rewind_step, self.folder / "rewind")
        rewound = number and self.config.rewind_step and kind != "fresh_initialization"
        stop = StopAtNaN(where, folder, rewind.folder if rewound else None)
        for needed in (self.folder / INITIAL, *((rewind.folder,) if rewound else ())):
            if not needed.exists():
                raise BadInputError(
                    f"rounds_folder: {needed} is gone, which {where} begins from; remove {self.folder} to begin anew."
                )
        if number:
            # A mask may follow from what is none of the folder's identity, and the dense training may be another one.
            own = {"training": self.fingerprint, "masks": fingerprint("", masks)}
            claim(folder, own, last_checkpoint(folder) is not None)
        checkpoint = last_checkpoint(folder) if number else rewind.go_on_from(folder)
        if checkpoint is None and kind != "fresh_initialization":
            if rewound:
                checkpoint = rewind.folder
            load_weights(model, self.folder / INITIAL)
        # What asks for a checkpoint comes before what looks whether there will be one.
        callbacks = [stop, MaskCallback(masks)] if number else [rewind, stop]
        trainer, seconds = train_round(self.folder, self.make_trainer, model, callbacks, folder, checkpoint)
        return Trained(int(trainer.state.global_step), seconds=seconds)

    def _controls(self, number: int, masks: dict[str, Tensor]) -> list[Round]:
        """The ticket's mask on other initial weights, and a random mask of its densities on the ticket's own."""
        done = []
        for kind in self.config.controls:
            fresh = kind == "fresh_initialization"
            model = self.make_model(1000 + number if fresh else None)
            own = masks if fresh else random_masks(masks, seed=1000 * self.seed + number)
            done.append(self._round(number, kind, model, own))
        return done

    def _check_ties(self, model: nn.Module) -> None:
        every = dict(model.named_parameters(remove_duplicate=False))
        tied = sorted(every.keys() - dict(model.named_parameters()).keys())
        if tied and self.config.rewind_step and not isinstance(model, PreTrainedModel):
            raise BadInputError(
                f"rewind_step: {tied[0]} is another parameter under a second name, which a Trainer saves of a "
                "PreTrainedModel alone; make the module one, or set rewind_step to 0 and save_strategy to no."
            )

    def _check_collapse(self, number: int, model: nn.Module, masks: dict[str, Tensor]) -> None:
        cut = collapsed_layers(model, masks) if self.config.on_collapse == "stop" else []
        if cut:
            raise RunError(
                f"round {number}: no path from input to output leads through what is left of {cut[0]} at "
                f"{1 - self.config.kept(number):.1%} sparsity; raise min_keep_ratio, choose another importance, or go "
                "on with on_collapse: record."
            )
