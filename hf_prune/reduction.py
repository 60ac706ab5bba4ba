"""Structured pruning of a live model: plan the smaller sizes, then walk. `pruning` hands over to this file."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.arguments import PruneConfig, StructuredConfig
from hf_prune.engine import distributed
from hf_prune.engine.results import ViewResult
from hf_prune.engine.walk import BlockUpdater
from hf_prune.engine.walk_checkpoint import WalkCheckpoint
from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.families import find_family
from hf_prune.plan import Plan, ViewPlan
from hf_prune.structure.budget import Structure, budget_candidates, plan_structure
from hf_prune.structure.groups import ATTENTION, MLP, block_shape
from hf_prune.structure.results import ReduceResult
from hf_prune.structure.stock import check_stock, set_sizes
from hf_prune.structure.transport import MOST_EXACT, check_installed
from hf_prune.structure.walk import reduce_model
from hf_prune.weights import WeightView, find_blocks, find_views

logger = logging.getLogger(__name__)


def plan_reduction(
    model: nn.Module,
    config: StructuredConfig,
    base_model: str = "",
    densities: Sequence[float] | None = None,
    shares: dict[str, float] | None = None,
) -> Plan:
    """The sizes of the smaller model and its weight matrices; `model` may live on the meta device.

    Args:
        densities: share of its MLP that each block keeps, for `layout: pad`; equal unless given.
        shares: of the removed parameters by unit; as the config says unless given.

    Raises:
        BadInputError: the family is not described, its stock config refuses the sizes, or a layer would be left empty.
    """
    structure = plan_structure(model, config, shares)
    check_stock(model, structure)
    reducer = config.make_reducer()
    assert config.units is not None
    sizes = {MLP: structure.before.width, ATTENTION: structure.before.groups}
    fused = [sizes[kind] for kind in config.units if kind in sizes and reducer.fuses([kind])]
    if any(reducer.solver(units) != "nearest" for units in fused):
        check_installed()
    if reducer.fusion_target == "kmeans" and max(fused, default=0) > MOST_EXACT:
        raise BadInputError(
            f"fusion_target: kmeans would take hours for {max(fused):,} units, above {MOST_EXACT:,}; set it to top."
        )
    if config.layout == "pad" and densities is not None:
        structure = _padded(structure, densities, config.round_to)
    views = [
        ViewPlan(view.name, view.parameter_name, view.block, view.shape, view.transposed, 1.0)
        for view in find_views(_smaller_skeleton(model, structure), whole=True)
        if view.block < structure.blocks - structure.blocks_removed
    ]
    return Plan(
        base_model=base_model,
        architecture=type(model).__name__,
        sparsity=structure.removed + structure.padded,
        pattern="structured",
        allocation=config.allocation,
        min_keep_ratio=0.0,
        views=views,
        structure=structure.to_dict(),
    )


def reduce(
    model: nn.Module,
    config: StructuredConfig,
    plan: Plan,
    input_ids: Tensor | None,
    seed: int = 0,
    reconstruction: BlockUpdater | None = None,
    checkpoint: WalkCheckpoint | None = None,
) -> tuple[list[ViewResult], ReduceResult]:
    """Make `model` as small as its plan says, in place, and train each block where there is a reconstruction.

    Args:
        checkpoint: where the walk is kept between blocks, and gone on with.
    """
    if plan.structure is None:
        raise BadInputError(f"method: {config.method} makes a model smaller, and the plan is one of zeros; plan anew.")
    structure = Structure.from_dict(plan.structure)
    if (block_shape(model), len(find_blocks(model)[1])) != (structure.before, structure.blocks):
        raise BadInputError("plan: it was made for blocks of other sizes than this model's; plan anew.")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise BadInputError(f"{name}: the weights hold NaN or Inf; the checkpoint is damaged, get it again.")
    _check_unshared(model)
    result = reduce_model(model, structure, config.make_reducer(seed), input_ids, reconstruction, checkpoint)
    live = {view.name: view for view in find_views(model, whole=True)}
    views = []
    for view in plan.views:
        own, size = live[view.name].count_nonzero(), live[view.name].parameter.numel()
        views.append(ViewResult(view.name, own, size - own))
    return views, result


def search_budget(model: nn.Module, config: StructuredConfig, input_ids: Tensor) -> dict[str, float]:
    """`budget: search`: the shares of the removed parameters, by unit, that cost least on held-out calibration windows.

    Every candidate gives the coarse units (attention, heads, depth) some of the budget and the MLPs the rest, and is
    carried out on a copy of the model with the other windows: as many prunings, and a second model's memory. One that
    is no model any more is left out.

    Args:
        input_ids: int64 [samples, tokens], two windows or more; an eighth, one window at least, is held out.

    Raises:
        BadInputError: there is one window only, or no candidate fits.
    """
    if len(input_ids) < 2:
        raise BadInputError("num_calibration_samples: budget search holds some windows out; use 2 or more.")
    held_out = max(len(input_ids) // 8, 1)
    costs: dict[str, float] = {}
    shares_of: dict[str, dict[str, float]] = {}
    for shares in budget_candidates(config):
        try:
            plan = plan_reduction(model, config, shares=shares)
        except BadInputError as error:
            logger.info("budget: [%s] is left out (%s)", _written(shares), error)
            continue
        # Coarse units make several shares one and the same structure.
        key = json.dumps(plan.structure)
        if key in shares_of:
            continue
        shares_of[key] = shares
        trial: Any = copy.deepcopy(model)
        try:
            reduce(trial, config, plan, input_ids[held_out:])
            costs[key] = float(window_nll(trial, input_ids[:held_out], description="trying").mean())
        except RunError as error:
            logger.info("budget: [%s] is left out (%s)", _written(shares), error)
            continue
        finally:
            del trial
        logger.info("budget: [%s] gives %.4f nats a token on %d windows", _written(shares), costs[key], held_out)
    if not costs:
        raise BadInputError(f"budget: no split over {', '.join(config.units or [])} fits; lower sparsity.")
    # One process decides: the others may differ by rounding.
    return distributed.gather(shares_of[min(costs, key=costs.__getitem__)])[0]


def _written(shares: dict[str, float]) -> str:
    return ", ".join(f"{unit}={share:g}" for unit, share in shares.items())


def _check_unshared(model: nn.Module) -> None:
    """Raise BadInputError where blocks share a weight: the units of one would go with the other's."""
    prefix, _ = find_blocks(model)
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen and (name.startswith(f"{prefix}.") or seen[id(parameter)].startswith(f"{prefix}.")):
            raise BadInputError(
                f"{name} shares its weight with {seen[id(parameter)]}: removing units would change both."
            )
        seen[id(parameter)] = name


