"""What a rule of allocation is, and how its wishes are brought under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
from torch import Tensor, nn

from hf_prune.engine.statistics import Statistics
from hf_prune.weights import WeightView


@dataclass(frozen=True)
class Work:
    """The sizes of a run, for estimates.

    Attributes:
        blocks: shapes (out, in) of the weight matrices of each block.
        samples, seq_length: calibration windows and their length in tokens.
        hidden, vocabulary: widths of the model.
        element: bytes of a weight.
    """

    blocks: Sequence[Sequence[tuple[int, int]]]
    samples: int
    seq_length: int
    hidden: int
    vocabulary: int
    element: int


@dataclass(frozen=True)
class Allocation:
    """A rule that says which share of each weight matrix is kept.

    `measure` looks at one dense matrix at a time and keeps something small of it; `densities` sees what it kept of all.
    A rule with `needs_weights = False` works on shapes alone, a model on the meta device included; one with
    `learns = True` takes many passes over calibration windows; one with `train_weights = True` moves weights meanwhile.
    """

    needs_weights: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    train_weights = False
    statistics: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = ""
    paper: ClassVar[str | None] = None

    @property
    def needs_fisher(self) -> bool:
        """Whether `decide` is handed the dense model's Fisher factors instead of what `measure` returns."""
        return False

    @property
    def needs_text(self) -> bool:
        """Whether the rule looks at calibration text."""
        return bool(self.statistics)

    @property
    def measured_windows(self) -> int | None:
        """So many calibration windows suffice for `statistics`; None for all of them."""
        return None

    def measure(self, weight: Tensor, statistics: Statistics | None) -> Any:
        """Whatever the rule wants to remember of a weight, float32 [out, in], on the inputs of the dense model."""
        return None

    def densities(self, views: Sequence[WeightView], measures: Mapping[str, Any], sparsity: float) -> list[float]:
        """The share of each view that the rule would keep, in any range; `meet_budget` comes after it."""
        raise NotImplementedError

    def decide(
        self,
        model: nn.Module,
        views: Sequence[WeightView],
        measures: Mapping[str, Any],
        sparsity: float,
        input_ids: Tensor | None,
        folder: Path | None,
    ) -> list[float]:
        """What `densities` says; a rule that learns does so here, on the dense model.

        The model is left as it was, unless the rule trains its weights.

        Args:
            input_ids: int64 [samples, tokens], the calibration windows, if the run has any.
            folder: where a rule that takes long keeps its state, to go on after a cut.
        """
        return self.densities(views, measures, sparsity)

    def window_passes(self, samples: int) -> float:
        """Forward passes over one calibration window that `decide` takes (a backward counts as two), for estimates."""
        return 0.0

    def memory_bytes(self, work: Work) -> int:
        """What `decide` holds at its peak beside the model, for estimates."""
        return 0


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity everywhere, the default of every one-shot paper."""

    summary = "the same sparsity in every layer"

    def densities(self, views: Sequence[WeightView], measures: Mapping[str, Any], sparsity: float) -> list[float]:
        return [1 - sparsity] * len(views)


def meet_budget(
    wanted: Sequence[float], sizes: Sequence[int], density: float, floor: float | Sequence[float]
) -> list[float]:
    """The densities nearest in proportion to `wanted` that lie in [floor, 1] and keep `density` of all weights.

    Every layer that is neither held by the floor nor full keeps its proportion to the others.

    Args:
        wanted: non-negative, one for each layer.
        sizes: weights of each layer.
        density: share of all weights that is kept, at least `floor`.
        floor: of all layers, or of each.
    """
    shape, numel = numpy.maximum(numpy.asarray(wanted, dtype=float), 1e-12), numpy.asarray(sizes, dtype=float)
    budget = density * numel.sum()

    if abs((numpy.clip(shape, floor, 1.0) * numel).sum() - budget) < 1e-9 * budget:
        return [float(value) for value in numpy.clip(shape, floor, 1.0)]

    def kept(factor: float) -> numpy.ndarray:
        return numpy.clip(factor * shape, floor, 1.0)

    low, high = 0.0, 1.0 / shape.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (kept(middle) * numel).sum() < budget else (low, middle)
    return [float(value) for value in kept(high)]


def whole_rows(
    densities: Sequence[float], shapes: Sequence[tuple[int, int]], density: float, floors: Sequence[float]
) -> list[float]:
    """The nearest densities that keep a whole number of weights in every row, and `density` of all weights.

    Each layer keeps what it may at least; those that lose most by that keep one weight a row more, as far as it goes.

    Args:
        shapes: (out, in) of each layer.
        density: share of all weights, met to half a weight a row of one layer.
        floors: densities that no layer may fall below.
    """
    rows, columns = numpy.asarray(shapes, dtype=float).T
    wanted = numpy.maximum(numpy.asarray(densities), floors) * columns
    kept = numpy.floor(wanted + 1e-9)
    missing = density * (rows * columns).sum() - (kept * rows).sum()
    for place in numpy.argsort(kept - wanted, kind="stable"):
        if rows[place] / 2 <= missing and kept[place] < columns[place]:
            kept[place] += 1
            missing -= rows[place]
    return [float(value) for value in kept / columns]


def by_block(views: Sequence[WeightView], values: Mapping[int, float]) -> list[float]:
    """A value of each block handed to all of its views."""
    return [values[view.block] for view in views]
