"""What each part of a model costs when it alone is pruned: the ground for `ignore`, floors and an allocation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.allocation import ALLOCATIONS
from hf_prune.arguments import PruneConfig, StructuredConfig
from hf_prune.checkpoint.load import load_model, load_tokenizer
from hf_prune.compose import make_allocation, make_solver, needs_text
from hf_prune.engine import distributed
from hf_prune.engine.walk import walk
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import bootstrap_ratio, perplexity
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.plan import Plan, ViewPlan
from hf_prune.preparation import prepare
from hf_prune.progress import progress
from hf_prune.pruning import load_calibration, plan_pruning, row_scales, with_importance
from hf_prune.recipe import Recipe
from hf_prune.weights import WeightView, find_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPINGS = ("block", "kind", "layer")
# A part is worth leaving alone where its cost for each weight removed is this many times the median part's.
OUTSTANDING = 5.0


@dataclass(frozen=True)
class PartSensitivity:
    """One part pruned, the rest dense.

    Attributes:
        part: the block's or module's full name, or the kind of layer (`mlp.down_proj`).
        weights: number of weights that became zero.
        perplexity: of the model with this part pruned.
        ratio, low, high: to the dense perplexity, with its 95 % bootstrap interval.
        cost: log of the ratio.
    """

    part: str
    weights: int
    perplexity: float
    ratio: float
    low: float | None
    high: float | None

    @property
    def cost(self) -> float:
        return math.log(self.ratio)


@dataclass(frozen=True)
class Sensitivity:
    """All parts in the model's order, and the perplexity of the dense model and of everything pruned at once."""

    by: str
    dense_perplexity: float
    all_pruned_perplexity: float
    parts: list[PartSensitivity]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the plan."""
        return {
            "format": "hf_prune_sensitivity",
            "version": 1,
            "by": self.by,
            "sparsity": self.plan.sparsity,
            "pattern": self.plan.pattern,
            "dense_perplexity": self.dense_perplexity,
            "all_pruned_perplexity": self.all_pruned_perplexity,
            "parts": [{**vars(part), "cost": part.cost} for part in self.parts],
            "outstanding": self.outstanding(),
        }

    def outstanding(self) -> list[str]:
        """Parts whose cost for each weight removed stands far above the median, dearest first: entries for `ignore`."""
        prices = {part.part: max(part.cost, 0.0) / max(part.weights, 1) for part in self.parts}
        middle = sorted(prices.values())[len(prices) // 2]
        far = [name for name, price in prices.items() if middle > 0 and price > OUTSTANDING * middle]
        return sorted(far, key=lambda name: -prices[name])


def part_of(view: ViewPlan | WeightView, by: str) -> str:
    """The part that a weight matrix belongs to: its block, its kind of layer, or itself."""
    prefix, dot, inside = view.name.partition(f".{view.block}.")
    if by == "layer" or not dot:
        return view.name
    if by == "block":
        return f"{prefix}.{view.block}"
    # The experts of a block are of one kind.
    return inside if view.expert is None else inside.replace(f".{view.expert}.", ".*.")


def measure_sensitivity(
    model: PreTrainedModel,
    config: PruneConfig,
    evaluate: Callable[[str], Tensor],
    *,
    by: str = "block",
    input_ids: Tensor | None = None,
) -> Sensitivity:
    """Prune every part by itself and evaluate; the model is dense again afterwards.

    One walk without propagation prunes all parts behind the dense model's own activations, so that a part's result
    does not depend on the others; then each is put into the dense model in turn.

    Args:
        evaluate: given a label, the model's float64 nll [windows]; choose on a validation split, never on the test.
        by: `block`, `kind` (the same layer in every block) or `layer` (each matrix).
        input_ids: int64 [samples, tokens], calibration windows where the method needs them.

    Raises:
        BadInputError: `by` is unknown, or the method or its text cannot be used.
    """
    if by not in GROUPINGS:
        raise BadInputError(f"by: {by!r} is unknown; choose {', '.join(GROUPINGS)}.")
    if isinstance(config, StructuredConfig):
        raise BadInputError(
            f"method: {config.method} removes whole units; sensitivity sets zeros, choose such a method."
        )
    if config.channel_permutation:
        raise BadInputError("channel_permutation: parts are put back one by one, in their own order; leave it out.")
    if input_ids is None and needs_text(config):
        raise BadInputError("dataset_name: this method needs calibration text; name a dataset.")
    rule = make_allocation(config)
    if rule is not None and (rule.learns or rule.needs_fisher):
        # Parts are compared at one sparsity, and what looks at the whole model takes its time.
        config = replace(config, allocation="uniform")
    plan = plan_pruning(model, config, input_ids=input_ids)
    views = find_named(model, [view.name for view in plan.views])
    dense = {view.name: view.stored.clone() for view in views}

    def put(weights: dict[str, Tensor], chosen: list[WeightView]) -> None:
        with torch.no_grad():
            for view in chosen:
                view.stored.copy_(weights[view.name])

    dense_nll = evaluate("dense")
    try:
        scales = row_scales(config, with_importance(model, config, plan, input_ids))
        walk(model, plan, make_solver(config), input_ids, row_scales=scales, propagate=False)
        pruned = {view.name: view.stored.clone() for view in views}
        all_pruned = perplexity(evaluate("all parts"))
        put(dense, views)
        groups: dict[str, list[WeightView]] = {}
        for view in views:
            groups.setdefault(part_of(view, by), []).append(view)
        parts = []
        for name, members in progress(groups.items(), "parts", total=len(groups)):
            put(pruned, members)
            nll = evaluate(name)
            put(dense, members)
            zeros = sum(pruned[view.name].numel() - int(pruned[view.name].count_nonzero()) for view in members)
            parts.append(PartSensitivity(name, zeros, perplexity(nll), *bootstrap_ratio(dense_nll, nll)))
    finally:
        put(dense, views)
    return Sensitivity(by, perplexity(dense_nll), all_pruned, parts, plan)


def agreement(
    model: PreTrainedModel, config: PruneConfig, measured: Sensitivity, input_ids: Tensor | None = None
) -> dict[str, float]:
    """Spearman correlation between cost for each weight and the density that each allocation would give.

    High: the allocation keeps more where pruning hurts more. Rules that need text are left out without `input_ids`,
    and those that learn always: what they take is a run of its own.
    """
    import pandas

    prices = pandas.Series({part.part: part.cost / max(part.weights, 1) for part in measured.parts})
    found = {}
    for name, rule in ALLOCATIONS.items():
        if name == "uniform" or rule.learns or (rule().needs_text and input_ids is None):
            continue
        plan = plan_pruning(model, replace(config, allocation=name, pattern="unstructured"), input_ids=input_ids)
        kept: dict[str, float] = {}
        weights: dict[str, int] = {}
        for view in plan.views:
            part = part_of(view, measured.by)
            kept[part] = kept.get(part, 0.0) + view.density * view.numel
            weights[part] = weights.get(part, 0) + view.numel
        densities = pandas.Series({part: kept[part] / weights[part] for part in kept})
        if densities.std() > 1e-9:  # equal densities rank nothing
            found[name] = float(pandas.DataFrame({"price": prices, "density": densities}).corr("spearman").iloc[0, 1])
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def run_sensitivity(recipe: Recipe, by: str) -> tuple[Sensitivity, dict[str, float]]:
    """Prune one part of a recipe's model at a time and evaluate it; also how far each allocation agrees.

    Raises:
        BadInputError: the recipe, the model or the text cannot be used.
    """
    recipe.require("model_name_or_path", "eval_dataset_name")
    recipe.evaluation.sample_prompts = None  # a continuation for each part would say nothing
    distributed.initialise(recipe.model.device)
    ready = prepare(recipe)
    revision = ready.source.revision or recipe.model.revision
    tokenizer = load_tokenizer(ready.source.path, recipe.model, revision)
    input_ids = None
    if recipe.data.dataset_name:
        _, input_ids = load_calibration(recipe.data, tokenizer, ready.model_config)
    evaluation = QualityEvaluation(recipe.evaluation, tokenizer, ready.model_config)
    model = load_model(ready.source.path, recipe.model, ready.device, revision)
    measured = measure_sensitivity(
        model, ready.config, lambda name: evaluation.measure(model, name).nll, by=by, input_ids=input_ids
    )
    return measured, agreement(model, ready.config, measured, input_ids)
