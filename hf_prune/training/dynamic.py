"""Dynamic sparse training of any module that a Trainer can train, kept in a folder, with a dense twin where wanted.

FOLDER/run.json                  what decides how the training goes
FOLDER/initial.safetensors       the weights that everything began with
FOLDER/round-00/                 the dense twin of all settings without averaging
FOLDER/averaged-NON_MONOTONE/    that of settings with averaging, averaged alike
FOLDER/sparse-IDENTITY/          the sparse training of one setting
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.methods.dynamic_sparse import DynamicSparseConfig, initial_masks
from hf_prune.training.averaging import WeightAverage
from hf_prune.training.checkpoints import StopAtNaN, alone_in, fingerprint, last_checkpoint
from hf_prune.training.dynamic_masks import DynamicMaskCallback
from hf_prune.training.rounds import (
    CHECKPOINTS,
    INITIAL,
    WEIGHTS,
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
class DynamicSparseTraining:
    """The procedure.

    Args:
        make_model, names, make_trainer, evaluate, folder, fingerprint, evaluation: as for `TicketSearch`.
        config: how sparse, and how weights die and grow.
        seed: of the first masks and of random growth.
        held_out_loss: nats a token of the module as it is, for `averaging`.
    """

    make_model: Callable[[int | None], nn.Module]
    names: Sequence[str]
    make_trainer: MakeTrainer
    evaluate: Callable[[nn.Module], dict[str, Any]]
    config: DynamicSparseConfig
    folder: Path
    fingerprint: str = ""
    evaluation: str = ""
    seed: int = 0
    held_out_loss: Callable[[nn.Module], float] | None = None

    def run(self) -> tuple[nn.Module, list[Round]]:
        """The module with the sparse training's weights, and the rounds: the dense twin's first, where there is one.

        Raises:
            BadInputError: the folder belongs to another run, or one is at it, the masks do not fit or cannot move in
                this training.
            RunError: the loss is not a number.
        """
        with alone_in(self.folder):
            return self._run()

    def _run(self) -> tuple[nn.Module, list[Round]]:
        model = self.make_model(None)
        self._claim(model)
        shapes = {name: tuple(model.get_parameter(name).shape) for name in self.names}
        generator = torch.Generator().manual_seed(self.seed)
        masks = initial_masks(shapes, self.config.sparsity, self.config.initialization, generator)
        moving = DynamicMaskCallback(masks, self.config, self.seed, self._average())
        # Before the twin: what cannot be trained this way is refused when the training begins.
        rounds = [self._round(self.sparse_folder.name, Round(1, "sparse"), model, masks, moving)]
        if self.config.train_dense:
            rounds.insert(0, self._dense(model))
            load_weights(model, self.sparse_folder / WEIGHTS)
        return model, rounds

    @property
    def sparse_folder(self) -> Path:
        """Where the training of these settings is."""
        left_out = ("method", "train_dense", "rounds_folder")
        own = {key: value for key, value in asdict(self.config).items() if key not in left_out}
        return self.folder / f"sparse-{fingerprint([own, sorted(self.names), self.seed], {})[:8]}"

    def _dense(self, model: nn.Module) -> Round:
        """The dense twin: with averaging, a mean is compared with a mean."""
        full = {name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool) for name in self.names}
        if not self.config.averaging:
            return self._round("round-00", Round(0, "dense"), model, full, None)
        moving = DynamicMaskCallback(full, self.config, self.seed, self._average())
        return self._round(f"averaged-{self.config.non_monotone}", Round(0, "dense"), model, full, moving)

    def _average(self) -> WeightAverage | None:
        if not self.config.averaging:
            return None
        assert self.held_out_loss is not None
        return WeightAverage(self.held_out_loss, self.config.non_monotone)

    def _claim(self, model: nn.Module) -> None:
        identity = {"training": self.fingerprint, "weights": fingerprint("", model.state_dict())}
        # Of any settings: all trainings of a folder have one beginning.
        began = any(
            not path.name.endswith((".unfinished", ".part")) or last_checkpoint(path / CHECKPOINTS) is not None
            for path in self.folder.glob("*-*")
        )
        begin(self.folder, identity, model, began)

    def _round(
        self,
        name: str,
        begun: Round,
        model: nn.Module,
        masks: dict[str, Tensor],
        moving: DynamicMaskCallback | None,
    ) -> Round:
        def train_it(checkpoints: Path) -> Trained:
            stop = StopAtNaN(f"{begun.kind} training", checkpoints)
            checkpoint = last_checkpoint(checkpoints)
            if checkpoint is None:
                load_weights(model, self.folder / INITIAL)
            # What puts the averaged weights in place comes before what looks at the end's.
            callbacks = [*([moving] if moving else []), stop]
            trainer, seconds = train_round(self.folder, self.make_trainer, model, callbacks, checkpoints, checkpoint)
            return Trained(int(trainer.state.global_step), seconds=seconds)

        return make_round(self.folder / name, begun, model, masks, train_it, Measuring(self.evaluate, self.evaluation))
