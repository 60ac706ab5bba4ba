"""AlphaPruning: blocks whose weights have a heavier spectral tail keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from hf_prune.allocation.base import Allocation, by_block
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.weights import WeightView


def hill_exponent(weight: Tensor) -> float:
    """Hill's estimate of the power law exponent of W W^T's upper half of eigenvalues (PL_Alpha_Hill).

    With eigenvalues ascending and k = n / 2: 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k}).
    """
    small = weight if weight.shape[0] <= weight.shape[1] else weight.T
    values = torch.linalg.eigvalsh(small.double() @ small.double().T if small.device.type != "mps" else small @ small.T)
    values = values.clamp_(min=torch.finfo(torch.float32).tiny)
    tail = max(len(values) // 2, 1)
    spread = (values[-tail:].log() - values[max(len(values) - tail - 1, 0)].log()).sum()
    return 1 + tail / max(float(spread), 1e-12)


@dataclass(frozen=True)
class AlphaPruning(Allocation):
    """AlphaPruning (Lu et al., 2024, https://arxiv.org/abs/2410.10912), one density a block; needs weights, no data.

    The mean Hill exponent of a block's matrices is mapped linearly to [1 - alpha_range, 1 + alpha_range] and scaled so
    that the mean sparsity is the one wanted: heavy tails (small exponents) are read as well trained and pruned less.

    Args:
        alpha_range: epsilon in the paper (0.3).
    """

    alpha_range: float = 0.3

    needs_weights = True
    summary = "blocks with a heavier spectral tail keep more"
    paper = "https://arxiv.org/abs/2410.10912"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_range < 1:
            raise BadInputError(f"alpha_range: {self.alpha_range} is outside [0, 1); 0.3 is the paper's.")

    def measure(self, weight: Tensor, statistics: Statistics | None) -> float:
        return hill_exponent(weight)

    def densities(self, views: Sequence[WeightView], measures: Mapping[str, float], sparsity: float) -> list[float]:
        blocks: dict[int, list[float]] = {}
        sizes: dict[int, int] = {}
        for view in views:
            blocks.setdefault(view.block, []).append(measures[view.name])
            sizes[view.block] = sizes.get(view.block, 0) + view.shape[0] * view.shape[1]
        exponents = numpy.array([numpy.mean(own) for own in blocks.values()])
        numel = numpy.array([sizes[block] for block in blocks], dtype=float)
        spread = exponents.max() - exponents.min()
        place = (exponents - exponents.min()) / spread if spread > 0 else exponents * 0 + 0.5
        mapped = 1 - self.alpha_range + 2 * self.alpha_range * place
        sparsities = mapped * sparsity * numel.sum() / (mapped * numel).sum()
        return by_block(views, {block: 1 - float(value) for block, value in zip(blocks, sparsities, strict=True)})