def mlp_views(model: nn.Module, consumers: bool = False, whole: bool = True) -> list[WeightView]:
    """The weights of all MLPs that are described, or of what consumes their neurons, for allocations of widths.

    Args:
        whole: fused layers as one matrix, not part by part.
    """
    family = find_family(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]
    prefix, blocks = find_blocks(model)
    layers = (family.mlp.consumer,) if consumers else (*family.mlp.producers, family.mlp.consumer)
    names = {f"{prefix}.{block}.{layer}" for block in range(len(blocks)) for layer in layers}
    return [view for view in find_views(model, whole=whole) if view.layer in names]


def as_sparsity(config: StructuredConfig, model: nn.Module) -> PruneConfig:
    """The config under which an allocation shares MLP weights out as it would zeros."""
    structure = plan_structure(model, config)
    kept = structure.after.width / structure.before.width
    return PruneConfig(
        method="magnitude",
        sparsity=1 - kept,
        allocation=config.allocation,
        min_keep_ratio=0.05 * kept,
        options=config.options,
    )


def _padded(structure: Structure, densities: Sequence[float], round_to: int) -> Structure:
    """Widths in proportion to densities that add up to the budget, multiples between one and all that there are."""
    most = structure.before.width // round_to
    total = min(structure.after.width * structure.blocks // round_to, most * structure.blocks)
    scale = total / sum(densities)
    exact = [density * scale for density in densities]
    units = [min(max(int(value), 1), most) for value in exact]
    while sum(units) != total:
        step = 1 if sum(units) < total else -1
        able = [block for block in range(len(units)) if 1 <= units[block] + step <= most]
        # Where rounding and the limits have taken most from, or given most to.
        chosen = max(able, key=lambda block: step * (exact[block] - units[block]))
        units[chosen] += step
    widths = tuple(unit * round_to for unit in units)
    widest = replace(structure.after, width=max(widths))
    stored = structure.parameters_after + structure.blocks * structure.neuron * (max(widths) - structure.after.width)
    return replace(structure, after=widest, widths=widths, parameters_after=stored)


def _smaller_skeleton(model: nn.Module, structure: Structure) -> nn.Module:
    """The smaller model on the meta device."""
    config: Any = copy.deepcopy(model.config)
    set_sizes(config.get_text_config(), structure.after, list(range(structure.blocks - structure.blocks_removed)))
    with torch.device("meta"):
        return type(model)(config)
