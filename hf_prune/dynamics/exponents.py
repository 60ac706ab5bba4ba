"""The largest Lyapunov exponent of every window of very many short series at once.

Rosenstein, Collins & De Luca (1993), https://doi.org/10.1016/0167-2789(93)90009-P, as LEGCNet uses it: two delay
coordinates, delay 1, the nearest neighbour in the maximum norm, no Theiler window, and the growth of one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a window's variance, explained by one split in two parts with means of their own. A straight line has 3/4.
ABRUPT = 0.9
FLAT = 1e-5
# Windows at once: what a core keeps in its cache.
CHUNK_BYTES = 4 * 1024**2
# And series: their windows overlap, and take more room than they do.
SERIES_TOGETHER = 256


def window_starts(steps: int, window: int, stride: int) -> range:
    """Where the windows begin; the last one ends at the last step or before."""
    return range(0, steps - window + 1, stride)


def windowed_exponents(
    series: Tensor, window: int = 50, stride: int | None = None, first: int = 0, last: int = 1
) -> Tensor:
    """Nats from one value of a series to the next, [series, windows], in the series' dtype.

    A window whose range is below 1e-5, or whose mean changes abruptly, has exponent 0. The paper says no more of
    abrupt changes; here one is where a single split into two parts explains more than 90 % of the window's variance.

    Args:
        series: float [series, steps].
        window: steps a window.
        stride: steps from one window to the next; 9/10 of a window unless given.
        first, last: see `largest_exponents`.
    """
    stride = stride or max(round(0.9 * window), 1)
    # [series, windows, window], a view.
    windows = series.unfold(1, window, stride)
    result = torch.zeros(windows.shape[:2], dtype=series.dtype)
    rows = max(CHUNK_BYTES // (window * window * series.element_size()), 1)
    for part, found in zip(windows.split(SERIES_TOGETHER), result.split(SERIES_TOGETHER), strict=True):
        for own, flat in zip(part.reshape(-1, window).split(rows), found.view(-1).split(rows), strict=True):
            moves = (own.amax(1) - own.amin(1) >= FLAT) & ~changes_abruptly(own)
            if bool(moves.any()):
                flat[moves] = largest_exponents(own[moves], first, last)
    return result


def largest_exponents(windows: Tensor, first: int = 0, last: int = 1) -> Tensor:
    """(S(last) - S(first)) / (last - first), float [windows].

    S(i) is the mean over points of ln(distance to the nearest neighbour i steps later). Distances of zero are skipped,
    also when the neighbour is chosen; without any other the exponent is 0.

    Args:
        windows: float [windows, steps].
        first, last: steps between which the growth is taken; the authors' 0 and 1 hold the first step, in which
            neighbours have yet to turn into the direction that grows.
    """
    apart = (windows[:, :, None] - windows[:, None, :]).abs_()
    distances = torch.maximum(apart[:, :-1, :-1], apart[:, 1:, 1:])
    del apart
    nearest, neighbours = torch.where(distances > 0, distances, torch.inf).min(2)
    found = nearest.isfinite()
    means, usable = zip(*(_mean_logarithm(distances, neighbours, found, step) for step in (first, last)), strict=True)
    return torch.where(usable[0] & usable[1], (means[1] - means[0]) / (last - first), 0)


def _mean_logarithm(distances: Tensor, neighbours: Tensor, found: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """S(step), and whether there was anything to take the mean of."""
    points = distances.shape[1] - step
    # Points so near the end have no such later step, nor have points whose neighbour is that near.
    own = neighbours[:, :points]
    later = distances[:, step:, step:].gather(2, own.clamp(max=points - 1)[:, :, None]).squeeze(2)
    where = (later > 0) & (own < points) & found[:, :points]
    logarithms = torch.where(where, later, 1).log()
    return logarithms.sum(1) / where.sum(1).clamp(min=1), where.any(1)


def changes_abruptly(windows: Tensor) -> Tensor:
    """Whether one split explains nearly all of a window's variance, bool [windows]."""
    steps = windows.shape[1]
    centred = (windows - windows.mean(1, keepdim=True)).double()
    left = torch.arange(1, steps, dtype=torch.float64)
    sums = centred.cumsum(1)[:, :-1]
    # The sum of squares between the two parts; their means are sums / left and -sums / (steps - left).
    between = (sums.square() / left + sums.square() / (steps - left)).amax(1)
    return between > ABRUPT * centred.square().sum(1)
