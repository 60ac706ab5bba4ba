"""FCPTS as a method: the learned thresholds themselves are the pruning; surviving weights stay, or learn along."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.methods.base import Criterion, MethodInfo, register


class ThresholdedScore(Criterion):
    """What the thresholds were learned on, compared over each whole matrix: |W|, or |W| times the norm of its input."""

    def __init__(self, score: str) -> None:
        if score == "wanda":
            self.statistics = frozenset({"sum_of_squares"})  # type: ignore[misc]

    def score(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        if not self.statistics:
            return weight.abs()
        assert statistics is not None and statistics.sum_of_squares is not None
        return weight.abs() * statistics.sum_of_squares.sqrt().to(weight.dtype)


@register
@dataclass
class FcptsConfig(PruneConfig):
    """Fast and controllable post-training sparsity (Gong et al., 2024, https://arxiv.org/abs/2405.05808).

    One threshold a layer is learned under the budget (see `allocation: fcpts`, whose keys are all available), then
    every weight below its layer's threshold goes. The transfer to language models is ours.

    Args:
        fcpts_score: what is thresholded: `magnitude` as published, or `wanda`, whose scores are taken once more behind
            the pruned blocks: each matrix keeps its learned share, not the very weights above the learned threshold.
        train_weights: learn the surviving weights together with the thresholds, as the released code does; the
            method then matches logits end to end.
    """

    method: str | None = "fcpts"
    allocation: str = "fcpts"
    fcpts_score: str = "magnitude"
    train_weights: bool = False

    info = MethodInfo(
        name="fcpts",
        title="FCPTS",
        summary="learns one threshold a layer under a global budget; weights stay, or learn along",
        paper="https://arxiv.org/abs/2405.05808",
        paper_title="Fast and Controllable Post-training Sparsity: Learning Optimal Sparsity Allocation with Global "
        "Constraint in Minutes",
        citation="""@inproceedings{gong2024fcpts,
  title={Fast and Controllable Post-training Sparsity: Learning Optimal Sparsity Allocation with Global Constraint in
         Minutes},
  author={Ruihao Gong and Yang Yong and Zining Wang and Jinyang Guo and Xiuying Wei and Yuqing Ma and Xianglong Liu},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2024}
}""",
    )
    criterion_name = "fcpts"

    def make_criterion(self) -> Criterion:
        if self.fcpts_score not in ("magnitude", "wanda"):
            raise BadInputError(
                f"fcpts_score: {self.fcpts_score} is for allocation fcpts with another method; use magnitude or wanda."
            )
        return ThresholdedScore(self.fcpts_score)
