"""Densities and patterns from a saved plan, edited by hand or made by another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_prune.arguments import PruneConfig
from hf_prune.errors import BadInputError
from hf_prune.plan import Plan
from hf_prune.weights import WeightView


def saved_plan(config: PruneConfig, views: Sequence[WeightView]) -> tuple[dict[str, float], dict[str, str]]:
    """(densities, patterns) by view name, from the plan at `config.allocation`.

    Raises:
        BadInputError: the plan is one of units, lacks a view or has another shape for it, or its sparsity is not what
            was asked for.
    """
    plan = Plan.load(config.allocation)
    if plan.structure is not None:
        raise BadInputError(
            f"allocation: {config.allocation} plans a narrower model, no zeros; take it with method intra_fusion and "
            "layout pad, or plan anew."
        )
    table = {view.name: view for view in plan.views}
    for view in views:
        whole = table.get(view.layer)
        if view.name not in table and whole is not None and whole.shape[1] == view.shape[1]:
            # A plan that takes a fused layer as one matrix, as those of trainings do: each part gets the layer's share.
            table[view.name] = replace(whole, name=view.name, shape=view.shape)
        planned = table.get(view.name)
        if planned is None or tuple(planned.shape) != view.shape:
            raise BadInputError(
                f"allocation: {config.allocation} has no {view.name} of shape {list(view.shape)}; plan this model anew."
            )
        if not 0 <= planned.density <= 1:
            raise BadInputError(f"allocation: {config.allocation} gives {view.name} a density outside [0, 1].")
        if config.pattern not in ("unstructured", planned.pattern):
            raise BadInputError(
                f"pattern: {config.pattern} contradicts the plan {config.allocation}, which gives {view.name} "
                f"{planned.pattern}; leave pattern out."
            )
    kept = sum(table[view.name].density * view.shape[0] * view.shape[1] for view in views)
    sparsity = 1 - kept / sum(view.shape[0] * view.shape[1] for view in views)
    if config.sparsity is not None and abs(config.sparsity - sparsity) > 1e-3:
        raise BadInputError(
            f"sparsity: {config.sparsity:.4g} contradicts the plan {config.allocation}, which gives {sparsity:.4g}; "
            "leave sparsity out."
        )
    return (
        {view.name: table[view.name].density for view in views},
        {view.name: table[view.name].pattern for view in views},
    )
