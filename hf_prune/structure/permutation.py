"""An order of a block's MLP neurons under which an n:m pattern keeps more: the model's function stays the same.

Channel permutation of RIA (Zhang et al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF), only where an order of
inputs is free: the neurons that `down_proj` consumes, which the layers that make them take along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.engine.statistics import Statistics, check_finite
from hf_prune.patterns import Pattern
from hf_prune.structure.fusion import drop
from hf_prune.structure.groups import MLP, block_shape, find_groups, rewrite
from hf_prune.weights import WeightView, find_blocks, find_views

# Groups of m that an assignment looks at together; its cost grows with their square.
_GROUPS_TOGETHER = 512
_COMPARISONS_AT_ONCE = 2**23

Score = Callable[[Tensor, Statistics | None], Tensor]


class ChannelPermutation:
    """Reorders the neurons of one block after another, once their statistics are known and before anything is pruned.

    Args:
        planned: names of the weights that are pruned; a block is left alone where a layer of its MLP, or a part of one,
            is not among them.
        score: what the criterion compares, float32 [out, in].

    Raises:
        BadInputError: the family is not described.
    """

    def __init__(self, model: nn.Module, planned: set[str], score: Score, pattern: Pattern) -> None:
        assert pattern.n is not None and pattern.m is not None
        self.model = model
        views = find_views(model)
        left_out = {view.layer for view in views if not planned & {view.name, view.layer}}
        self.planned = {view.layer for view in views} - left_out
        self.score = score
        self.pattern = pattern
        self.shape = block_shape(model)
        self.count = len(find_blocks(model)[1])

    def __call__(
        self, block: int, groups: Sequence[tuple[Statistics | None, list[WeightView]]], owners: Sequence[int]
    ) -> None:
        """Reorder a block's neurons on every process, and the sums of the statistics where they are whole.

        Args:
            block: its number; what comes behind the blocks has no neurons.
            groups: the views of the block by the input that they share.
            owners: the process that holds the sums of each group.
        """
        if block == self.count:
            return
        neurons = find_groups(self.model, block, MLP, self.shape)[0]
        layers = {stretch.view.name for stretch in (*neurons.producers, neurons.consumer)}
        if not layers <= self.planned:
            return
        consumer = neurons.consumer.view
        place = next(at for at, (_, views) in enumerate(groups) if consumer.name in {view.name for view in views})
        statistics, owner = groups[place][0], owners[place]
        order = torch.arange(neurons.units, device=consumer.parameter.device)

        def find() -> None:
            if distributed.rank() != owner:
                return
            if statistics is not None:
                check_finite(statistics, consumer.name)
            weight = consumer.read()
            # Others are refused where they are pruned.
            if bool(torch.isfinite(weight).all()):
                order.copy_(spread(self.score(weight, statistics), self.pattern.n, self.pattern.m))  # type: ignore[arg-type]
                if statistics is not None:
                    statistics.reorder(order)

        distributed.all_or_none(find)
        distributed.send_from(order, owner)
        rewrite([neurons], [drop(order)], keep=frozenset())


def spread(scores: Tensor, n: int, m: int) -> Tensor:
    """An order of the columns, int64 [in], under which the n largest of every m consecutive scores add up to more.

    Columns are dealt out by their sums, to and fro, unless they lie better as they are, and then exchanged: one of each
    group at a time goes to where the sum gains most (Hungarian assignment), which never makes it smaller.

    Args:
        scores: float32 [out, in]; m divides in.
    """
    count = scores.shape[1] // m
    dealt = scores.sum(dim=0).argsort(descending=True, stable=True).reshape(m, count)
    dealt[1::2] = dealt[1::2].flip(1)
    given = torch.arange(scores.shape[1], device=scores.device).reshape(count, m).T
    # [member, group]; the better one to begin with.
    dealt = max(dealt, given.contiguous(), key=lambda own: _kept(scores[:, own.T.reshape(-1)], n, m))
    parts = -(-count // _GROUPS_TOGETHER)
    # Where everything stays there is nothing to compete for.
    for member in range(m if n < m else 0):
        for part in range(parts):
            dealt[:, part::parts] = _exchange(scores, dealt[:, part::parts], member, n)
    return dealt.T.reshape(-1)


def _kept(scores: Tensor, n: int, m: int) -> float:
    return float(scores.unflatten(1, (-1, m)).topk(n, dim=2).values.sum(dtype=torch.float32))


def _exchange(scores: Tensor, dealt: Tensor, member: int, n: int) -> Tensor:
    """`dealt` [m, groups] with its row `member` in the best order for the rows that stay."""
    others = torch.cat([dealt[:member], dealt[member + 1 :]])
    # Of the scores that stay in a group the n - 1 largest are kept whatever comes; it competes with the n-th.
    rival = scores[:, others].topk(n, dim=1).values[:, n - 1]
    coming = scores[:, dealt[member]]
    rows, groups = rival.shape
    gains = rival.new_empty(groups, groups)
    for own in torch.arange(groups, device=scores.device).split(max(_COMPARISONS_AT_ONCE // (rows * groups), 1)):
        gains[own] = torch.maximum(rival[:, own, None], coming[:, None]).sum(dim=0)
    _, chosen = linear_sum_assignment(gains.cpu().double().numpy(), maximize=True)
    result = dealt.clone()
    result[member] = dealt[member, torch.from_numpy(chosen).to(dealt.device)]
    return result
