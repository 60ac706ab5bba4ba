"""The consumer's best weights for the units that stayed: least squares of its output on calibration text."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_prune.errors import RunError

logger = logging.getLogger(__name__)


def damped(gram: Tensor, damping: float) -> Tensor:
    """A copy of a Gram matrix with `damping` times its mean diagonal added to the diagonal."""
    own = gram.clone()
    mean = float(own.diagonal().mean())
    own.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return own


def factor(gram: Tensor) -> Tensor:
    """The lower Cholesky factor; the diagonal is raised, and that is said, where rounding has made it indefinite.

    Raises:
        RunError: no damping up to the diagonal's own mean helps.
    """
    own, mean = gram, float(gram.diagonal().mean())
    for more in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        if more:
            logger.warning("A Gram matrix is not positive definite: raising the damping to %g of its mean", more)
            own = gram.clone()
            own.diagonal().add_(more * mean)
        lower, failed = torch.linalg.cholesky_ex(own)
        if not int(failed):
            return lower
    raise RunError("damping: a Gram matrix stays indefinite whatever is added; the calibration inputs overflow.")


def refit_kept(weight: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """W' = W G[:, K] G[K, K]^-1: what the kept inputs can say of the dense output.

    Args:
        weight: float32 [out, in].
        gram: [in, in], damped: without removal the weight comes back exactly.
        columns: int64 [kept], the inputs K.

    Returns:
        float32 [out, kept].
    """
    rows = gram[columns]
    solution = torch.cholesky_solve(rows @ weight.T.to(gram), factor(rows[:, columns]))
    return solution.T.to(weight.dtype)


def refit_new(weight: Tensor, gram: Tensor, residual: Tensor, damping: float) -> Tensor:
    """The weight that brings inputs which fusing has changed nearest to the dense outputs: W + R (G + damping)^-1.

    Args:
        weight: float32 [out, new in], the fused weight, towards which the damping pulls.
        gram: [new in, new in] of the new inputs, sum over tokens of z z^T.
        residual: [new in, out], sum over tokens of z (y - W z)^T with y the dense output without its bias.
    """
    lower = factor(damped(gram, damping))
    return (weight.to(gram) + torch.cholesky_solve(residual.to(gram), lower).T).to(weight.dtype)
