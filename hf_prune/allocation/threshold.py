"""One threshold over all layers: on plain scores, or on each layer's scores divided by their L1 or L2 norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_prune.allocation.base import Allocation
from hf_prune.allocation.histogram import Histogram, shares_above
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.methods.wanda import Wanda
from hf_prune.weights import WeightView

SCORES = ("magnitude", "wanda")


@dataclass(frozen=True)
class Global(Allocation):
    """The largest scores of the whole model stay (global magnitude pruning, Han et al. 2015).

    Args:
        allocation_score: `magnitude`, |W|; or `wanda`, |W| times the norm of its input on the dense model (our
            extension).
    """

    allocation_score: str = "magnitude"

    needs_weights = True
    summary = "one threshold over all layers"
    paper = "https://arxiv.org/abs/1506.02626"

    def __post_init__(self) -> None:
        if self.allocation_score not in SCORES:
            raise BadInputError(f"allocation_score: {self.allocation_score!r} is not one of {', '.join(SCORES)}.")
        if self.allocation_score == "wanda":
            object.__setattr__(self, "statistics", Wanda.statistics)

    def measure(self, weight: Tensor, statistics: Statistics | None) -> Histogram:
        return Histogram.of(weight.abs() if self.allocation_score == "magnitude" else Wanda().score(weight, statistics))

    def norm(self, scores: Histogram) -> float:
        """What a layer's scores are divided by."""
        return 1.0

    def densities(self, views: Sequence[WeightView], measures: Mapping[str, Histogram], sparsity: float) -> list[float]:
        histograms = [measures[view.name] for view in views]
        # A layer of zeros alone has no norm; its scores are below any threshold anyway.
        scales = [self.norm(histogram) or 1.0 for histogram in histograms]
        return shares_above(histograms, scales, 1 - sparsity)


@dataclass(frozen=True)
class LayerwiseL1(Global):
    """|w| / ||W||_1 of each layer, one threshold over all (Vandersmissen & Oramas, 2023); one-shot is our transfer."""

    summary = "one threshold over all layers' scores, each layer's divided by their L1 norm"
    paper = "https://arxiv.org/abs/2302.11244"

    def norm(self, scores: Histogram) -> float:
        return scores.total


@dataclass(frozen=True)
class LayerwiseL2(Global):
    """|w| / ||W||_2 of each layer, one threshold over all: the paper's L2 measure, w^2 / sum w^2, in the same order."""

    summary = "one threshold over all layers' scores, each layer's divided by their L2 norm"
    paper = "https://arxiv.org/abs/2302.11244"

    def norm(self, scores: Histogram) -> float:
        return math.sqrt(scores.squares)
