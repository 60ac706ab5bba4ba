"""From a recipe to a plan: everything that is decided, checked and refused before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_prune.arguments import OutputArguments, PruneConfig, StructuredConfig
from hf_prune.checkpoint.folder import PLAN_FILE, check_output_folder
from hf_prune.checkpoint.load import explained, load_config, load_tokenizer, pick_device, skeleton
from hf_prune.checkpoint.offloaded import open_model
from hf_prune.compose import (
    make_allocation,
    make_block_reconstruction,
    make_config,
    make_solver,
    needs_fisher,
    needs_text,
)
from hf_prune.data.builtin import ModelSource, resolve_model
from hf_prune.data.windows import sequence_length, stored_shape
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.estimate import Estimate, check_fits, estimate, estimate_reduction
from hf_prune.hub.push import check_ready_to_push
from hf_prune.plan import Plan
from hf_prune.pruning import load_calibration, plan_pruning, provisional_plan
from hf_prune.recipe import Recipe
from hf_prune.structure.importance import is_file, read_scores


@dataclass
class Preparation:
    """Everything a recipe decides before weights are loaded: the model's skeleton, the plan and what it will take.

    `plan_is_final` is False where the allocation has yet to look at the weights: densities are uniform until then.
    """

    recipe: Recipe
    config: PruneConfig
    source: ModelSource
    model_config: Any
    plan: Plan
    plan_is_final: bool
    estimate: Estimate
    device: torch.device
    num_samples: int
    seq_length: int


def prepare(recipe: Recipe) -> Preparation:
    """Check a recipe against its model without loading weights.

    Raises:
        BadInputError: a key or the model cannot be used.
    """
    config = make_config(recipe.prune_options)
    recipe.require("model_name_or_path")
    model = recipe.model
    assert model.model_name_or_path is not None
    if needs_text(config) and not recipe.data.dataset_name:
        raise BadInputError(
            f"dataset_name: {config.method or config.criterion} needs calibration text; name a dataset."
        )
    check_offload(model.offload, config)
    device = pick_device(model.device, distributed.local_rank())
    source = resolve_model(model.model_name_or_path, model.revision)
    model_config = load_config(source.path, model, source.revision or model.revision)
    empty = skeleton(model_config, model)
    plan, final = provisional_plan(empty, config, source.base_model)
    samples = recipe.data.num_calibration_samples
    seq_length = sequence_length(model_config, recipe.data.seq_length)
    if not needs_text(config):
        samples = 0
    elif str(recipe.data.dataset_name).endswith(".safetensors"):
        samples, seq_length = stored_shape(str(recipe.data.dataset_name))
    if isinstance(config, StructuredConfig):
        check_unpruned(source.path, source.revision or model.revision)
        scores = getattr(config, "importance", "")
        if is_file(scores):
            read_scores(scores)
    predicted = _predict(recipe, config, empty, plan, samples, seq_length, device)
    return Preparation(recipe, config, source, model_config, plan, final, predicted, device, samples, seq_length)


def _predict(
    recipe: Recipe, config: PruneConfig, empty: Any, plan: Plan, samples: int, seq_length: int, device: torch.device
) -> Estimate:
    """What pruning `empty`, the dense model on the meta device, by a plan will take."""
    rule, fisher, own = make_allocation(config), needs_fisher(config), recipe.model
    if isinstance(config, StructuredConfig):
        return estimate_reduction(empty, plan, config, rule, fisher, samples, seq_length, own.dtype, device)
    solver, reconstruction = make_solver(config), make_block_reconstruction(config)
    # On a CPU its memory is the host's.
    offload = "none" if own.offload == "cpu" and device.type == "cpu" else own.offload
    return estimate(empty, plan, solver, reconstruction, rule, fisher, samples, seq_length, own.dtype, device, offload)


def check_offload(offload: str, config: PruneConfig) -> None:
    """Raise BadInputError where a model that is not whole on its device is of no use to what is asked for."""
    if offload == "none":
        return
    if isinstance(config, StructuredConfig):
        raise BadInputError(
            f"offload: method {config.method} makes the whole model smaller at once; set it to none, or choose a "
            "method that sets weights to zero."
        )
    if getattr(make_allocation(config), "learns", False):
        raise BadInputError(
            f"offload: allocation {config.allocation} learns on the whole model at once; set it to none, or allocation "
            "to fisher, owl or uniform."
        )


def check_unpruned(path: str, revision: str | None = None) -> None:
    """Raise BadInputError for a folder or repository that hf_prune made: its zeros or its sizes would not survive."""
    from transformers.utils import cached_file

    quiet = ("missing_entries", "gated_repo", "connection_errors")
    options: dict[str, Any] = {f"_raise_exceptions_for_{what}": False for what in quiet}
    with explained(path):
        plan = cached_file(path, PLAN_FILE, revision=revision, **options)
    if plan is not None:
        raise BadInputError(
            f"model_name_or_path: {path} has been pruned before, which this would undo; start from its base model."
        )


def check_feasible(ready: Preparation) -> None:
    """Raise BadInputError where the output folder, the push or this machine's memory and disk would stop the run."""
    output = ready.recipe.output
    check_output(output)
    assert output.output_dir is not None
    check_fits(ready.estimate, ready.device, output.output_dir)


def check_output(output: OutputArguments) -> None:
    """Raise BadInputError where the output folder or the push would stop the run at its end."""
    assert output.output_dir is not None
    check_output_folder(output.output_dir, output.overwrite_output_dir)
    if output.push_to_hub and output.hub_model_id:
        check_ready_to_push(output.hub_model_id)


def with_final_plan(ready: Preparation) -> Preparation:
    """Load the weights, and the text where the allocation needs it, for a plan that depends on them."""
    revision = ready.source.revision or ready.recipe.model.revision
    input_ids = None
    rule = make_allocation(ready.config)
    searches = isinstance(ready.config, StructuredConfig) and ready.config.searches_budget
    if searches or (rule is not None and rule.needs_text):
        tokenizer = load_tokenizer(ready.source.path, ready.recipe.model, revision)
        _, input_ids = load_calibration(ready.recipe.data, tokenizer, ready.model_config)
    model = open_model(ready.source.path, ready.recipe.model, ready.device, revision)
    folder = ready.recipe.data.statistics_folder
    plan = plan_pruning(model, ready.config, ready.source.base_model, input_ids, folder)
    empty, recipe = skeleton(ready.model_config, ready.recipe.model), ready.recipe
    predicted = _predict(recipe, ready.config, empty, plan, ready.num_samples, ready.seq_length, ready.device)
    return replace(ready, plan=plan, plan_is_final=True, estimate=predicted)
