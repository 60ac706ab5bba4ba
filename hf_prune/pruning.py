"""Prune a live model: plan, then walk. The pipeline and the Python API both come through here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_prune.allocation.base import meet_budget, whole_rows
from hf_prune.allocation.fisher import Fisher
from hf_prune.allocation.saved import saved_plan
from hf_prune.arguments import DataArguments, PruneConfig, StructuredConfig
from hf_prune.compose import make_allocation, make_block_reconstruction, make_solver, needs_text
from hf_prune.engine import distributed
from hf_prune.engine.gradients import FisherFactors, fisher_factors
from hf_prune.engine.measure import measure_views
from hf_prune.engine.results import BlockOutcome, ViewResult
from hf_prune.engine.stream import windows_per_forward
from hf_prune.engine.walk import walk
from hf_prune.engine.walk_checkpoint import WalkCheckpoint
from hf_prune.errors import BadInputError
from hf_prune.families import find_family
from hf_prune.masks import row_floor
from hf_prune.methods.wanda import Wanda
from hf_prune.patterns import Pattern
from hf_prune.plan import Plan, make_plan, select_views
from hf_prune.reduction import as_sparsity, mlp_views, plan_reduction, reduce, search_budget
from hf_prune.structure.budget import budget_candidates
from hf_prune.structure.groups import block_shape
from hf_prune.structure.permutation import ChannelPermutation
from hf_prune.structure.results import ReduceResult
from hf_prune.weights import WeightView, find_blocks, find_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.data.text import TextData


@dataclass
class PruneResult:
    """What was planned and what came of it.

    Attributes:
        plan: every pruned weight matrix with its target.
        views: what became of each, in the plan's order.
        forward_passes: forwards over the calibration set that the walk took.
        reconstruction: outcome of each block's training by the block's index, where there was one.
        reduction: which units stayed, where whole units went.
        earlier_seconds: that earlier sessions took for what counts, where the run was cut.
        saving_seconds: that it took to keep the walk's state, earlier sessions included.
    """

    plan: Plan
    views: list[ViewResult]
    forward_passes: float
    reconstruction: dict[int, BlockOutcome] = field(default_factory=dict)
    reduction: ReduceResult | None = None
    earlier_seconds: float = 0.0
    saving_seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the pruned matrices' weights that are zero; where units went, of the blocks' parameters that did."""
        if self.reduction is not None:
            return self.plan.sparsity
        return 1 - sum(view.kept for view in self.views) / sum(view.numel for view in self.plan.views)


def plan_pruning(
    model: nn.Module,
    config: PruneConfig,
    base_model: str = "",
    input_ids: Tensor | None = None,
    statistics_folder: str | Path | None = None,
) -> Plan:
    """What `prune` would do to `model`, which may live on the meta device unless the allocation looks at weights.

    Args:
        input_ids: int64 [samples, tokens], for allocations that look at the dense model's activations.
        statistics_folder: where an allocation that learns keeps its state, to go on after a cut.

    Raises:
        BadInputError: targets match nothing, a pattern does not divide a layer's inputs, an allocation does not fit.
    """
    if isinstance(config, StructuredConfig):
        densities = _block_densities(model, config, input_ids, statistics_folder) if config.layout == "pad" else None
        shares = None
        if config.searches_budget:
            if input_ids is None:
                raise BadInputError("dataset_name: budget search needs calibration text; name a dataset.")
            shares = search_budget(model, config, input_ids)
        plan = plan_reduction(model, config, base_model, densities, shares)
        if plan.structure is not None:
            plan.structure["searched"] = shares
        return plan
    views, skipped = select_views(model, config.targets, config.ignore)
    if config.channel_permutation:
        # Refused before anything is read.
        find_family(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]
    if make_allocation(config) is None:
        saved, patterns = saved_plan(config, views)
        return make_plan(model, config, views, saved, patterns=patterns, skipped=skipped, base_model=base_model)
    shared, held, found = _densities(model, config, views, input_ids, statistics_folder)
    plan = make_plan(model, config, views, shared, held=held, skipped=skipped, base_model=base_model)
    return replace(plan, fisher_factors=found)


def _block_densities(
    model: nn.Module, config: StructuredConfig, input_ids: Tensor | None, statistics_folder: str | Path | None
) -> list[float]:
    """Share of its MLP that each block keeps by the config's allocation, or in the proportions of a saved plan."""
    rule = make_allocation(config)
    if rule is None:
        # Widths are in proportion to the plan's, or to its densities, whatever budget those were for.
        saved = Plan.load(config.allocation).structure
        if saved is not None:
            return _saved_widths(model, config.allocation, saved)
        parts = mlp_views(model, whole=False)
        by_view, _ = saved_plan(PruneConfig(method="magnitude", allocation=config.allocation), parts)
        return _by_block(parts, by_view)
    zeros = as_sparsity(config, model)
    assert zeros.sparsity is not None
    if isinstance(rule, Fisher):
        consumers = mlp_views(model, consumers=True)
        factors = fisher_factors(model, consumers, input_ids, columns=True)
        wanted = rule.shares_of_units(consumers, factors, zeros.sparsity)
        return meet_budget(wanted, [1] * len(wanted), 1 - zeros.sparsity, zeros.min_keep_ratio)
    views = mlp_views(model)
    by_view, _, _ = _densities(model, zeros, views, input_ids, statistics_folder)
    return _by_block(views, by_view)


