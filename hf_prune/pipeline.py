"""Recipe in, verified folder out: load, evaluate, prune, evaluate, save, verify, measure, card, push."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import hf_prune
from hf_prune.checkpoint.displacement import displacement, overall
from hf_prune.checkpoint.folder import (
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    check_output_folder,
    output_folder,
    save_model,
)
from hf_prune.checkpoint.load import load_config, load_model, load_tokenizer, pick_device, skeleton
from hf_prune.checkpoint.verify import verify_folder
from hf_prune.compose import (
    make_allocation,
    make_block_reconstruction,
    make_config,
    make_solver,
    needs_text,
    own_options,
)
from hf_prune.data.builtin import ModelSource, resolve_model
from hf_prune.data.text import TextData
from hf_prune.data.windows import default_seq_length
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError, RunError
from hf_prune.estimate import Estimate, check_fits, estimate
from hf_prune.evaluation.efficiency import measure_efficiency
from hf_prune.evaluation.memory import PeakMemory
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.hub.card import write_card
from hf_prune.hub.push import check_ready_to_push, push_folder
from hf_prune.methods import find_method
from hf_prune.plan import Plan
from hf_prune.pruning import PruneResult, load_calibration, plan_pruning, provisional_plan, prune
from hf_prune.recipe import PruneConfig, Recipe
from hf_prune.report.plots import plot_sparsity_by_layer

logger = logging.getLogger(__name__)
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub")


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
    seq_length: int


@dataclass
class Stopwatch:
    """Seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`."""
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


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
    device = pick_device(model.device, distributed.local_rank())
    source = resolve_model(model.model_name_or_path, model.revision)
    model_config = load_config(source.path, model, source.revision or model.revision)
    empty = skeleton(model_config, model)
    plan, final = provisional_plan(empty, config, source.base_model)
    seq_length = recipe.data.seq_length or default_seq_length(model_config)
    samples = recipe.data.num_calibration_samples if needs_text(config) else 0
    solver, reconstruction = make_solver(config), make_block_reconstruction(config)
    rule = make_allocation(config)
    predicted = estimate(empty, plan, solver, reconstruction, rule, samples, seq_length, model.dtype, device)
    return Preparation(recipe, config, source, model_config, plan, final, predicted, device, seq_length)


def check_feasible(ready: Preparation) -> None:
    """Raise BadInputError where the output folder, the push or this machine's memory and disk would stop the run."""
    output = ready.recipe.output
    assert output.output_dir is not None
    check_output_folder(output.output_dir, output.overwrite_output_dir)
    if output.push_to_hub and output.hub_model_id:
        check_ready_to_push(output.hub_model_id)
    check_fits(ready.estimate, ready.device, output.output_dir)


def run(recipe: Recipe) -> dict[str, Any]:
    """Do everything a recipe asks for; returns the report that stands in the output folder.

    With several processes all of them must call this; the main one writes and the others get a report without the
    parts that follow saving.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: the run failed, verification included; nothing is left behind. Where only the push at the end fails,
            the finished folder stays.
    """
    recipe.require("output_dir")
    distributed.initialise(recipe.model.device)
    watch = Stopwatch()
    with watch.phase("prepare"):
        ready = prepare(recipe)
        check_feasible(ready)
        revision = ready.source.revision or recipe.model.revision
        tokenizer = load_tokenizer(ready.source.path, recipe.model, revision)
    with watch.phase("text"):
        text, input_ids = None, None
        if needs_text(ready.config):
            text, input_ids = load_calibration(recipe.data, tokenizer, ready.model_config)
        evaluation = None
        if recipe.evaluation.eval_dataset_name:
            evaluation = QualityEvaluation(recipe.evaluation, tokenizer, ready.model_config)
    with PeakMemory(ready.device) as memory:
        with watch.phase("load"):
            model = load_model(ready.source.path, recipe.model, ready.device, revision)
        total = sum(parameter.numel() for parameter in model.parameters())
        with watch.phase("evaluate"):
            dense = evaluation.measure(model, "evaluating the dense model") if evaluation else None
        folder = recipe.data.statistics_folder
        with watch.phase("prune"):
            if not ready.plan_is_final:
                plan = plan_pruning(model, ready.config, ready.source.base_model, input_ids, folder)
                ready = replace(ready, plan=plan, plan_is_final=True)
            result = prune(model, ready.config, input_ids=input_ids, plan=ready.plan, statistics_folder=folder)
        with watch.phase("evaluate"):
            pruned = evaluation.measure(model, "evaluating the pruned model") if evaluation else None
    report = {
        **describe(ready, model, result, text, total),
        "seconds": watch.seconds,
        "peak_memory_bytes": memory.bytes,
        # The recipe beside the report holds the flags as well, and no path of the machine it ran on.
        "command": f"hf-prune prune --config {RECIPE_FILE}",
    }
    if evaluation and dense and pruned:
        report["evaluation"] = evaluation.report(dense=dense, pruned=pruned)
        private = any((report.get(part) or {}).get("private") for part in ("calibration", "evaluation"))
        if recipe.evaluation.sample_prompts and (recipe.output.publish_samples or not private):
            report["samples"] = evaluation.samples(dense=dense, pruned=pruned)
    if distributed.rank() == 0:
        write(ready, model, tokenizer, result, report, watch)
    return report


def with_final_plan(ready: Preparation) -> Preparation:
    """Load the weights, and the text where the allocation needs it, for a plan that depends on them."""
    revision = ready.source.revision or ready.recipe.model.revision
    input_ids = None
    rule = make_allocation(ready.config)
    if rule is not None and rule.needs_text:
        tokenizer = load_tokenizer(ready.source.path, ready.recipe.model, revision)
        _, input_ids = load_calibration(ready.recipe.data, tokenizer, ready.model_config)
    model = load_model(ready.source.path, ready.recipe.model, ready.device, revision)
    folder = ready.recipe.data.statistics_folder
    plan = plan_pruning(model, ready.config, ready.source.base_model, input_ids, folder)
    return replace(ready, plan=plan, plan_is_final=True)


def write(ready: Preparation, model: Any, tokenizer: Any, result: PruneResult, report: dict, watch: Stopwatch) -> None:
    """Save, verify, measure, describe; the folder takes its name only when all of it worked. Then push, if asked."""
    output = ready.recipe.output
    assert output.output_dir is not None
    with output_folder(output.output_dir, output.overwrite_output_dir) as folder:
        with watch.phase("save"):
            save_model(model, tokenizer, folder)
            result.plan.save(folder / PLAN_FILE)
            (folder / RECIPE_FILE).write_text(ready.recipe.text, encoding="utf-8")
        with watch.phase("verify"):
            kept = {view.name: view.kept for view in result.views}
            views = [{**asdict(view), "kept": kept[view.name]} for view in result.plan.views]
            report["verification"] = [
                within_plan(result),
                *verify_folder(folder, model, views, tokenizer, trust_remote_code=ready.recipe.model.trust_remote_code),
            ]
        # The memory is wanted for measuring: what is saved and verified need not be held any longer.
        model.to("meta")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failed = [row for row in report["verification"] if not row["passed"]]
        if failed:
            raise RunError(
                f"output_dir: the saved model failed its verification ({failed[0]['check']}: {failed[0]['detail']}); "
                "nothing was kept, please report this."
            )
        with watch.phase("compare"):
            add_displacement(report, ready, folder)
        if ready.recipe.evaluation.eval_efficiency:
            with watch.phase("efficiency"):
                try:
                    report["efficiency"] = efficiency(ready, folder)
                except RunError as error:
                    # A verified model is not thrown away for want of a measurement.
                    logger.warning("Sizes and speeds were not measured: %s", error)
        (folder / "plots").mkdir()
        plot_sparsity_by_layer(report["views"], folder / "plots" / "sparsity_by_layer.png")
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_card(folder, report, ready.recipe.text)
    if output.push_to_hub:
        assert output.hub_model_id is not None
        push_folder(output.output_dir, output.hub_model_id, private=output.hub_private_repo)


def add_displacement(report: dict[str, Any], ready: Preparation, folder: Path) -> None:
    """How far the kept weights have moved, by view and overall, from the dense model as it was loaded."""
    revision = ready.source.revision or ready.recipe.model.revision
    dense = load_model(ready.source.path, ready.recipe.model, torch.device("cpu"), revision)
    by_view = displacement(folder, dense, ready.plan.views)
    for row in report["views"]:
        row |= {key: by_view[row["name"]][key] for key in ("moved", "changed") if row["name"] in by_view}
    report["displacement"] = overall(by_view)


def within_plan(result: PruneResult) -> dict[str, Any]:
    """A verification row: no weight matrix keeps more than its plan allows, whole weights a row."""
    floor = result.plan.min_keep_ratio
    over = [
        view.name
        for view, outcome in zip(result.plan.views, result.views, strict=True)
        if outcome.kept > view.shape[0] * math.ceil(max(view.density, floor) * view.shape[1] - 1e-9)
    ]
    detail = f"{over[0]} keeps more than planned" if over else f"target {result.plan.sparsity:.2%} zeros"
    return {"check": "density within the plan", "passed": not over, "detail": detail}


def efficiency(ready: Preparation, folder: Path) -> dict[str, Any]:
    """Dense and pruned, interleaved in one run, each loaded from where a user would load it."""
    revision = ready.source.revision or ready.recipe.model.revision
    return measure_efficiency(
        {"dense": ready.source.path, "pruned": folder},
        dtype=ready.recipe.model.dtype,
        device=str(ready.device),
        revisions={"dense": revision} if revision else None,
        trust_remote_code=ready.recipe.model.trust_remote_code,
    )


def describe(ready: Preparation, model: Any, result: PruneResult, text: TextData | None, total: int) -> dict[str, Any]:
    """The report's entries on model, method, calibration and sparsity."""
    recipe, plan = ready.recipe, result.plan
    outcome = {view.name: view for view in result.views}
    pruned = sum(view.numel for view in plan.views)
    zeros_before = sum(view.zeros_before for view in result.views)
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    views = [
        {
            "name": view.name,
            "block": view.block,
            "shape": list(view.shape),
            "target_density": view.density,
            "density": outcome[view.name].kept / view.numel,
            "zeros_before": outcome[view.name].zeros_before,
            "pattern": view.pattern,
            "floor": view.floor,
            "error": outcome[view.name].error,
        }
        for view in plan.views
    ]
    return {
        "format": "hf_prune_report",
        "version": 1,
        "base_model": ready.source.base_model,
        "base_revision": ready.source.revision or recipe.model.revision,
        "base_license": ready.source.license,
        "architecture": plan.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(ready.device),
        "method": {**describe_method(ready.config), "pattern": plan.pattern},
        "calibration": None
        if text is None
        else {
            "dataset": text.name,
            "config": text.config,
            "split": text.split,
            "revision": text.revision,
            "private": text.private,
            "num_samples": recipe.data.num_calibration_samples,
            "seq_length": ready.seq_length,
            "seed": recipe.data.seed,
        },
        "sparsity": {
            "target": plan.sparsity,
            "achieved_pruned": result.sparsity,
            "achieved_all": zeros / total,
            "zeros_before_pruned": zeros_before / pruned,
            "pruned_parameters": pruned,
            "total_parameters": total,
        },
        "views": views,
        "forward_passes": result.forward_passes,
        "reconstruction": [{"block": block, **asdict(outcome)} for block, outcome in result.reconstruction.items()],
        "versions": {"hf_prune": hf_prune.__version__, **{name: metadata.version(name) for name in VERSIONS}},
        "seed": recipe.data.seed,
        "num_processes": distributed.world_size(),
        "hub_model_id": recipe.output.hub_model_id,
    }


def describe_method(config: PruneConfig) -> dict[str, Any]:
    """The report's `method` entry. A preset whose parts were changed is named by its parts."""
    solver = make_solver(config)
    preset = find_method("method", config.method) if config.method else None
    changed = preset is None or (solver.criterion_name, solver.update_name) != (
        preset.criterion_name,
        preset.update_name,
    )
    owner = find_method("criterion", solver.criterion_name) if changed or preset is None else preset
    title = owner.info.title if not changed else f"{owner.info.title} criterion, {solver.update_name} update"
    return {
        "name": config.method if not changed else f"{solver.criterion_name}+{solver.update_name}",
        "title": title,
        "criterion": solver.criterion_name,
        "update": solver.update_name,
        "reconstruct": config.reconstruct,
        "allocation": Path(config.allocation).name,
        "options": own_options(config),
        "paper": owner.info.paper,
        "paper_title": owner.info.paper_title,
        "summary": owner.info.summary,
        "citation": owner.info.citation,
    }


def evaluate(recipe: Recipe, baseline: str | None = None, baseline_revision: str | None = None) -> dict[str, Any]:
    """Measure a finished model, and the dense one beside it where `baseline` names it; a report of those two entries.

    Raises:
        BadInputError: the model or the text cannot be used.
    """
    recipe.require("model_name_or_path", "eval_dataset_name")
    distributed.initialise(recipe.model.device)
    device = pick_device(recipe.model.device, distributed.local_rank())
    names = {"dense": (baseline, baseline_revision), "pruned": (recipe.model.model_name_or_path, recipe.model.revision)}
    sources = {name: resolve_model(model, revision) for name, (model, revision) in names.items() if model}
    evaluation = None
    measured = {}
    for name, source in sources.items():
        config = load_config(source.path, recipe.model, source.revision)
        if evaluation is None:
            tokenizer = load_tokenizer(source.path, recipe.model, source.revision)
            evaluation = QualityEvaluation(recipe.evaluation, tokenizer, config)
        model = load_model(source.path, recipe.model, device, source.revision)
        measured[name] = evaluation.measure(model, f"evaluating the {name} model")
        del model
    assert evaluation is not None
    report: dict[str, Any] = {"evaluation": evaluation.report(**measured)}
    if recipe.evaluation.eval_efficiency and distributed.rank() == 0:
        report["efficiency"] = measure_efficiency(
            {name: source.path for name, source in sources.items()},
            dtype=recipe.model.dtype,
            device=str(device),
            revisions={name: source.revision for name, source in sources.items() if source.revision} or None,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    return report
