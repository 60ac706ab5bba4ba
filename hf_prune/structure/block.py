"""One block's turn in the structured walk: its units decided, taken out, and what consumes them fitted again."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.statistics import Statistics, accumulation_dtype, add_gram, check_finite
from hf_prune.engine.stream import Stream
from hf_prune.structure.budget import Structure
from hf_prune.structure.fusion import Fusion, drop
from hf_prune.structure.groups import ATTENTION, HEADS, MLP, Group, Shape, find_groups, pad_units, rewrite, set_weight
from hf_prune.structure.importance import Evidence
from hf_prune.structure.reduction import Reducer, consumer_columns
from hf_prune.structure.refit import damped, refit_kept, refit_new
from hf_prune.structure.results import ReduceResult
from hf_prune.structure.stock import set_remembered, set_sizes
from hf_prune.structure.transport import TOLERANCE
from hf_prune.weights import WeightView, find_views

logger = logging.getLogger(__name__)


@dataclass
class BlockReduction:
    """One block's turn; `measures` its consumers' output errors where it is trained afterwards; `scores` of a file."""

    runner: BlockRunner
    stream: Stream | None
    index: int
    reducer: Reducer
    gradients: dict[str, Tensor] | None
    result: ReduceResult
    measures: bool
    scores: dict[str, Tensor] | None = None
    error: float = 0.0

    def trained(self) -> list[tuple[WeightView, float]]:
        """The block's weights, each with how far a step may move it: as in a walk, by its consumer's output error."""
        own = [view for view in find_views(self.runner.model, whole=True) if view.block == self.index]
        return [(view, math.sqrt(self.error * float(view.read().square().mean()))) for view in own]

    def reduce(self, structure: Structure) -> list[float]:
        """Bring the block to its planned sizes; the share of fused units of each kind."""
        shares, shape = [], structure.before
        for kind, count in steps(structure, self.index):
            shares.append(self._step(kind, shape, count))
            shape = _with(shape, kind, count)
        self._pad(structure, shape)
        return shares

    def resize(self, structure: Structure) -> None:
        """Bring the block to its planned sizes whatever becomes of its weights, which are read from a file then."""
        shape = structure.before
        for kind, count in steps(structure, self.index):
            groups = find_groups(self.runner.model, self.index, kind, shape)
            some = drop(torch.arange(count, device=self.runner.device))
            rewrite(groups, [some] * len(groups))
            shape = _with(shape, kind, count)
            self._remember(shape)
        self._pad(structure, shape)

    def _pad(self, structure: Structure, shape: Shape) -> None:
        if _width(structure, self.index) < structure.after.width:
            pad_units(find_groups(self.runner.model, self.index, MLP, shape)[0], structure.after.width)

    def _step(self, kind: str, shape: Shape, count: int) -> float:
        """Reduce one kind of unit; the share of new units that several old ones went into."""
        groups = find_groups(self.runner.model, self.index, kind, shape)
        view = groups[0].consumer.view
        statistics = self._observe(groups) if self.reducer.statistics else None
        before = self._outputs(view) if self.measures else None
        start = perf_counter()

        def decide() -> list[Fusion]:
            # Once: processes must not disagree over a tie.
            if distributed.rank():
                return []
            evidence = Evidence(statistics, self.gradients, self.reducer.seed, self.scores)
            return [self.reducer.reduce(group, count, evidence) for group in groups]

        decided = distributed.all_or_none(decide)[0]
        fusions: list[Fusion] = [fusion.to(view.parameter.device) for fusion in decided]
        fused = any(len(fusion.source) > len(fusion.kept) for fusion in fusions)
        if fused:
            self._note_transport(groups[0], max(fusion.marginal_error for fusion in fusions))
        weight = view.read()
        dense = copy.deepcopy(self.runner.blocks[self.index]) if self.reducer.refits and fused else None
        rewrite(groups, fusions)
        self._remember(_with(shape, kind, count))
        if dense is not None:
            self._refit_new(view, dense, weight)
        elif self.reducer.refits:
            columns = torch.cat([consumer_columns(g, f.kept) for g, f in zip(groups, fusions, strict=True)])
            new = torch.empty(weight.shape[0], len(columns), device=weight.device)
            if statistics is not None and statistics.gram is not None:
                new = refit_kept(weight, damped(statistics.gram, self.reducer.damping), columns)
            distributed.send_from(new, 0)
            set_weight(view, new)
        self.result.solver_seconds += perf_counter() - start
        if before is not None:
            self._note_error(before, view)
        offsets = [number * group.units for number, group in enumerate(groups)]
        kept = [int(unit) + at for fusion, at in zip(fusions, offsets, strict=True) for unit in fusion.kept]
        self.result.kept.setdefault(self.index, {})[kind] = kept
        return float(torch.cat([torch.bincount(f.target, minlength=count) > 1 for f in fusions]).float().mean())

    def _note_transport(self, group: Group, error: float) -> None:
        """Which solver ran on which cost; what of it is less than was asked for is said at once."""
        solver, result = self.reducer.solver(group.units), self.result
        cost = self.reducer.cost(group.units, group.consumer.view.parameter.device)
        if cost.endswith("L2") and cost not in result.cost:
            logger.warning(
                "fusion_cost: L1 distances between %d units would take hours here; L2 is taken instead.", group.units
            )
        if error > TOLERANCE and result.converged:
            logger.warning(
                "fusion_solver: %s did not converge in block %d, %.2g of the mass is in the wrong place; take emd or "
                "nearest. Of further blocks the report has the largest.", solver, group.block, error,
            )  # fmt: skip
        result.converged = result.converged and error <= TOLERANCE
        result.solver, result.cost = sorted({*result.solver, solver}), sorted({*result.cost, cost})
        result.marginal_error = max(result.marginal_error, error)

    def _remember(self, shape: Shape) -> None:
        """Modules that ask their config in a forward must not see sizes that other blocks do not have yet."""
        config = copy.deepcopy(self.runner.model.config.get_text_config())  # type: ignore[union-attr, operator]
        set_sizes(config, shape)
        set_remembered(self.runner.blocks[self.index], shape, config)

    def _outputs(self, view: WeightView) -> Tensor:
        """What a layer of this block puts out for the first chunk, float32 [tokens, out]."""
        assert self.stream is not None
        return self._inputs(view.module, self.stream.chunks[0], self.stream.hidden[0]) @ view.read().T

    def _note_error(self, before: Tensor, view: WeightView) -> None:
        """The consumer's relative output error on the processes' first chunks, the largest of the block's steps."""
        change = (self._outputs(view) - before).square().sum()
        sums = torch.stack([change, before.square().sum()]).cpu().double()
        distributed.sum_everywhere(sums)
        self.error = max(self.error, float(sums[0] / sums[1].clamp(min=1e-30)))

    def _observe(self, groups: Sequence[Group]) -> Statistics | None:
        """Statistics of the consumer's inputs, whole on process 0 and empty elsewhere."""
        if self.stream is None:
            return None
        view = groups[0].consumer.view
        ((statistics, _),), _ = self.stream.observe(self.index, [view], self.reducer.statistics)
        statistics.finish(lambda tensor: distributed.sum_at(tensor, 0))
        if distributed.rank() == 0:
            check_finite(statistics, view.name)
        else:
            statistics.release()
        return statistics

    def _refit_new(self, view: WeightView, dense: nn.Module, weight: Tensor) -> None:
        """Fit the consumer of fused units to the dense block's outputs: both run on the same hidden states.

        Args:
            dense: the block as it was before this step.
            weight: float32 [out, in], the consumer's weight in it.
        """
        assert self.stream is not None
        name = view.name.split(f".{self.index}.", 1)[1]
        inner = view.read()
        dtype = accumulation_dtype(inner.device)
        gram = torch.zeros(inner.shape[1], inner.shape[1], dtype=dtype, device=inner.device)
        residual = torch.zeros(inner.shape[1], inner.shape[0], dtype=dtype, device=inner.device)
        block = self.runner.blocks[self.index]
        for chunk, states in zip(self.stream.chunks, self.stream.hidden, strict=True):
            self.runner.blocks[self.index] = dense
            before = self._inputs(dense.get_submodule(name), chunk, states)
            self.runner.blocks[self.index] = block
            after = self._inputs(view.module, chunk, states)
            add_gram(gram, after)
            residual += after.T @ (before @ weight.T - after @ inner.T)
        self.stream.forward_passes += 2 / len(self.runner.blocks)
        gram = gram.triu() + gram.triu(1).T
        distributed.sum_at(gram, 0)
        distributed.sum_at(residual, 0)
        if distributed.rank() == 0:
            inner = refit_new(inner, gram, residual, self.reducer.damping)
        distributed.send_from(inner, 0)
        view.write(inner)

    def _inputs(self, layer: nn.Module, chunk: Tensor, states: Tensor | None) -> Tensor:
        """float32 [tokens, in], what a layer of this block is handed."""
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].detach().flatten(0, -2).float())
            BlockRunner.stop()

        handle = layer.register_forward_pre_hook(look)
        try:
            self.runner.observe(self.index, chunk, states)
        finally:
            handle.remove()
        return seen[0]


def steps(structure: Structure, index: int) -> list[tuple[str, int]]:
    """The kinds of units of which some go in a block, each with how many stay of a group."""
    before, after, found = structure.before, structure.after, []
    if after.groups != before.groups:
        found.append((ATTENTION, after.groups))
    elif after.heads != before.heads:
        found.append((HEADS, after.heads // after.groups))
    if _width(structure, index) != before.width:
        found.append((MLP, _width(structure, index)))
    return found


def _width(structure: Structure, index: int) -> int:
    return structure.widths[index] if structure.widths else structure.after.width


def _with(shape: Shape, kind: str, count: int) -> Shape:
    """A block's sizes once a kind has been reduced to `count` units (a group)."""
    if kind == MLP:
        return replace(shape, width=count)
    if kind == ATTENTION:
        return replace(shape, heads=shape.heads // shape.groups * count, groups=count)
    return replace(shape, heads=shape.groups * count)