def _saved_widths(model: nn.Module, file: str, structure: dict[str, Any]) -> list[float]:
    """The share of its neurons that each block has in a saved plan of widths.

    Raises:
        BadInputError: it is one of equal widths, or of another model.
    """
    shape, blocks = block_shape(model), len(find_blocks(model)[1])
    widths, before = structure["widths"], structure["before"]["width"]
    if not widths:
        raise BadInputError(f"allocation: {file} gives every block the same width; set layout to shrink, or plan anew.")
    if (len(widths), before) != (blocks, shape.width):
        raise BadInputError(
            f"allocation: {file} is of {len(widths)} blocks with {before:,} neurons, and this model has {blocks} with "
            f"{shape.width:,}; plan this model anew."
        )
    return [width / before for width in widths]


def _densities(
    model: nn.Module,
    config: PruneConfig,
    views: list[WeightView],
    input_ids: Tensor | None,
    statistics_folder: str | Path | None,
) -> tuple[dict[str, float], frozenset[str], dict[str, FisherFactors] | None]:
    """Density of each view by name under the config's allocation and budget, those that the floor raised, and the
    Fisher factors, if the rule needed them.
    """
    rule = make_allocation(config)
    assert rule is not None and config.sparsity is not None
    measures: dict[str, Any] = {}
    if rule.needs_fisher:
        measures = fisher_factors(model, views, input_ids)
    elif rule.needs_weights:
        windows = None if input_ids is None else _measured(input_ids, rule.measured_windows)
        measures = measure_views(model, views, rule.measure, rule.statistics, windows)
    folder = Path(statistics_folder) if statistics_folder else None
    wanted = rule.decide(model, views, measures, config.sparsity, input_ids, folder)
    sizes = [view.shape[0] * view.shape[1] for view in views]
    # Rows keep whole weights: a little more than the ratio says, which the others make up for.
    kept = [row_floor(view.shape[1], config.min_keep_ratio) / view.shape[1] for view in views]
    floors = [min(floor, 1 - config.sparsity) for floor in kept]
    met = meet_budget(wanted, sizes, 1 - config.sparsity, floors)
    criterion = make_solver(config).criterion
    # What was learned under a budget meets it; the other rules' densities round as Wanda's own do.
    if rule.learns and criterion is not None and criterion.by_row:
        met = whole_rows(met, [view.shape for view in views], 1 - config.sparsity, floors)
    densities = {view.name: density for view, density in zip(views, met, strict=True)}
    held = frozenset(view.name for view, own, floor in zip(views, met, floors, strict=True) if 0 < own <= floor)
    return densities, held, measures if rule.needs_fisher else None


def with_importance(model: nn.Module, config: PruneConfig, plan: Plan, input_ids: Tensor | None) -> Plan:
    """The plan with its Fisher factors, of the dense model, where outputs are to count by them."""
    if config.output_importance == "none" or plan.fisher_factors is not None:
        return plan
    views = find_named(model, [view.name for view in plan.views])
    return replace(plan, fisher_factors=fisher_factors(model, views, input_ids))


def row_scales(config: PruneConfig, plan: Plan) -> dict[str, Tensor]:
    """What the rows of each planned matrix are multiplied by while it is pruned; empty where all count alike."""
    if config.output_importance == "none":
        return {}
    assert plan.fisher_factors is not None
    return {name: own.row_scale for name, own in plan.fisher_factors.items()}


def _by_block(views: list[WeightView], densities: dict[str, float]) -> list[float]:
    """Share of all its weights that each block keeps."""
    kept: dict[int, float] = {}
    sizes: dict[int, int] = {}
    for view in views:
        size = view.shape[0] * view.shape[1]
        kept[view.block] = kept.get(view.block, 0.0) + densities[view.name] * size
        sizes[view.block] = sizes.get(view.block, 0) + size
    return [kept[block] / sizes[block] for block in sorted(sizes)]


# Short windows hold few tokens; the same windows for up to so many processes, each of which wants a forward.
_LEAST_FORWARDS = 4


def _measured(input_ids: Tensor, windows: int | None) -> Tensor:
    """The first so many calibration windows, or more where they are short."""
    if windows is None:
        return input_ids
    forwards = max(_LEAST_FORWARDS, distributed.world_size())
    return input_ids[: max(windows, forwards * windows_per_forward(input_ids.shape[1]))]


