"""RIA: weigh each weight by its share of its row and of its column, and by how much its input is used. No update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.methods.base import Criterion, MethodInfo, register


@dataclass(frozen=True)
class RelativeImportance(Criterion):
    """Score (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^power, compared over the whole matrix."""

    power: float = 0.5

    statistics = frozenset({"sum_of_squares"})

    def score(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        assert statistics is not None and statistics.sum_of_squares is not None
        size = weight.abs()
        # A row or column of zeros has no shares.
        relative = size / _sums(size, 0) + size / _sums(size, 1)
        return relative * statistics.sum_of_squares.pow(self.power / 2).to(weight.dtype)


def _sums(size: Tensor, dimension: int) -> Tensor:
    total = size.sum(dim=dimension, keepdim=True)
    return total.masked_fill_(total == 0, 1.0)


@register
@dataclass
class RIAConfig(PruneConfig):
    """RIA (Zhang et al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF), its criterion as published.

    The paper's channel permutation for n:m patterns is `channel_permutation: true`, which every criterion can take.

    Args:
        activation_power: exponent of the inputs' norms, 0 or more; the paper's 0.5.
    """

    method: str | None = "ria"
    activation_power: float = 0.5

    info = MethodInfo(
        name="ria",
        title="RIA",
        summary="drops the smallest shares of row and column x root of the input norm",
        paper="https://openreview.net/forum?id=Tr0lPx9woF",
        paper_title="Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        citation="""@inproceedings{zhang2024plugandplay,
  title={Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models},
  author={Yingtao Zhang and Haoli Bai and Haokun Lin and Jialin Zhao and Lu Hou and Carlo Vittorio Cannistraci},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    )
    criterion_name = "ria"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.activation_power < float("inf"):
            raise BadInputError(f"activation_power: {self.activation_power} must be 0 or more; the paper has 0.5.")

    def make_criterion(self) -> Criterion:
        return RelativeImportance(self.activation_power)
