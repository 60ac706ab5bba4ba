"""FCPTS: learn how sparse each layer gets, under one budget, by matching the dense model's output.

Each layer has a threshold t on its scores q = |w| (or the Wanda score |w| * ||x||); its sparsity is the share of scores
below. The count is not differentiable, so a density estimate of the layer's scores bridges it: ds/dt = p(t) + p(-t).
Thresholds follow the gradient of the divergence between the dense and the masked model; weights stay as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.allocation.base import Allocation, Work, meet_budget
from hf_prune.allocation.bridge import Bridge, Layer
from hf_prune.allocation.density import DENSITIES
from hf_prune.allocation.erk import ErdosRenyi
from hf_prune.allocation.histogram import Histogram, shares_above
from hf_prune.allocation.learning import Learning
from hf_prune.engine.gradients import FisherFactors
from hf_prune.engine.statistics import Statistics
from hf_prune.engine.threshold_training import ThresholdTask, threshold_task
from hf_prune.errors import BadInputError
from hf_prune.progress import progress
from hf_prune.weights import WeightView

SCORES = ("magnitude", "wanda", "fisher")
STARTS = ("capped_erk", "erk", "fisher", "uniform")
BUDGETS = ("projection", "penalty")
# How often the held-out windows are looked at in the course of learning.
LOOKS = 5
# Share of the whole sparsity that every layer begins with at least under `capped_erk`.
LEAST_SPARSITY = 0.5
# Norms of the inputs settle long before the Gram matrices of the solvers do.
MEASURED_WINDOWS = 8


@dataclass(frozen=True)
class Fcpts(Allocation):
    """Fast and controllable post-training sparsity (Gong et al., 2024, https://arxiv.org/abs/2405.05808).

    From the paper: thresholds as sigmoid(score) times a scale, the density bridge, the start at ERK, the penalty
    |s - s*|, the divergence at a temperature. Ours, for language models: a straight-through window of a few
    bandwidths (the released 1.0 spans every weight of a language model), scores by the Fisher information, Adam on
    the scores, a cap on ERK, a budget that is met after every step (`projection`), early stopping on held-out
    windows. The released code makes its masks where no gradient is recorded, so that only the penalty moves its
    thresholds: `fcpts_gradient: false` with `fcpts_budget: penalty` does the same.

    Args:
        fcpts_score: what is thresholded: `magnitude`, |W|; `wanda`, |W| times the norm of its input; or `fisher`, the
            same times what errors of its output cost (ours), for solvers with `output_importance: fisher`.
        fcpts_steps: of learning, each on `fcpts_batch_size` windows.
        fcpts_batch_size: calibration windows a step, over all processes: with fewer than processes some are idle.
        fcpts_learning_rate: Adam's, on the scores, with a cosine to zero.
        fcpts_temperature: T of the divergence, which is multiplied by T^2.
        fcpts_budget: `projection`, after every step one shift of all scores meets the budget; `penalty`, the paper's
            term in the loss and one shift at the end.
        fcpts_penalty: lambda of the penalty.
        fcpts_density: `kde`, a Gaussian kernel density estimate (the paper's); `histogram`, 100 bins (the code's).
        fcpts_window: half-width of the straight-through window, in bandwidths of each layer's scores.
        fcpts_gradient: False keeps the divergence from the thresholds, as the released code does.
        fcpts_start: `erk` (the paper's), `capped_erk`, which lets no layer be denser than half the sparsity leaves it,
            `uniform`, or, with scores of that name, `fisher`: one threshold over all layers. A threshold learns in
            proportion to itself: one that begins where ERK keeps a layer whole never moves.
        fcpts_held_out: share of the calibration windows that decides which step is kept and when to stop.
        fcpts_patience: stop after so many looks at the held-out windows without a better one; a look every fifth of
            the steps.
        fcpts_teacher_tokens: likeliest tokens kept of each teacher distribution; the others count as one.
        fcpts_seed: of the order of the windows.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        train_weights: learn the surviving weights together with the thresholds, as the released code does; for
            `method: fcpts` alone. In float32 and with Adam's moments it takes 20 bytes a weight.
        weight_learning_rate: Adam's, for `train_weights`.
    """

    fcpts_score: str = "wanda"
    fcpts_steps: int = 32
    fcpts_batch_size: int = 1
    fcpts_learning_rate: float = 0.06
    fcpts_temperature: float = 1.0
    fcpts_budget: str = "projection"
    fcpts_penalty: float = 1.0
    fcpts_density: str = "kde"
    fcpts_window: float = 2.0
    fcpts_gradient: bool = True
    fcpts_start: str = "capped_erk"
    fcpts_held_out: float = 0.0625
    fcpts_patience: int = 2
    fcpts_teacher_tokens: int = 256
    fcpts_seed: int = 0
    gradient_checkpointing: bool = False
    train_weights: bool = False
    weight_learning_rate: float = 2e-5

    needs_weights = True
    learns = True
    summary = "thresholds learned by matching the dense model's output under one budget"
    paper = "https://arxiv.org/abs/2405.05808"

    def __post_init__(self) -> None:
        for key, choices in (
            ("fcpts_score", SCORES),
            ("fcpts_budget", BUDGETS),
            ("fcpts_density", DENSITIES),
            ("fcpts_start", STARTS),
        ):
            if getattr(self, key) not in choices:
                raise BadInputError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}.")
        for key in ("fcpts_steps", "fcpts_batch_size", "fcpts_patience", "fcpts_teacher_tokens"):
            if getattr(self, key) < 1:
                raise BadInputError(f"{key}: {getattr(self, key)} is too few; use 1 or more.")
        for key in ("fcpts_learning_rate", "fcpts_temperature", "fcpts_window", "weight_learning_rate"):
            if getattr(self, key) <= 0:
                raise BadInputError(f"{key}: {getattr(self, key)} must be above 0.")
        if self.fcpts_start == "fisher" != self.fcpts_score:
            raise BadInputError(
                "fcpts_start: fisher compares scores of one unit over all layers; set fcpts_score to fisher, or "
                f"fcpts_start to {STARTS[0]}."
            )
        if self.fcpts_penalty < 0:
            raise BadInputError(f"fcpts_penalty: {self.fcpts_penalty} must not be negative.")
        if not 0 < self.fcpts_held_out < 1:
            raise BadInputError(f"fcpts_held_out: {self.fcpts_held_out} is outside (0, 1).")
        if self.fcpts_score == "wanda":
            object.__setattr__(self, "statistics", frozenset({"sum_of_squares"}))

    @property
    def needs_text(self) -> bool:
        return True

    @property
    def measured_windows(self) -> int | None:
        return MEASURED_WINDOWS

    @property
    def needs_fisher(self) -> bool:
        return self.fcpts_score == "fisher"

    def measure(self, weight: Tensor, statistics: Statistics | None) -> Layer:
        scale = None
        if self.fcpts_score == "wanda":
            assert statistics is not None and statistics.sum_of_squares is not None
            # The norm of a mean token, so that windows and thresholds do not grow with the calibration set.
            scale = (statistics.sum_of_squares / max(statistics.count, 1)).sqrt().float()
        return self.measure_scores(weight, scale)

    def measure_scores(self, weight: Tensor, scale: Tensor | None, row_scale: Tensor | None = None) -> Layer:
        """Counts and density of a layer's scores as they are now."""
        scores = weight if scale is None else weight * scale
        scores = scores if row_scale is None else scores * row_scale[:, None]
        return Layer(scale, Histogram.of(scores.abs()), DENSITIES[self.fcpts_density](scores), row_scale)

    def start(self, views: Sequence[WeightView], layers: Sequence[Layer], sparsity: float) -> list[float]:
        """Densities to begin with."""
        if self.fcpts_start == "fisher":
            return shares_above([layer.counts for layer in layers], [1.0] * len(layers), 1 - sparsity)
        if self.fcpts_start == "uniform":
            return [1 - sparsity] * len(views)
        most = 1 - LEAST_SPARSITY * sparsity if self.fcpts_start == "capped_erk" else 1.0
        sizes = [view.shape[0] * view.shape[1] for view in views]
        wanted = ErdosRenyi().densities(views, {}, sparsity)
        return [most * share for share in meet_budget(wanted, sizes, (1 - sparsity) / most, 0.0)]

    def window_passes(self, samples: int) -> float:
        held_out = max(round(samples * self.fcpts_held_out), 1)
        learned = self.fcpts_steps * self.fcpts_batch_size
        taught = min(learned, samples - held_out) + held_out
        measured = MEASURED_WINDOWS if self.fcpts_score == "wanda" else 0
        return measured + taught + (3 + self.gradient_checkpointing) * learned + (LOOKS + 1) * held_out

    def memory_bytes(self, work: Work) -> int:
        """Of a step: masked weights and activations for the backward pass, logits, the teacher, trained weights."""
        # A block leaves its masked weights and its matrices' inputs and outputs.
        blocks = [
            sum(rows * columns + work.seq_length * (rows + columns) for rows, columns in block) * work.element
            for block in work.blocks
        ]
        inputs = len(blocks) * work.seq_length * work.hidden * work.element
        held = max(blocks) + inputs if self.gradient_checkpointing else sum(blocks)
        logits = 4 * 4 * work.seq_length * work.vocabulary
        teacher = 8 * work.samples * work.seq_length * min(self.fcpts_teacher_tokens, work.vocabulary)
        sizes = [rows * columns for block in work.blocks for rows, columns in block]
        # Gradient, two moments and the best state so far.
        trained = 4 * work.element * sum(sizes) if self.train_weights else 0
        return held + logits + teacher + 4 * 4 * max(sizes) + trained

    def decide(
        self,
        model: nn.Module,
        views: Sequence[WeightView],
        measures: Mapping[str, Layer | FisherFactors],
        sparsity: float,
        input_ids: Tensor | None,
        folder: Path | None,
    ) -> list[float]:
        """Learned densities. With `train_weights` the model's weights have moved afterwards.

        Raises:
            BadInputError: too little text, or weights to be trained that are not float32.
        """
        if self.train_weights and any(view.parameter.dtype != torch.float32 for view in views):
            raise BadInputError("train_weights: steps this small vanish in half precision; set dtype to float32.")
        layers = [self._layer(view, measures[view.name]) for view in views]
        with threshold_task(
            model,
            views,
            [(layer.scale, layer.row_scale) for layer in layers],
            [self.fcpts_window * layer.density.bandwidth for layer in layers],
            input_ids,
            held_out=self.fcpts_held_out,
            train_weights=self.train_weights,
            temperature=self.fcpts_temperature,
            teacher_tokens=self.fcpts_teacher_tokens,
            recompute=self.gradient_checkpointing,
            batch_size=self.fcpts_batch_size,
            steps=self.fcpts_steps,
            seed=self.fcpts_seed,
            folder=folder,
        ) as task:
            return self.learn(task, layers, sparsity)

    def _layer(self, view: WeightView, measured: Layer | FisherFactors) -> Layer:
        if isinstance(measured, Layer):
            return measured
        return self.measure_scores(view.read(), measured.inputs.sqrt(), measured.output_scale)

    def learn(self, task: ThresholdTask, layers: Sequence[Layer], sparsity: float) -> list[float]:
        """The learned share of each layer that is kept; the budget is met up to the histograms' resolution."""
        bridge = Bridge(layers, sparsity)
        scores = torch.nn.Parameter(bridge.scores(self.start([own.view for own in task.views], layers, sparsity)))
        groups: list[dict[str, Any]] = [{"params": [scores], "lr": self.fcpts_learning_rate}]
        if self.train_weights:
            # Once each: parts of a fused layer share its parameter.
            weights = list(dict.fromkeys(own.view.parameter for own in task.views))
            groups.append({"params": weights, "lr": self.weight_learning_rate})
        optimizer = torch.optim.Adam(groups)
        progressed = Learning(optimizer)
        settings = json.dumps([asdict(self), sparsity])
        state = task.load_state(settings)
        if state is None or not Learning.is_over(state, self.fcpts_steps, self.fcpts_patience):
            # Before anything is restored: the dense model is the teacher.
            task.teach()
        if state is None:
            self._judge(task, bridge, progressed, scores.detach())
        else:
            progressed.restore(state)
            bridge = self._rebuilt(task, bridge)
        rates = [group["lr"] for group in optimizer.param_groups]
        look = math.ceil(self.fcpts_steps / LOOKS)
        for step in progress(range(progressed.steps, self.fcpts_steps), "learning thresholds"):
            if progressed.is_stuck(self.fcpts_patience):
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / self.fcpts_steps)) / 2
            scores.grad = self._gradient(task, bridge, scores.detach(), task.steps[step])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progressed.steps = step + 1
            if self.fcpts_budget == "projection":
                scores.data = bridge.on_budget(scores.data)
            looked = progressed.steps % look == 0 or progressed.steps == self.fcpts_steps
            if looked:
                bridge = self._rebuilt(task, bridge)
                self._judge(task, bridge, progressed, scores.data)
            # Thresholds alone are small; trained weights are a model each time.
            if looked or not self.train_weights:
                task.save_state(progressed.state(), settings)
        progressed.finish()
        return [1 - share for share in progressed.best_sparsities.tolist()]

    def _judge(self, task: ThresholdTask, bridge: Bridge, progressed: Learning, scores: Tensor) -> None:
        """Scores are judged on the budget, whatever way they came; a floor is laid under the densities at the end."""
        candidate = bridge.on_budget(scores)
        loss = task.held_out_loss(bridge.thresholds(candidate).float())
        progressed.judge(loss, torch.tensor(bridge.sparsities(candidate), dtype=torch.float64))

    def _rebuilt(self, task: ThresholdTask, bridge: Bridge) -> Bridge:
        """The bridge over the weights as they are now."""
        if not self.train_weights:
            return bridge
        moved = [self.measure_scores(own.view.read(), own.scale, own.row_scale) for own in task.views]
        return Bridge(moved, bridge.sparsity, bridge.largest)

    def _gradient(self, task: ThresholdTask, bridge: Bridge, scores: Tensor, batch: Sequence[int]) -> Tensor:
        """Of the whole loss by the scores, float64 [layers]; trained weights get theirs on the way."""
        gradient = torch.zeros_like(scores)
        if self.fcpts_gradient or self.train_weights:
            by_threshold = task.gradients(bridge.thresholds(scores).float(), batch, self.fcpts_temperature**2)
            if self.fcpts_gradient:
                gradient = by_threshold.double() * bridge.slopes(scores)
        if self.fcpts_budget == "projection":
            return bridge.along_budget(gradient, scores)
        return gradient + self.fcpts_penalty * bridge.penalty_gradient(scores)
