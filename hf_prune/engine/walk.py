"""The walk: block by block, observe inputs, add up over processes, solve, hand the pruned block's outputs on.

Cost over the calibration set: one forward to observe each block (left as soon as the last layer's input is seen) and
one to hand its pruned outputs on, none at all for methods without statistics. A block's training comes on top.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.engine.block_training import BlockTask, train_block
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.offload import in_turn, keep
from hf_prune.engine.results import BlockOutcome, ViewResult, WalkResult
from hf_prune.engine.statistics import Statistics, check_finite
from hf_prune.engine.statistics_cache import StatisticsCache
from hf_prune.engine.stream import Stream
from hf_prune.engine.walk_checkpoint import WalkCheckpoint
from hf_prune.errors import BadInputError, RunError
from hf_prune.masks import MaskRule
from hf_prune.plan import Plan
from hf_prune.progress import progress
from hf_prune.weights import WeightView, find_named

logger = logging.getLogger(__name__)


class WeightSolver(Protocol):
    """What the walk needs of a method."""

    @property
    def statistics(self) -> frozenset[str]: ...

    def solve(self, weight: Tensor, statistics: Statistics | None, rule: MaskRule) -> tuple[Tensor, Tensor]: ...


class Reorder(Protocol):
    """Puts a block's units in another order before anything of it is pruned."""

    def __call__(
        self, block: int, groups: Sequence[tuple[Statistics | None, list[WeightView]]], owners: Sequence[int]
    ) -> None: ...


class BlockUpdater(Protocol):
    """What the walk needs of a block reconstruction."""

    @property
    def reconstruct_target(self) -> str: ...

    @property
    def reconstruct_batch_size(self) -> int: ...

    @property
    def reconstruct_held_out(self) -> float: ...

    def update_block(self, task: BlockTask) -> BlockOutcome: ...


def walk(
    model: nn.Module,
    plan: Plan,
    solver: WeightSolver,
    input_ids: Tensor | None,
    *,
    row_scales: Mapping[str, Tensor] | None = None,
    reconstruction: BlockUpdater | None = None,
    reorder: Reorder | None = None,
    propagate: bool = True,
    statistics_folder: Path | None = None,
    checkpoint: WalkCheckpoint | None = None,
) -> WalkResult:
    """Prune `model` in place.

    Args:
        input_ids: int64 [samples, tokens], calibration windows without padding, the same on every process; None for
            a solver that declares no statistics.
        row_scales: float32 [out] by view: what its rows are multiplied by while it is solved, so that errors of its
            outputs count by how much they matter; each row as it is where it is missing.
        reconstruction: trains each block after its solves.
        reorder: sees each block's statistics before its solves.
        propagate: hand pruned outputs on; False lets every block see the dense model's hidden states.
        statistics_folder: keeps the statistics for further runs on the same model and windows; used only where
            nothing is propagated.
        checkpoint: where the walk is kept between blocks, and gone on with; a solver without statistics needs none.

    Raises:
        BadInputError: calibration is missing or cannot be shared out over the processes; a weight is not finite.
        RunError: a layer saw no tokens, or a statistic overflowed.
        Stopped: the checkpoint was asked to stop.
    """
    views = _views_of(model, plan)
    rules = {view.name: plan.rule(view) for view in plan.views}
    result = WalkResult()
    scales = row_scales or {}
    if not solver.statistics and reconstruction is None:
        for index in in_turn(model, progress(sorted({view.block for view in views}), "pruning")):
            own = [view for view in views if view.block == index]
            if reorder is not None:
                reorder(index, [(None, own)], [0])
            result.views += [_prune(view, None, solver, rules[view.name], scales.get(view.name)) for view in own]
            keep(model, index)
        return _in_order(result, plan)
    if input_ids is None:
        raise BadInputError("dataset_name: this method needs calibration text; name a dataset or pass input_ids.")
    with BlockRunner(model) as runner, _full_float32(), checkpoint or nullcontext():
        stream = Stream(runner, input_ids)
        dense = Stream(runner, input_ids) if reconstruction and reconstruction.reconstruct_target == "model" else None
        streams = [stream] if dense is None else [stream, dense]
        last = max(view.block for view in views)
        cache = None
        if statistics_folder is not None and not propagate and solver.statistics:
            # Named after the dense model: before anything is restored.
            cache = StatisticsCache(statistics_folder, model, input_ids, views, solver.statistics)
        first = checkpoint.restore(runner, streams, result, {view.block for view in views}) if checkpoint else 0
        if cache is not None and cache.complete:
            # Nothing goes through the blocks, and nothing is kept as the inputs of one that it does not belong to.
            stream.hidden = [None] * len(stream.chunks)
        elif 0 < first <= last and stream.hidden[0] is None:
            raise BadInputError(
                "statistics_folder: the statistics by which this unfinished run was going are no longer there; put "
                "them back, or throw the run away with restart: true."
            )
        for index in in_turn(model, progress(range(first, last + 1), "pruning blocks", total=last + 1 - first)):
            own = [view for view in views if view.block == index]
            if cache is not None and cache.complete:
                result.views += _solve(index, cache.load(index), solver, rules, scales, reorder) if own else []
            else:
                inside = index < len(runner.blocks)
                # The dense block's outputs on the pruned prefix come with the observation for one layer's product more.
                wanted = inside and ((reconstruction is not None and dense is None) or not propagate)
                groups, outputs = stream.observe(index, own, solver.statistics, outputs=wanted) if own else ([], None)
                if cache is not None and own:
                    cache.save(index, groups)
                if dense is not None and inside:
                    dense.advance(index)
                    outputs = dense.hidden
                if own:
                    solved = _solve(index, groups, solver, rules, scales, reorder)
                    if reconstruction is not None and inside:
                        assert outputs is not None
                        changes = {view.name: view.change for view in solved}
                        result.reconstruction[index] = train_block(
                            stream, index, [(view, changes[view.name]) for view in own], outputs, reconstruction
                        )
                        kept = {view.name: view.count_nonzero() for view in own}
                        # The errors were those of the solve.
                        solved = [replace(view, kept=kept[view.name], error=None) for view in solved]
                    result.views += solved
                if index < last:
                    stream.advance(index, None if propagate else outputs)
            if own:
                keep(model, index)
            if checkpoint:
                checkpoint.save(index)
        if cache is not None:
            cache.finish()
        result.forward_passes = stream.forward_passes + (dense.forward_passes if dense else 0.0)
    return _in_order(result, plan)