def provisional_plan(model: nn.Module, config: PruneConfig, base_model: str = "") -> tuple[Plan, bool]:
    """A plan without looking at weights, for estimates, and whether it is final: an allocation may change densities."""
    rule = make_allocation(config)
    final = rule is None or not rule.needs_weights
    plain: dict[str, Any] = {}
    if isinstance(config, StructuredConfig):
        plain = {"layout": "shrink"}
        if config.searches_budget:
            # The first candidate: all for the MLPs.
            return plan_reduction(model, config, base_model, shares=budget_candidates(config)[0]), False
    own = config if final else replace(config, allocation="uniform", **plain)
    plan = plan_pruning(model, own, base_model)
    return replace(plan, allocation=Path(config.allocation).name), final


def prune(
    model: PreTrainedModel,
    config: PruneConfig,
    *,
    input_ids: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: Plan | None = None,
    statistics_folder: str | None = None,
    checkpoint: WalkCheckpoint | None = None,
    **data: Any,
) -> PruneResult:
    """Prune a causal language model in place; it is usable at once and `save_pretrained` works as always.

    Args:
        model: a `PreTrainedModel` on one device.
        config: a method's config (`SparseGPTConfig(sparsity=0.5)`), or a `PruneConfig` with criterion and update.
        input_ids: int64 [samples, tokens], calibration windows without padding; or leave it out and give
        tokenizer: the model's tokenizer, together with the calibration keys of a recipe as keywords
            (`dataset_name="allenai/c4", dataset_config="en", num_calibration_samples=128, seq_length=2048`).
        plan: a plan made before, of this very model where making it trains weights; made here otherwise.
        statistics_folder: keeps the activations' statistics for further runs (with `propagate=False`), and the state
            of an allocation that learns.
        checkpoint: where the walk is kept between blocks, and gone on with.

    Raises:
        BadInputError: config, plan, text and model do not fit together.
        RunError: the arithmetic failed (an indefinite Hessian, an overflow).
        Stopped: the checkpoint was asked to stop.
    """
    arguments = DataArguments(**data)
    if input_ids is None and needs_text(config):
        if tokenizer is None or arguments.dataset_name is None:
            raise BadInputError(
                f"dataset_name: {config.method or config.criterion} needs calibration text; pass input_ids, or "
                "tokenizer and dataset_name."
            )
        _, input_ids = load_calibration(arguments, tokenizer, model.config)
    name = getattr(model.config, "_name_or_path", "")
    plan = plan or plan_pruning(model, config, name, input_ids, statistics_folder)
    reconstruction = make_block_reconstruction(config)
    if isinstance(config, StructuredConfig):
        smaller, reduction = reduce(model, config, plan, input_ids, arguments.seed, reconstruction, checkpoint)
        return PruneResult(
            plan,
            smaller,
            reduction.forward_passes,
            reduction.reconstruction,
            reduction,
            reduction.earlier_seconds,
            reduction.saving_seconds,
        )
    plan = with_importance(model, config, plan, input_ids)
    solver, reorder = make_solver(config), None
    if config.channel_permutation:
        names = {view.name for view in plan.views}
        # An update that selects by itself has no scores before it is done.
        score = (solver.criterion or Wanda()).score
        reorder = ChannelPermutation(model, names, score, Pattern.parse(config.pattern))
    result = walk(
        model,
        plan,
        solver,
        input_ids,
        row_scales=row_scales(config, plan),
        reconstruction=reconstruction,
        reorder=reorder,
        propagate=config.propagate,
        statistics_folder=Path(statistics_folder) if statistics_folder else None,
        checkpoint=checkpoint,
    )
    return PruneResult(
        plan,
        result.views,
        result.forward_passes,
        result.reconstruction,
        earlier_seconds=result.earlier_seconds,
        saving_seconds=result.saving_seconds,
    )


def load_calibration(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> tuple[TextData, Tensor]:
    """The calibration text a recipe names, and its windows, int64 [samples, tokens].

    A .safetensors file holds windows that were cut before, as `input_ids`; their text is not known.
    """
    from hf_prune.data.text import TextData, load_text
    from hf_prune.data.windows import calibration_windows, sequence_length, stored_windows

    assert arguments.dataset_name is not None
    if arguments.dataset_name.endswith(".safetensors"):
        text = TextData((), Path(arguments.dataset_name).name, private=True)
        return text, stored_windows(arguments.dataset_name)
    text = load_text(
        arguments.dataset_name,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        text_column=arguments.text_column,
        revision=arguments.dataset_revision,
        tokenizer=tokenizer,
    )
    seq_length = sequence_length(model_config, arguments.seq_length)
    return text, calibration_windows(text, tokenizer, arguments.num_calibration_samples, seq_length, arguments.seed)
