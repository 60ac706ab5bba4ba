"""Erdos-Renyi-Kernel: large matrices get sparser than small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_prune.allocation.base import Allocation
from hf_prune.weights import WeightView


@dataclass(frozen=True)
class ErdosRenyi(Allocation):
    """Density in proportion to (in + out) / (in * out), full layers capped (Evci et al., 2020, section 3)."""

    summary = "density in proportion to (in + out) / (in x out); needs shapes only"
    paper = "https://arxiv.org/abs/1911.11134"

    def densities(self, views: Sequence[WeightView], measures: Mapping[str, Any], sparsity: float) -> list[float]:
        return [sum(view.shape) / (view.shape[0] * view.shape[1]) for view in views]
