"""Wanda: weigh each weight by how much its input is used. No weight update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.methods.base import Criterion, MethodInfo, register


class Wanda(Criterion):
    """Score |W_ij| * ||X_j||_2 (equation 1 of the paper), compared inside each output row."""

    statistics = frozenset({"sum_of_squares"})
    by_row = True

    def score(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        assert statistics is not None and statistics.sum_of_squares is not None
        return weight.abs() * statistics.sum_of_squares.sqrt().to(weight.dtype)


@register
@dataclass
class WandaConfig(PruneConfig):
    """Wanda (Sun et al., 2023, https://arxiv.org/abs/2306.11695), as published: per output row, no update."""

    method: str | None = "wanda"

    info = MethodInfo(
        name="wanda",
        title="Wanda",
        summary="drops the smallest |weight| x input norm of each output row",
        paper="https://arxiv.org/abs/2306.11695",
        paper_title="A Simple and Effective Pruning Approach for Large Language Models",
        citation="""@inproceedings{sun2024simple,
  title={A Simple and Effective Pruning Approach for Large Language Models},
  author={Mingjie Sun and Zhuang Liu and Anna Bair and J. Zico Kolter},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    )
    criterion_name = "wanda"

    def make_criterion(self) -> Criterion:
        return Wanda()
