"""SparseGPT: drop weights column by column and let the columns to their right make up for it.

With H = X X^T / N + damping, U is the upper Cholesky factor of H^-1 (H^-1 = U^T U). Row j of U, from its diagonal on,
is the j-th row of the inverse Hessian that is left once columns 0..j-1 are fixed, divided by the root of its diagonal:
dropping w_j costs w_j^2 / U_jj^2 and changes the columns k > j by -w_j / U_jj * U_jk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError, RunError
from hf_prune.masks import MaskRule
from hf_prune.methods.base import Criterion, MethodInfo, Update, register

logger = logging.getLogger(__name__)
_ATTEMPTS = 6
# Columns updated one by one; wider updates are matrix products. Only speed depends on it.
_PANEL = 16


def inverse_cholesky(statistics: Statistics, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the damped inverse Hessian, once for all layers that share an input.

    Solved in the statistics' own dtype (float64, except on devices that have none). Reversing the order of the inputs
    turns the lower factor of H into an upper one, whose inverse is the factor wanted: one factorisation and one
    triangular inverse instead of two factorisations and an inverse.

    Returns:
        (U float32 [in, in], dead bool [in]): inputs that are always zero are dead; their weights are dropped.

    Raises:
        RunError: H stays indefinite after the damping was raised tenfold five times.
    """
    return statistics.derive(("inverse_cholesky", damping), lambda own: _inverse_cholesky(own, damping))


def _inverse_cholesky(statistics: Statistics, damping: float) -> tuple[Tensor, Tensor]:
    assert statistics.gram is not None
    # These matrices are the peak of the memory: each is freed as soon as the next one stands.
    hessian = statistics.gram.flip(0, 1).div_(max(statistics.count, 1))
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    step = float(diagonal.mean()) * damping
    diagonal += step
    for attempt in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            del hessian, diagonal
            upper = lower.flip(0, 1)
            del lower
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float(), dead.flip(0)
        logger.warning("The Hessian of %d inputs is not positive definite; raising the damping tenfold.", len(hessian))
        diagonal += step * (10 ** (attempt + 1) - 10**attempt)
    raise RunError(
        f"damping: a Hessian of {len(hessian)} inputs stays indefinite up to {damping * 10 ** (_ATTEMPTS - 1):g}; use "
        "more calibration samples or a larger damping."
    )


class SparseGPT(Criterion, Update):
    """Criterion and update in one: with its own criterion it selects per block of columns, after earlier updates."""

    statistics = frozenset({"gram"})

    def __init__(self, block_size: int, damping: float) -> None:
        self.block_size = block_size
        self.damping = damping

    def score(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        """w^2 / U_jj^2 of the untouched weights, one threshold per matrix (our extension: used without the update)."""
        assert statistics is not None
        factor, dead = inverse_cholesky(statistics, self.damping)
        return (weight / factor.diagonal()).square().masked_fill_(dead, 0)

    def flops(self, rows: int, columns: int) -> float:
        # Column by column is several times slower than the products that are counted elsewhere.
        return 6.0 * rows * columns**2

    def solve(
        self, weight: Tensor, statistics: Statistics | None, rule: MaskRule, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert statistics is not None
        factor, dead = inverse_cholesky(statistics, self.damping)
        # Columns are the inner loop: transposed, each of them is contiguous.
        columns = weight.T.contiguous()
        columns[dead] = 0
        keep = mask.T.contiguous() if mask is not None else torch.ones_like(columns, dtype=torch.bool)
        group = rule.pattern.m or 1
        # A block and a panel must hold whole groups of m.
        width, panel = (max(size // group, 1) * group for size in (self.block_size, _PANEL))
        kept = 0
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            if mask is None and group == 1:
                cost = (columns[start:stop] / factor.diagonal()[start:stop, None]).square()
                keep[start:stop] = rule.select(cost.T.contiguous(), start=start, kept=kept, width=len(columns)).T
                kept += int(keep[start:stop].sum())
            errors = torch.empty_like(columns[start:stop])
            for left in range(start, stop, panel):
                right = min(left + panel, stop)
                own = slice(left, right)
                late = rule if mask is None and group > 1 else None
                changed = errors[left - start : right - start]
                _sweep(columns[own], keep[own], factor[own, own], late, changed)
                columns[right:stop].addmm_(factor[own, right:stop].T, changed, alpha=-1)
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        columns.mul_(keep)
        return columns.T.contiguous(), keep.T.contiguous()


def _sweep(columns: Tensor, keep: Tensor, factor: Tensor, late: MaskRule | None, errors: Tensor) -> None:
    """Drop column after column of a panel [width, out] in place and write their scaled errors [width, out].

    `late` selects n:m as late as possible, with the updates of every earlier column in.
    """
    diagonal = factor.diagonal()
    scale = ~keep / diagonal[:, None]
    for column in range(len(columns)):
        if late is not None and late.pattern.m and column % late.pattern.m == 0:
            ahead = slice(column, column + late.pattern.m)
            keep[ahead] = late.select((columns[ahead] / diagonal[ahead, None]).square().T.contiguous()).T
            scale[ahead] = ~keep[ahead] / diagonal[ahead, None]
        torch.mul(columns[column], scale[column], out=errors[column])
        columns[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)


@register
@dataclass
class SparseGPTConfig(PruneConfig):
    """SparseGPT (Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774), as published.

    Args:
        block_size: columns whose mask is selected together, over all rows (128 in the paper).
        damping: added to the Hessian's diagonal, as a share of its mean (0.01 in the paper).
    """

    method: str | None = "sparsegpt"
    block_size: int = 128
    damping: float = 0.01

    info = MethodInfo(
        name="sparsegpt",
        title="SparseGPT",
        summary="drops by second-order saliency and updates the survivors column by column",
        paper="https://arxiv.org/abs/2301.00774",
        paper_title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        citation="""@inproceedings{frantar2023sparsegpt,
  title={SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot},
  author={Elias Frantar and Dan Alistarh},
  booktitle={International Conference on Machine Learning},
  year={2023}
}""",
    )
    criterion_name = "sparsegpt"
    update_name = "sparsegpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise BadInputError(f"block_size: {self.block_size} is too small; 128 is the paper's.")
        if self.damping <= 0:
            raise BadInputError(f"damping: {self.damping} must be above 0; 0.01 is the paper's.")

    def make_criterion(self) -> Criterion:
        return SparseGPT(self.block_size, self.damping)

    def make_update(self) -> Update:
        return SparseGPT(self.block_size, self.damping)
