"""ADMM: find the support of a layer's sparse least squares problem, then refit the weights on it exactly.

The problem is min ||X W'^T - X W^T||^2 with a limited number of nonzero weights. Alternating directions split it: B
minimises the output error, D holds the wanted number of nonzeros, V pulls them together, rho says how hard. In inputs
scaled to a unit Gram diagonal, with H = Q diag(lambda) Q^T and everything written [out, in]:

    B <- (W H - V + rho D) (H + rho I)^-1        two products with Q, or two triangular solves
    D <- largest entries of B + V / rho          over the whole matrix, or n of every m
    V <- V + rho (B - D)

Rho grows while the support still changes, so that B and D agree in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.least_squares import ScaledGram, refit, scaled_gram
from hf_prune.masks import MaskRule
from hf_prune.methods.base import MethodInfo, Update, register

RHO = 0.1
# Every third iteration rho grows by the first factor whose share of changed support is exceeded (the authors' code).
SCHEDULE_EVERY = 3
SCHEDULE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# The search has begun once this share of the support has changed.
START = 0.005
# A support that so small a rho does not move is final: it holds everything or nothing, say.
LEAST_RHO = 1e-6
# From this iteration on, so small a share of changed support ends the search.
SETTLED_AFTER = 30
SETTLED = 3e-4
# Conjugate gradient steps of the refit; the search has already come close (10 in the paper).
REFIT_STEPS = 10


class Spectrum:
    """(H + rho I)^-1 for any rho from one eigendecomposition, in float64, of a scaled Gram matrix."""

    def __init__(self, gram: ScaledGram) -> None:
        values, vectors = torch.linalg.eigh(gram.matrix)
        self.vectors = vectors.float()
        self.values = values.float().clamp_(min=0)

    def solve(self, right: Tensor, rho: float) -> Tensor:
        """right (H + rho I)^-1, float32 [out, in]."""
        return (right @ self.vectors).div_(self.values + rho) @ self.vectors.T


class Factor:
    """(H + rho I)^-1 from a Cholesky factor for each rho, made in float64 and used in float32.

    One costs a small part of an eigendecomposition, and a search of few iterations meets few values of rho.
    """

    def __init__(self, gram: ScaledGram) -> None:
        self.matrix = gram.matrix
        self.latest: tuple[float, Tensor] | None = None

    def solve(self, right: Tensor, rho: float) -> Tensor:
        """right (H + rho I)^-1, float32 [out, in]."""
        if self.latest is None or self.latest[0] != rho:
            damped = self.matrix.clone()
            damped.diagonal().add_(rho)
            self.latest = rho, torch.linalg.cholesky(damped).float()
        return torch.cholesky_solve(right.T, self.latest[1]).T


FACTORIZATIONS: dict[str, Callable[[ScaledGram], Spectrum | Factor]] = {"eigen": Spectrum, "cholesky": Factor}


class Admm(Update):
    """Selects its own support; a support that another criterion chose is only refitted."""

    statistics = frozenset({"gram"})

    def __init__(self, iterations: int, growth: float, damping: float, factorization: str) -> None:
        self.iterations = iterations
        self.growth = growth
        self.damping = damping
        self.factorization = factorization

    def flops(self, rows: int, columns: int) -> float:
        return (4.0 * self.iterations + 2.0 * REFIT_STEPS) * rows * columns**2 + 20.0 * columns**3

    def solve(
        self, weight: Tensor, statistics: Statistics | None, rule: MaskRule, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert statistics is not None
        if mask is not None:
            return refit(weight, scaled_gram(statistics, self.damping), mask), mask
        gram = scaled_gram(statistics, self.damping)
        # Once for all layers that share an input.
        inverse = statistics.derive(
            (self.factorization, self.damping), lambda _: FACTORIZATIONS[self.factorization](gram)
        )
        near = self.search(weight * gram.scale, gram, inverse, rule)
        mask = rule.select(near.abs())
        return refit(weight, gram, mask, near / gram.scale, max_steps=REFIT_STEPS), mask

    def search(self, target: Tensor, gram: ScaledGram, inverse: Spectrum | Factor, rule: MaskRule) -> Tensor:
        """B after the last iteration: float32 [out, in], in the scaled inputs, as `target` is."""
        product = target @ gram.matrix.float()
        kept = rule.select(target.abs())
        sparse = target * kept
        dual = torch.zeros_like(target)
        smooth, rho, started = target, RHO, False
        before = first = kept
        for iteration in range(1, self.iterations + 1):
            smooth = inverse.solve((rho * sparse).sub_(dual).add_(product), rho)
            wanted = torch.add(smooth, dual, alpha=1 / rho)
            kept = rule.select(wanted.abs())
            sparse = wanted * kept
            # V + rho (B - D), with rho B + V at hand as rho times what was selected from.
            dual = (wanted - sparse).mul_(rho)
            if iteration % SCHEDULE_EVERY:
                continue
            changed = float((kept != before).sum()) / max(int(kept.sum()), 1)
            before = kept
            started = started or changed > START
            if started:
                if changed == 0 or (iteration > SETTLED_AFTER and changed < SETTLED):
                    break
                rho *= next(factor for share, factor in SCHEDULE if changed > share) ** self.growth
                continue
            if rho < LEAST_RHO:
                break
            # So large a rho nails the first support down: begin again with a smaller one.
            rho /= 5
            if changed:
                before = first
                sparse, dual = target * first, torch.zeros_like(target)
        return smooth


@register
@dataclass
class AdmmConfig(PruneConfig):
    """ADMM pruning as in ALPS (Meng et al., 2024, https://arxiv.org/abs/2406.07831): support, then refit.

    The published method is `iterations: 300` with `rho_growth: 1`. Fewer iterations with a faster growing rho are our
    extension: a support of nearly the same error at a fraction of the time.

    Args:
        iterations: of the search at most; it ends earlier once the support has settled.
        rho_growth: exponent on the paper's growth factors of rho; larger settles in fewer iterations.
        damping: added to the Gram matrix's diagonal, as a share of its mean (0.01 in the paper).
        factorization: `eigen`, one eigendecomposition serves every rho (the paper's); `cholesky`, a factor for each
            rho, quicker where iterations are few.
    """

    method: str | None = "admm"
    iterations: int = 300
    rho_growth: float = 1.0
    damping: float = 0.01
    factorization: str = "eigen"

    info = MethodInfo(
        name="admm",
        title="ADMM (ALPS)",
        summary="finds the support by alternating directions, then refits the survivors by least squares",
        paper="https://arxiv.org/abs/2406.07831",
        paper_title="ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        citation="""@inproceedings{meng2024alps,
  title={{ALPS}: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models},
  author={Xiang Meng and Kayhan Behdin and Haoyue Wang and Rahul Mazumder},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
    )
    criterion_name = "admm"
    update_name = "admm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise BadInputError(f"iterations: {self.iterations} is too few; 20 are quick, 300 the paper's.")
        if self.rho_growth <= 0:
            raise BadInputError(f"rho_growth: {self.rho_growth} must be above 0; 1 is the paper's.")
        if self.damping <= 0:
            raise BadInputError(f"damping: {self.damping} must be above 0; 0.01 is the paper's.")

        if self.factorization not in FACTORIZATIONS:
            raise BadInputError(
                f"factorization: {self.factorization!r} is unknown; choose {', '.join(FACTORIZATIONS)}."
            )

    def make_update(self) -> Update:
        return Admm(self.iterations, self.rho_growth, self.damping, self.factorization)
