"""OWL: blocks with more outliers among their Wanda scores keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from torch import Tensor

from hf_prune.allocation.base import Allocation, by_block
from hf_prune.allocation.histogram import Histogram
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.methods.wanda import Wanda
from hf_prune.weights import WeightView


@dataclass(frozen=True)
class Owl(Allocation):
    """Outlier weighed layerwise sparsity (Yin et al., 2023, https://arxiv.org/abs/2310.05175), one density a block.

    A block's outlier ratio is the share of its Wanda scores above `outlier_multiple` times their mean, over all of its
    matrices. Ratios are stretched to [0, 2 * outlier_range] and moved so that the mean density is the one wanted.

    Args:
        outlier_multiple: M in the paper (5).
        outlier_range: lambda in the paper (0.08); no block is further than twice that from another.
    """

    outlier_multiple: float = 5.0
    outlier_range: float = 0.08

    needs_weights = True
    statistics = frozenset({"sum_of_squares"})
    summary = "blocks with more outliers among their Wanda scores keep more"
    paper = "https://arxiv.org/abs/2310.05175"

    def __post_init__(self) -> None:
        if self.outlier_multiple <= 0:
            raise BadInputError(f"outlier_multiple: {self.outlier_multiple} must be above 0; 5 is the paper's.")
        if not 0 <= self.outlier_range < 0.5:
            raise BadInputError(f"outlier_range: {self.outlier_range} is outside [0, 0.5); 0.08 is the paper's.")

    def measure(self, weight: Tensor, statistics: Statistics | None) -> Histogram:
        return Histogram.of(Wanda().score(weight, statistics))

    def densities(self, views: Sequence[WeightView], measures: Mapping[str, Histogram], sparsity: float) -> list[float]:
        blocks: dict[int, list[Histogram]] = {}
        for view in views:
            blocks.setdefault(view.block, []).append(measures[view.name])
        ratios = {}
        for block, own in blocks.items():
            numel = sum(part.numel for part in own)
            limit = self.outlier_multiple * sum(part.total for part in own) / numel
            ratios[block] = sum(part.count_above(limit) for part in own) / numel
        values = numpy.array(list(ratios.values()))
        spread = values.max() - values.min()
        stretched = (values - values.min()) / spread * 2 * self.outlier_range if spread > 0 else values * 0
        moved = stretched - stretched.mean() + (1 - sparsity)
        return by_block(views, dict(zip(ratios, moved, strict=True)))