def _in_order(result: WalkResult, plan: Plan) -> WalkResult:
    order = {view.name: place for place, view in enumerate(plan.views)}
    result.views.sort(key=lambda view: order[view.name])
    return result


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in the statistics and solves, whatever the user's own training code has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _views_of(model: nn.Module, plan: Plan) -> list[WeightView]:
    """The live views of a plan, which must fit the model."""
    found = {view.name: view for view in find_named(model, [planned.name for planned in plan.views])}
    for planned in plan.views:
        if planned.name not in found or found[planned.name].shape != tuple(planned.shape):
            raise BadInputError(
                f"allocation: the plan's {planned.name} {list(planned.shape)} is not in this model; plan it anew."
            )
    return [found[planned.name] for planned in plan.views]


def _solve(
    block: int,
    groups: list[tuple[Statistics, list[WeightView]]],
    solver: WeightSolver,
    rules: dict[str, MaskRule],
    scales: Mapping[str, Tensor],
    reorder: Reorder | None,
) -> list[ViewResult]:
    """Solve each group on one process and hand the weights out, so that all processes hold the same bits."""
    owners = _assign([sum(view.stored.numel() for view in members) * members[0].shape[1] for _, members in groups])
    # All sums first: an owner that solves before it joins the next reduction would keep the others waiting.
    for (statistics, _), owner in zip(groups, owners, strict=True):
        statistics.finish(lambda tensor, owner=owner: distributed.sum_at(tensor, owner))  # type: ignore[misc]
        if owner != distributed.rank():
            statistics.release()
    if reorder is not None:
        reorder(block, groups, owners)

    def solve_own() -> list[ViewResult]:
        results: list[ViewResult] = []
        for (statistics, members), owner in zip(groups, owners, strict=True):
            if owner == distributed.rank():
                check_finite(statistics, members[0].name)
                results += [
                    _prune(view, statistics, solver, rules[view.name], scales.get(view.name)) for view in members
                ]
                statistics.release()
        return results

    results = distributed.all_or_none(solve_own)
    for (_, members), owner in zip(groups, owners, strict=True):
        for view in members:
            distributed.send_from(view.stored, owner)
    return [result for own in results for result in own]


def _assign(costs: Sequence[float]) -> list[int]:
    """Greedy bin packing: the dearest group first, each to the process with the least work so far."""
    load = [0.0] * distributed.world_size()
    owners = [0] * len(costs)
    for group in sorted(range(len(costs)), key=lambda group: -costs[group]):
        owners[group] = load.index(min(load))
        load[owners[group]] += costs[group]
    return owners


def _prune(
    view: WeightView, statistics: Statistics | None, solver: WeightSolver, rule: MaskRule, row_scale: Tensor | None
) -> ViewResult:
    """Solve one weight matrix and write it back."""
    dense = view.read()
    if not bool(torch.isfinite(dense).all()):
        raise BadInputError(f"{view.name}: the weights hold NaN or Inf; the checkpoint is damaged, get it again.")
    zeros_before = dense.numel() - view.count_nonzero()
    if row_scale is None or rule.pattern.n is not None:
        # An n:m pattern compares weights inside a row alone.
        weight, mask = solver.solve(dense, statistics, rule)
    else:
        scaled = dense * row_scale[:, None]
        weight, mask = solver.solve(scaled, statistics, rule)
        # What was not changed stays as it was, to the bit.
        weight = torch.where(weight == scaled, dense, weight / row_scale[:, None])
    if not bool(torch.isfinite(weight).all()):
        raise RunError(f"{view.name}: pruning gave NaN or Inf; the calibration inputs overflow, use dtype float32.")
    weight = weight * mask
    view.write(weight)
    error = None
    scarce = statistics is not None and statistics.is_white
    if statistics is not None and statistics.gram is not None and not scarce:
        gram = statistics.gram
        error = _relative_error(weight - dense, dense, statistics.derive("float32 gram", lambda _: gram.float()))
        change = math.sqrt(error * float(dense.square().mean()))
    else:
        change = math.sqrt(float((weight - dense).square().mean()))
    return ViewResult(view.name, view.count_nonzero(), zeros_before, error, change, scarce)


def _relative_error(change: Tensor, dense: Tensor, gram: Tensor) -> float:
    """tr(D G D^T) / tr(W G W^T) with D the change: the squared output error over the squared output."""
    numerator = float(((change @ gram) * change).sum())
    denominator = float(((dense @ gram) * dense).sum())
    return max(numerator, 0.0) / denominator if denominator > 0 else 0.0
