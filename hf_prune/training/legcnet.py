"""LEGCNet's procedure: record a training, find what causes its errors, prune the rest, train what is left.

    FOLDER/run.json                what decides how the dense training and its recording go
    FOLDER/initial.safetensors     the weights that everything began with
    FOLDER/dense/                  the recorded training
    FOLDER/recording/              its series and targets (recorder.py)
    FOLDER/twin-PERTURBATION/      the same of a training that began a little elsewhere, where differences are wanted
    FOLDER/DECISION/               causes.safetensors, and a folder for each of KINDS at the same count

Sahu et al. (2023), https://arxiv.org/abs/2308.09955.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.training.causes import Causes, causes_of, find_causes, target_steps
from hf_prune.training.checkpoints import KeepCheckpoint, StopAtNaN, StopBehind, alone_in, fingerprint, last_checkpoint
from hf_prune.training.masks import MaskCallback
from hf_prune.training.recorder import Recorder, read_record
from hf_prune.training.rounds import (
    CHECKPOINTS,
    INITIAL,
    Look,
    MakeTrainer,
    Measuring,
    Round,
    Trained,
    begin,
    load_weights,
    make_round,
    train_round,
)
from hf_prune.training.series import Series
from hf_prune.training.watch import Watch

KINDS = ("legcnet", "magnitude", "random")
BENCHMARK_SHARE = 0.99
RECORDED = ("series", "samples_per_matrix", "record_every", "window", "stride")


@dataclass
class LEGCNetSearch:
    """The procedure, for any module that a Trainer can train.

    Args:
        make_model: the module that everything begins with.
        series: what is watched and pruned.
        make_trainer: as for tickets; the same seed makes the same batches every time.
        target: what the series may cause, measured on the module: the share of errors, as published.
        figure: what is watched, higher is better: accuracy on the training rows, as published.
        look_every: steps from one look to the next, an epoch as published.
        benchmark: what the figure has to reach; None, 99 % of the dense module's last.
        stop_there: a pruned module's training ends where it reaches the benchmark, as published; all of it otherwise.
        measuring: of trained modules.
        config: recording, test, decision, restart.
        steps: of a whole training.
        folder: see above; a second run with the same arguments goes on where the first was cut.
        fingerprint: of the text and the recipe of the training; a folder of another one is refused.
    """

    make_model: Callable[[], nn.Module]
    series: Series
    make_trainer: MakeTrainer
    target: Callable[[nn.Module], float]
    figure: Callable[[nn.Module], float]
    look_every: int
    benchmark: float | None
    measuring: Measuring
    config: LEGCNetConfig
    steps: int
    folder: Path
    fingerprint: str = ""
    seed: int = 0
    stop_there: bool = True

    @property
    def recorded(self) -> int:
        """Steps that are recorded."""
        return self.config.recorded(self.steps)

    @property
    def decision_folder(self) -> Path:
        """Where this decision and what follows from it are."""
        own = {key: value for key, value in asdict(self.config).items() if key not in (*RECORDED, "rounds_folder")}
        end = [self.benchmark] if self.stop_there else ["all steps"]
        return self.folder / f"{self.config.variant}-{fingerprint([own, *end], {})[:8]}"

    def run(self) -> tuple[nn.Module, Causes, list[Round]]:
        """The module that LEGCNet leaves, what was found, and the rounds: dense, LEGCNet, magnitude, random.

        Raises:
            BadInputError: too few windows, a target that never changes, a folder of another run or with one at it.
            RunError: the loss is not a number.
        """
        with alone_in(self.folder):
            return self._run()

    def _run(self) -> tuple[nn.Module, Causes, list[Round]]:
        ends = frozenset(target_steps(self.config, self.recorded))
        model = self.make_model()
        self._claim(model)
        everything = self.series.masks(torch.ones(len(self.series.observe(model)), dtype=torch.bool))
        dense = make_round(
            self.folder / "dense",
            Round(0, "dense"),
            model,
            everything,
            lambda checkpoints: self._train_dense(model, everything, ends, checkpoints),
            self.measuring,
        )
        twin = self._record_twin(model, everything) if self.config.perturbation else None
        recording = self.folder / "recording"
        causes = causes_of(self.decision_folder, lambda: find_causes(recording, self.config, self.recorded, twin))
        keep, held = self.with_floor(causes.keep, causes.scores, int(causes.keep.sum()))
        causes = replace(causes, keep=keep)
        benchmark = self.benchmark_of(dense) if self.stop_there else None
        rounds = [dense, *(self._pruned(kind, model, causes, held, benchmark) for kind in KINDS)]
        load_weights(model, self.decision_folder / KINDS[0] / "model.safetensors")
        return model, causes, rounds

    def benchmark_of(self, dense: Round) -> float | None:
        """The figure that ends a training."""
        if self.benchmark is not None or not dense.looks:
            return self.benchmark
        return BENCHMARK_SHARE * dense.looks[-1][1]

    def reached(self, found: Round, dense: Round) -> Look | None:
        """The first look of a round at which the figure was that of the benchmark; None where it never was."""
        benchmark = self.benchmark_of(dense)
        return next((look for look in found.looks if benchmark is not None and look[1] >= benchmark), None)

    def keep(self, kind: str, causes: Causes) -> Tensor:
        """Which series stay, bool [series]: those that LEGCNet keeps, or as many others, the largest or any."""
        if kind == "legcnet":
            return causes.keep
        if kind == "magnitude":
            score = read_record(self.folder / "recording", self.recorded // self.config.record_every - 1).abs()
        else:
            score = torch.rand(len(causes.keep), generator=torch.Generator().manual_seed(self.seed))
        return self.with_floor(torch.zeros_like(causes.keep), score, int(causes.keep.sum()))[0]

    def with_floor(self, keep: Tensor, score: Tensor, count: int) -> tuple[Tensor, list[str]]:
        """`keep` with what each matrix needs to have left, and the highest scores up to `count`; and who needed it."""
        keep, held, start = keep.clone(), [], 0
        for name, (series, least) in self.series.least(self.config.min_keep_ratio).items():
            own = keep[start : start + series]
            missing = least - int(own.sum())
            if missing > 0:
                held.append(name)
                own[_highest(score[start : start + series], ~own, missing)] = True
            start += series
        keep[_highest(score, ~keep, count - int(keep.sum()))] = True
        return keep, held

    def _claim(self, model: nn.Module) -> None:
        identity = {
            "training": self.fingerprint,
            "weights": fingerprint("", model.state_dict()),
            "recording": [*(getattr(self.config, key) for key in RECORDED), self.recorded, self.steps],
            "series": self.series.identity,
        }
        unfinished = self.folder / "dense.unfinished" / CHECKPOINTS
        began = (self.folder / "dense").is_dir() or last_checkpoint(unfinished) is not None
        begin(self.folder, identity, model, began, leftovers=["recorded"])

    def _train_dense(self, model: nn.Module, layers: Iterable[str], ends: frozenset[int], checkpoints: Path) -> Trained:
        recorder = Recorder(
            self.series.observe,
            self.folder / "recording",
            self.config.record_every,
            self.target,
            lambda step: step in ends,
            until=self.recorded,
        )
        keep = KeepCheckpoint(self.recorded if self.recorded < self.steps else 0, self.folder / "recorded")
        checkpoint = keep.go_on_from(checkpoints)
        if checkpoint is None:
            load_weights(model, self.folder / INITIAL)
        # What asks for a checkpoint comes before those that look whether there will be one.
        watch = self._watch(None, layers)
        return self._train("the dense training", model, [keep, recorder], watch, checkpoints, checkpoint)

    def _record_twin(self, model: nn.Module, everything: dict[str, Tensor]) -> Path:
        """Record the same training from perturbed weights; the recording's folder."""
        folder = self.folder / f"twin-{self.config.perturbation:g}"

        def train_it(checkpoints: Path) -> Trained:
            checkpoint = last_checkpoint(checkpoints)
            if checkpoint is None:
                load_weights(model, self.folder / INITIAL)
                self._perturb(model)
            recorder = Recorder(
                self.series.observe, folder / "recording", self.config.record_every, until=self.recorded
            )
            watch = self._watch(None, everything)
            callbacks = [recorder, StopBehind(self.recorded)]
            return self._train("the perturbed training", model, callbacks, watch, checkpoints, checkpoint)

        make_round(folder / "dense", Round(0, "dense"), model, everything, train_it, Measuring(lambda model: {}))
        return folder / "recording"

    @torch.no_grad()
    def _perturb(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * self.config.perturbation * parameter.std(correction=0))

    def _watch(self, benchmark: float | None, layers: Iterable[str], behind: int = 0) -> Watch:
        return Watch(self.figure, self.look_every, benchmark, self.steps, list(layers), behind)

    @property
    def _goes_on(self) -> bool:
        return self.config.restart == "continue" and self.recorded < self.steps

    def _pruned(self, kind: str, model: nn.Module, causes: Causes, held: list[str], benchmark: float | None) -> Round:
        masks = self.series.masks(self.keep(kind, causes))

        def train_it(checkpoints: Path) -> Trained:
            if self.config.restart == "continue" and not self._goes_on:
                # Nothing of the training is left: the survivors are what they were at its end.
                load_weights(model, self.folder / "dense" / "model.safetensors")
                with torch.no_grad():
                    for name, mask in masks.items():
                        model.get_parameter(name).mul_(mask.to(model.get_parameter(name).device))
                return Trained(0, [(0, float(self.figure(model)), 0.0)])
            checkpoint = last_checkpoint(checkpoints)
            if checkpoint is None:
                checkpoint = self.folder / "recorded" if self._goes_on else None
                load_weights(model, self.folder / INITIAL)
            watch = self._watch(benchmark, masks, self.recorded if self._goes_on else 0)
            where = f"the training of what {kind} keeps"
            return self._train(where, model, [MaskCallback(masks)], watch, checkpoints, checkpoint)

        begun = Round(1, kind, held=held if kind == KINDS[0] else [])
        return make_round(self.decision_folder / kind, begun, model, masks, train_it, self.measuring)

    def _train(
        self,
        where: str,
        model: nn.Module,
        callbacks: Sequence[TrainerCallback],
        watch: Watch,
        folder: Path,
        checkpoint: Path | None,
    ) -> Trained:
        callbacks = [StopAtNaN(where, folder), *callbacks, watch]
        trainer, seconds = train_round(self.folder, self.make_trainer, model, callbacks, folder, checkpoint)
        return replace(watch.seen(trainer.state), seconds=seconds)


def _highest(score: Tensor, where: Tensor, count: int) -> Tensor:
    """int64, places of the `count` highest scores among those that `where` marks; the earlier one where they tie."""
    places = where.nonzero().flatten()
    return places[score[places].argsort(descending=True, stable=True)[: max(count, 0)]]
