"""`reconstruct: linear`: the least squares weights of each matrix on whatever support it was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.least_squares import refit, scaled_gram


@dataclass(frozen=True)
class LinearReconstruction:
    """min ||X W'^T - X W^T||^2 over the surviving weights; the closed form behind every layer-wise method.

    Args:
        reconstruct_steps: conjugate gradient steps at most.
        reconstruct_damping: added to the Gram matrix's diagonal, as a share of its mean.
    """

    reconstruct_steps: int = 100
    reconstruct_damping: float = 0.01

    summary: ClassVar[str] = "least squares refit of each matrix on its support"
    paper: ClassVar[str | None] = None
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if self.reconstruct_steps < 1:
            raise BadInputError(f"reconstruct_steps: {self.reconstruct_steps} is too few; use 1 or more.")
        if self.reconstruct_damping <= 0:
            raise BadInputError(f"reconstruct_damping: {self.reconstruct_damping} must be above 0; 0.01 is usual.")

    def refit(self, dense: Tensor, weight: Tensor, mask: Tensor, statistics: Statistics | None) -> Tensor:
        """float32 [out, in] on `mask`; begins at `weight`, what the update has made of it."""
        assert statistics is not None
        gram = scaled_gram(statistics, self.reconstruct_damping)
        return refit(dense, gram, mask, weight, max_steps=self.reconstruct_steps)
