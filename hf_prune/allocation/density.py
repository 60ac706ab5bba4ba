"""How densely a layer's scores lie around a threshold: the derivative of its sparsity with respect to the threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from torch import Tensor

# The kernel density estimate is made on a grid: n weights cost one pass, whatever n is.
_GRID_BINS = 2**15
# The released code's histogram.
HISTOGRAM_BINS = 100


@dataclass(frozen=True)
class ScoreDensity:
    """Density of signed scores on a regular grid, linear in between and zero outside of it.

    Attributes:
        first: place of the first grid point.
        spacing: between grid points.
        values: float64 [points].
        bandwidth: the kernel's standard deviation, h = 1.06 sigma n^(-1/5); for a histogram the same rule's.
        steps: constant around each grid point, as a histogram is, instead of linear between two.
    """

    first: float
    spacing: float
    values: numpy.ndarray
    bandwidth: float
    steps: bool = False

    @classmethod
    def kernel(cls, scores: Tensor) -> ScoreDensity:
        """Gaussian kernel density estimate: p(t) = 1 / (n h) sum_i phi((t - w_i) / h)."""
        from scipy.signal import fftconvolve

        flat = _flat(scores)
        bandwidth = rule_of_thumb(flat)
        low, high = float(flat.min()) - 5 * bandwidth, float(flat.max()) + 5 * bandwidth
        spacing = (high - low) / _GRID_BINS
        counts, edges = numpy.histogram(flat, bins=_GRID_BINS, range=(low, high))
        reach = max(math.ceil(6 * bandwidth / spacing), 1)
        offsets = numpy.arange(-reach, reach + 1) * spacing / bandwidth
        weights = numpy.exp(-0.5 * offsets**2)
        smooth = fftconvolve(counts, weights / weights.sum(), mode="same")
        values = numpy.maximum(smooth, 0.0) / (len(flat) * spacing)
        return cls(float(edges[0] + spacing / 2), spacing, values, bandwidth)

    @classmethod
    def histogram(cls, scores: Tensor, bins: int = HISTOGRAM_BINS) -> ScoreDensity:
        """Histogram over [min, max], as the released code has it."""
        flat = _flat(scores)
        low, high = float(flat.min()), float(flat.max())
        high = high if high > low else low + max(abs(low), 1e-12)
        counts, edges = numpy.histogram(flat, bins=bins, range=(low, high))
        spacing = (high - low) / bins
        values = counts / (len(flat) * spacing)
        return cls(float(edges[0] + spacing / 2), spacing, values, rule_of_thumb(flat), steps=True)

    def at(self, place: float) -> float:
        """p(place)."""
        position = (place - self.first) / self.spacing
        number = round(position) if self.steps else math.floor(position)
        if not 0 <= number < len(self.values) - (not self.steps):
            return 0.0
        if self.steps:
            return float(self.values[number])
        share = position - number
        return float((1 - share) * self.values[number] + share * self.values[number + 1])

    def sparsity_slope(self, threshold: float) -> float:
        """d/dt of the share of scores with |score| <= t: p(t) + p(-t)."""
        return self.at(threshold) + self.at(-threshold)


def rule_of_thumb(flat: numpy.ndarray) -> float:
    """Silverman's bandwidth, 1.06 sigma n^(-1/5); never zero."""
    return max(1.06 * float(flat.std(dtype=numpy.float64)) * len(flat) ** -0.2, 1e-12)


def _flat(scores: Tensor) -> numpy.ndarray:
    return scores.detach().cpu().float().numpy().reshape(-1)


DENSITIES = {"kde": ScoreDensity.kernel, "histogram": ScoreDensity.histogram}
