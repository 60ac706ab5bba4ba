"""The best weights on a given support: least squares of a layer's output, solved by conjugate gradients.

For a layer W [out, in] with inputs X [tokens, in] and G = X^T X + damping, the weights W' that minimise
tr((W' - W) G (W' - W)^T) with W'_ij = 0 off the mask solve one small system for each row. Rows have different masks, so
that factorising each would cost out x in^3 / 3; conjugate gradients solve all rows at once with one product by G a
step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.engine.statistics import Statistics


@dataclass(frozen=True)
class ScaledGram:
    """A damped Gram matrix scaled to a unit diagonal, which is also what conditions it well.

    Attributes:
        matrix: [in, in], S^-1 (X^T X + damping) S^-1; float64, or float32 where a device has none.
        scale: float32 [in], the diagonal S: the root of each input's damped sum of squares.
    """

    matrix: Tensor
    scale: Tensor


def scaled_gram(statistics: Statistics, damping: float) -> ScaledGram:
    """Damp by `damping` times the mean of the diagonal and scale; once for all layers that share an input."""
    return statistics.derive(("scaled gram", damping), lambda own: _scaled_gram(own, damping))


def _scaled_gram(statistics: Statistics, damping: float) -> ScaledGram:
    assert statistics.gram is not None
    matrix = statistics.gram.clone()
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    # Inputs that are always zero everywhere: any damping will do, the layer's output is zero.
    diagonal += damping * mean if mean > 0 else 1.0
    scale = diagonal.sqrt()
    return ScaledGram(matrix.div_(scale).div_(scale[:, None]), scale.float())


def refit(
    weight: Tensor,
    gram: ScaledGram,
    mask: Tensor,
    start: Tensor | None = None,
    *,
    max_steps: int = 100,
    tolerance: float = 1e-4,
) -> Tensor:
    """The weights on `mask` whose outputs are nearest to those of `weight`.

    Args:
        weight: float32 [out, in], the dense layer.
        gram: of its inputs.
        mask: bool [out, in], the support.
        start: float32 [out, in], where to begin; the dense weights on the support unless given.
        max_steps: conjugate gradient steps at most; as many as a row keeps weights reach the exact solution.
        tolerance: stop once the normal equations' residual is this share of their right-hand side (Frobenius norms).

    Returns:
        float32 [out, in], zero off the mask.
    """
    matrix = gram.matrix.float()
    target = weight * gram.scale
    solution = (target if start is None else start * gram.scale) * mask
    residual = ((target - solution) @ matrix).mul_(mask)
    enough = tolerance * float(((target @ matrix) * mask).norm())
    direction = residual.clone()
    squared = residual.square().sum(dim=1, keepdim=True)
    for _ in range(max_steps):
        if float(squared.sum()) <= enough**2:
            break
        image = (direction @ matrix).mul_(mask)
        length = squared / (direction * image).sum(dim=1, keepdim=True).clamp_(min=torch.finfo(image.dtype).tiny)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, squared = squared, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(squared / before.clamp(min=torch.finfo(before.dtype).tiny)).add_(residual)
    return solution / gram.scale
