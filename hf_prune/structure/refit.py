"""The consumer's best weights for the units that stayed: least squares of its output on calibration text."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(gram: Tensor, damping: float) -> Tensor:
    """A copy of a Gram matrix with `damping` times its mean diagonal added to the diagonal."""
    own = gram.clone()
    mean = float(own.diagonal().mean())
    own.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return own


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
    solution = torch.cholesky_solve(rows @ weight.T.to(gram), torch.linalg.cholesky(rows[:, columns]))
    return solution.T.to(weight.dtype)


def refit_new(weight: Tensor, gram: Tensor, residual: Tensor, damping: float) -> Tensor:
    """The weight that brings inputs which fusing has changed nearest to the dense outputs: W + R (G + damping)^-1.

    Args:
        weight: float32 [out, new in], the fused weight, towards which the damping pulls.
        gram: [new in, new in] of the new inputs, sum over tokens of z z^T.
        residual: [new in, out], sum over tokens of z (y - W z)^T with y the dense output without its bias.
    """
    factor = torch.linalg.cholesky(damped(gram, damping))
    return (weight.to(gram) + torch.cholesky_solve(residual.to(gram), factor).T).to(weight.dtype)
