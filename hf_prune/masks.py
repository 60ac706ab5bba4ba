"""Which weights stay: selection under a density, a pattern and a floor, with a deterministic tie rule.

Dequantised weights carry many equal magnitudes, so masks are chosen by count, never by a threshold alone: of equal
scores the one that comes first (row by row) is kept. The same scores give the same mask on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from hf_prune.patterns import UNSTRUCTURED, Pattern

# Float noise in `1 - sparsity` must not change a count: 0.7 * 10 is 7.000000000000001.
_ROUNDING = 1e-9
_GROUPS_AT_ONCE = 2**14


@dataclass(frozen=True)
class MaskRule:
    """How much of a weight matrix is kept, and in which pattern.

    Args:
        density: share of weights kept, in (0, 1].
        pattern: unstructured, or n:m along the inputs (then density is n / m).
        min_keep_ratio: every output row keeps at least this share of the inputs it is asked about.
    """

    density: float
    pattern: Pattern = UNSTRUCTURED
    min_keep_ratio: float = 0.0

    def select(self, scores: Tensor, by_row: bool = False, start: int = 0, kept: int = 0, width: int = 0) -> Tensor:
        """Keep the highest scores.

        Args:
            scores: [out, in], float32; a whole matrix or a block of its columns.
            by_row: compare inside each output row rather than over the whole matrix.
            start: the block's first column, and
            kept: what the blocks before it have kept, so that blocks add up to what the whole matrix would keep, and
            width: the whole matrix's columns (those of `scores` unless given), so that room is left for later floors.

        Returns:
            bool [out, in], True where a weight is kept.
        """
        if self.pattern.n is not None and self.pattern.m is not None:
            return select_n_of_m(scores, self.pattern.n, self.pattern.m)
        rows, columns = scores.shape
        if by_row:
            dropped = math.floor(columns * (1 - self.density) + _ROUNDING)
            return select_largest(scores, columns - dropped)
        stop = start + columns
        width = width or stop
        ahead = rows * (self._floor(width) - self._floor(stop))
        wanted = min(self._kept(rows * stop), self._kept(rows * width) - ahead) - kept
        floor = self._floor(stop) - self._floor(start)
        if not floor:
            return select_largest(scores.reshape(1, -1), wanted).reshape(rows, columns)
        held = select_largest(scores, floor)
        rest = scores.masked_fill(held, -torch.inf).reshape(1, -1)
        return held | select_largest(rest, max(wanted - rows * floor, 0)).reshape(rows, columns)

    def _kept(self, weights: int) -> int:
        return weights - round(weights * (1 - self.density))

    def _floor(self, columns: int) -> int:
        return row_floor(columns, self.min_keep_ratio)


def row_floor(columns: int, min_keep_ratio: float) -> int:
    """Weights that every row of so many inputs keeps at least: whole ones."""
    return math.ceil(columns * min_keep_ratio - _ROUNDING)


def select_largest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest of each row of `scores` [rows, columns]; ties go to the lower column index."""
    columns = scores.shape[1]
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= columns:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, columns - count)
    mask = scores >= threshold
    if int(mask.sum()) == count * len(scores):
        return mask
    above = scores > threshold
    tied = mask & ~above
    return above | (tied & (tied.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True)))


def _kth_smallest(scores: Tensor, index: int) -> Tensor:
    """The value at 0-based rank `index` of each row, [rows, 1]."""
    if scores.device.type == "cpu":
        # numpy's introselect is several times faster here than torch.topk or torch.kthvalue on a CPU.
        return torch.from_numpy(numpy.partition(scores.numpy(), index, axis=1)[:, index : index + 1].copy())
    return scores.kthvalue(index + 1, dim=1, keepdim=True).values


def select_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the `n` largest of every `m` consecutive inputs; ties go to the earlier input.

    A weight's rank in its group is the number of group members that beat it, which needs no sort for small m.
    """
    earlier = torch.ones(m, m, dtype=torch.bool, device=scores.device).tril(-1)[:, :, None]
    parts = []
    # Comparisons take m bytes a weight: groups are taken in parts that stay in the cache.
    for groups in scores.reshape(-1, m).split(_GROUPS_AT_ONCE):
        # Members lead, [m, groups]: every comparison and sum then runs over contiguous memory.
        members = groups.T.contiguous()
        own, other = members[:, None], members[None]
        beaten = torch.where(earlier, other >= own, other > own).sum(dim=1, dtype=torch.uint8)
        parts.append((beaten < n).T)
    return torch.cat(parts).reshape(scores.shape)
