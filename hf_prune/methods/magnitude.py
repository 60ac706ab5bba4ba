"""Magnitude pruning: drop the weights nearest to zero, compared over each weight matrix. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.methods.base import Criterion, MethodInfo, register


class Magnitude(Criterion):
    """Score |W_ij|, one threshold per weight matrix."""

    def score(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        return weight.abs()


@register
@dataclass
class MagnitudeConfig(PruneConfig):
    """Magnitude pruning (Han et al., 2015, https://arxiv.org/abs/1506.02626), one-shot and per weight matrix.

    The published method retrains after pruning; this is its criterion alone, the usual data-free baseline.
    """

    method: str | None = "magnitude"

    info = MethodInfo(
        name="magnitude",
        title="Magnitude",
        summary="drops the smallest weights of each matrix; needs no data",
        paper="https://arxiv.org/abs/1506.02626",
        paper_title="Learning both Weights and Connections for Efficient Neural Networks",
        citation="""@inproceedings{han2015learning,
  title={Learning both Weights and Connections for Efficient Neural Networks},
  author={Song Han and Jeff Pool and John Tran and William J. Dally},
  booktitle={Advances in Neural Information Processing Systems},
  year={2015}
}""",
    )
    criterion_name = "magnitude"

    def make_criterion(self) -> Criterion:
        return Magnitude()
