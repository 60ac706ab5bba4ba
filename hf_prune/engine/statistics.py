"""What the engine tells a method about a layer's inputs, and how it is gathered.

Statistics are unnormalised sums over calibration tokens, so that ranks add up. Each chunk (one forward's tokens) is
reduced in float32 with TF32 off and added to a float64 total: chunks are the same whatever the number of ranks, so
totals differ between rank counts by float64 rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_prune.errors import RunError

KINDS = frozenset({"gram", "sum_of_squares", "sum"})
# Column panels of the Gram matrix: only those on and above the diagonal are multiplied, 9/16 of the work at 8.
_PANELS = 8
_PANEL_WIDTH = 128
# An expert that saw fewer tokens is judged by its weights alone. Our choice; other numbers were not tried.
LEAST_TOKENS = 32

Derived = TypeVar("Derived")


class Statistics:
    """Sums over the calibration tokens of one distinct input (q, k and v share one; gate and up share one).

    Attributes:
        count: number of tokens.
        gram: float64 [in, in], sum over tokens of x x^T, or None where no method asked.
        sum_of_squares: float64 [in], or None.
        sum: float64 [in], or None.
        is_white: too few tokens were seen, and the sums are those of one token with independent inputs of mean 0 and
            variance 1: to every criterion and update, magnitude.
    """

    def __init__(self, kinds: Iterable[str], width: int, device: torch.device, least_tokens: int = 0) -> None:
        self.kinds = frozenset(kinds)
        self.least_tokens = least_tokens
        self.is_white = False
        unknown = self.kinds - KINDS
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}")
        self.count = 0
        self._totals: dict[str, Tensor] = {}
        self._derived: dict[Hashable, Any] = {}
        for kind in sorted(self.kinds):
            shape = (width, width) if kind == "gram" else (width,)
            self._totals[kind] = torch.zeros(shape, dtype=accumulation_dtype(device), device=device)

    @classmethod
    def restore(
        cls, totals: dict[str, Tensor], count: int, width: int, device: torch.device, least_tokens: int = 0
    ) -> Statistics:
        """Statistics from sums that `totals` gave before."""
        own = cls(totals.keys(), width, device, least_tokens)
        own.count = count
        own._totals = {kind: total.to(device) for kind, total in totals.items()}
        return own

    def totals(self) -> dict[str, Tensor]:
        """The sums by kind."""
        return self._totals

    @property
    def gram(self) -> Tensor | None:
        return self._totals.get("gram")

    @property
    def sum_of_squares(self) -> Tensor | None:
        if "sum_of_squares" in self._totals:
            return self._totals["sum_of_squares"]
        return self._totals["gram"].diagonal() if "gram" in self._totals else None

    @property
    def sum(self) -> Tensor | None:
        return self._totals.get("sum")

    @property
    def mean(self) -> Tensor | None:
        """float64 [in]: mean input."""
        return self.sum / max(self.count, 1) if self.sum is not None else None

    @property
    def variance(self) -> Tensor | None:
        """float64 [in]: population variance of each input; needs `sum` and `sum_of_squares` or `gram`."""
        if self.mean is None or self.sum_of_squares is None:
            return None
        return (self.sum_of_squares / max(self.count, 1) - self.mean**2).clamp_(min=0)

    def add(self, inputs: Tensor) -> None:
        """Add one chunk of inputs [..., in] of any float dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.count += rows.shape[0]
        if "gram" in self._totals:
            add_gram(self._totals["gram"], rows)
        if "sum_of_squares" in self._totals:
            # Not vector_norm(dim=0), which is ten times slower down the columns.
            self._totals["sum_of_squares"] += rows.square().sum(dim=0)
        if "sum" in self._totals:
            self._totals["sum"] += rows.sum(dim=0)

    def finish(self, reduce: Callable[[Tensor], None]) -> None:
        """Add up over ranks: `reduce` sums a tensor in place. The Gram matrix's lower half is filled afterwards.

        With fewer than `least_tokens` tokens the sums become white, see `is_white`.
        """
        tokens = torch.tensor([self.count], dtype=torch.int64)
        reduce(tokens)
        self.count = int(tokens)
        for total in self._totals.values():
            reduce(total)
        if "gram" in self._totals:
            gram = self._totals["gram"]
            gram.copy_(gram.triu() + gram.triu(1).T)
        if self.count < self.least_tokens:
            self._whiten()

    def _whiten(self) -> None:
        self.is_white, self.count = True, 1
        for kind, total in self._totals.items():
            total.fill_(1.0 if kind == "sum_of_squares" else 0.0)
            if kind == "gram":
                total.fill_diagonal_(1.0)

    @property
    def is_finite(self) -> bool:
        """Whether all sums are; those of a Gram matrix are where its diagonal is."""
        sums = [total for total in (self.sum_of_squares, self.sum) if total is not None]
        return all(bool(torch.isfinite(total).all()) for total in sums)

    def reorder(self, order: Tensor) -> None:
        """Become the statistics of the same inputs in another order, int64 [in]."""
        for kind, total in self._totals.items():
            total.copy_(total[order][:, order] if kind == "gram" else total[order])
        self._derived.clear()

    def release(self) -> None:
        """Drop sums and everything derived from them: a block's statistics end with its solves."""
        self._totals.clear()
        self._derived.clear()

    def derive(self, key: Hashable, function: Callable[[Statistics], Derived]) -> Derived:
        """A quantity computed once for all layers that share this input (a method's factorisation)."""
        if key not in self._derived:
            self._derived[key] = function(self)
        return self._derived[key]


def check_finite(statistics: Statistics, name: str) -> None:
    """Raise RunError, naming the layer, where its inputs overflowed."""
    if not statistics.is_finite:
        raise RunError(f"{name}: its calibration inputs hold NaN or Inf; use dtype bfloat16 or float32.")


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the upper triangle (by panels) of `total` [in, in]; what lies below it is undefined."""
    width = rows.shape[1]
    panel = max(-(-width // _PANELS), _PANEL_WIDTH)
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """What sums over tokens are kept in."""
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64
