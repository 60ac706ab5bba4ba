"""Scores of a matrix in a few thousand bins: enough for thresholds over all layers, whatever the model's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from torch import Tensor

# Non-negative floats order like their bit patterns: dropping low bits gives bins of 1/512 of an octave.
_DROPPED_BITS = 14


@dataclass(frozen=True)
class Histogram:
    """How many scores fall into each bin.

    Attributes:
        first: number of the first bin.
        counts: int64 [bins].
        total: sum of the scores.
        squares: sum of the squared scores.
    """

    first: int
    counts: numpy.ndarray
    total: float
    squares: float

    @classmethod
    def of(cls, scores: Tensor) -> Histogram:
        """Of float32 scores, none of them negative."""
        flat = scores.detach().cpu().float().contiguous().numpy().reshape(-1)
        bins = flat.view(numpy.int32) >> _DROPPED_BITS
        first = int(bins.min())
        return cls(
            first,
            numpy.bincount(bins - first),
            float(flat.sum(dtype=numpy.float64)),
            float(numpy.square(flat, dtype=numpy.float64).sum()),
        )

    @property
    def numel(self) -> int:
        """Number of scores."""
        return int(self.counts.sum())

    def edges(self) -> numpy.ndarray:
        """Lower edge of each bin and the upper edge of the last, float64 [bins + 1]."""
        numbers = numpy.arange(self.first, self.first + len(self.counts) + 1, dtype=numpy.int32)
        return (numbers << _DROPPED_BITS).view(numpy.float32).astype(numpy.float64)

    def count_above(self, limit: float) -> float:
        """Scores above `limit`; inside its bin they are taken as evenly spread."""
        edges = self.edges()
        inside = numpy.clip((edges[1:] - limit) / (edges[1:] - edges[:-1]), 0.0, 1.0)
        return float((self.counts * inside).sum())


def shares_above(histograms: Sequence[Histogram], scales: Sequence[float], share: float) -> list[float]:
    """One threshold over all scores, each divided by its histogram's scale, that keeps `share` of them together.

    Returns:
        the share of each histogram's scores above the threshold.
    """
    total = sum(histogram.numel for histogram in histograms)

    def above(limit: float) -> list[float]:
        return [own.count_above(limit * scale) for own, scale in zip(histograms, scales, strict=True)]

    tops = [own.edges()[-1] / scale for own, scale in zip(histograms, scales, strict=True)]
    bottoms = [max(own.edges()[0], 1e-30) / scale for own, scale in zip(histograms, scales, strict=True)]
    # Thresholds may lie many octaves apart: bisect their logarithm.
    low, high = numpy.log(min(bottoms)) - 1, numpy.log(max(tops)) + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(above(numpy.exp(middle))) > share * total else (low, middle)
    return [count / own.numel for count, own in zip(above(numpy.exp(high)), histograms, strict=True)]
