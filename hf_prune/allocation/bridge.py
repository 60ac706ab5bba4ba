"""FCPTS's bridge: between a learned score, a layer's threshold, its sparsity and that of the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor

from hf_prune.allocation.density import ScoreDensity
from hf_prune.allocation.histogram import Histogram


@dataclass(frozen=True)
class Layer:
    """What learning needs to know of a layer's scores.

    Attributes:
        scale: float32 [in], what |w| is multiplied by; None for the magnitude alone.
        counts: how many scores lie where.
        density: of the signed scores, for the bridge.
        row_scale: float32 [out], what |w| is multiplied by as well, or None.
    """

    scale: Tensor | None
    counts: Histogram
    density: ScoreDensity
    row_scale: Tensor | None = None

    @cached_property
    def distribution(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(edges of the histogram's bins, share of scores below each), neither ever falling."""
        below = numpy.concatenate([[0], numpy.cumsum(self.counts.counts)]) / self.counts.numel
        return self.counts.edges(), below

    @property
    def largest(self) -> float:
        """The upper end of the scores: sigmoid(score) times this is a threshold."""
        return float(self.distribution[0][-1])

    def sparsity(self, threshold: float) -> float:
        """Share of scores below the threshold."""
        edges, below = self.distribution
        return float(numpy.interp(threshold, edges, below))

    def threshold(self, sparsity: float) -> float:
        """The order statistic with `sparsity` of the scores below it."""
        edges, below = self.distribution
        return float(numpy.interp(sparsity, below, edges))


class Bridge:
    """Between scores, thresholds and the sparsity of the whole model."""

    def __init__(self, layers: Sequence[Layer], sparsity: float, largest: Tensor | None = None) -> None:
        self.layers = layers
        self.sparsity = sparsity
        if largest is None:
            largest = torch.tensor([layer.largest for layer in layers], dtype=torch.float64)
        self.largest = largest
        self.sizes = torch.tensor([layer.counts.numel for layer in layers], dtype=torch.float64)

    def scores(self, densities: Sequence[float]) -> Tensor:
        """The scores whose thresholds keep `densities`, float64 [layers]."""
        thresholds = [layer.threshold(1 - density) for layer, density in zip(self.layers, densities, strict=True)]
        shares = torch.tensor(thresholds, dtype=torch.float64) / self.largest
        return torch.logit(shares, eps=1e-9)

    def thresholds(self, scores: Tensor) -> Tensor:
        """t = sigmoid(score) * max q, float64 [layers]."""
        return torch.sigmoid(scores) * self.largest

    def slopes(self, scores: Tensor) -> Tensor:
        """dt / dscore."""
        share = torch.sigmoid(scores)
        return share * (1 - share) * self.largest

    def sparsities(self, scores: Tensor) -> list[float]:
        """Share of each layer below its threshold: the count, up to the histograms' resolution."""
        thresholds = self.thresholds(scores).tolist()
        return [layer.sparsity(value) for layer, value in zip(self.layers, thresholds, strict=True)]

    def total(self, scores: Tensor) -> float:
        """Sparsity over all layers."""
        return float(torch.tensor(self.sparsities(scores), dtype=torch.float64) @ self.sizes / self.sizes.sum())

    def growth(self, scores: Tensor) -> Tensor:
        """d(sparsity over all layers) / dscore through the density bridge, float64 [layers]."""
        densities = [
            layer.density.sparsity_slope(float(value))
            for layer, value in zip(self.layers, self.thresholds(scores), strict=True)
        ]
        slopes = torch.tensor(densities, dtype=torch.float64) * self.slopes(scores)
        return slopes * self.sizes / self.sizes.sum()

    def penalty_gradient(self, scores: Tensor) -> Tensor:
        """Gradient of L_c = |s - s*|."""
        return math.copysign(1.0, self.total(scores) - self.sparsity) * self.growth(scores)

    def along_budget(self, gradient: Tensor, scores: Tensor) -> Tensor:
        """The part of a gradient that leaves the whole sparsity as it is (to first order)."""
        normal = self.growth(scores)
        return gradient - normal * (gradient @ normal) / (normal @ normal).clamp(min=1e-300)

    def on_budget(self, scores: Tensor) -> Tensor:
        """All scores moved by one shift so that the whole sparsity is the one asked for."""
        low, high = -40.0, 40.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.total(scores + middle) < self.sparsity else (low, middle)
        return scores + high
