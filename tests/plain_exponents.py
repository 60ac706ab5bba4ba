"""The exponent of a window, slowly."""

import itertools
import math

import numpy as np


def plain(window: list[float]) -> float:
    """Rosenstein's algorithm as one would write it down."""
    points = list(itertools.pairwise(window))

    def distance(one: int, other: int) -> float:
        return max(abs(a - b) for a, b in zip(points[one], points[other], strict=True))

    now, then = [], []
    for here in range(len(points)):
        others = [(distance(here, there), there) for there in range(len(points)) if distance(here, there) > 0]
        if not others:
            continue
        nearest, there = min(others)
        now.append(math.log(nearest))
        if here + 1 < len(points) and there + 1 < len(points) and distance(here + 1, there + 1) > 0:
            then.append(math.log(distance(here + 1, there + 1)))
    return float(np.mean(then) - np.mean(now)) if then else 0.0
