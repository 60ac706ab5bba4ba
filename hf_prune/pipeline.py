"""Recipe in, verified folder out: load, evaluate, prune, evaluate, save, verify, measure, card, push."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_prune.arguments import OutputArguments
from hf_prune.checkpoint.folder import RECIPE_FILE, REPORT_FILE
from hf_prune.checkpoint.load import free_memory, load_config, load_tokenizer, pick_device
from hf_prune.checkpoint.offloaded import open_model
from hf_prune.compose import make_allocation, needs_text
from hf_prune.data.builtin import resolve_model
from hf_prune.description import add_displacement, describe
from hf_prune.engine import distributed
from hf_prune.evaluation.memory import PeakMemory
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.finish import Stopwatch, efficiency, finish, push
from hf_prune.plan import Plan
from hf_prune.preparation import Preparation, check_feasible, prepare
from hf_prune.pruning import PruneResult, load_calibration, plan_pruning, prune, with_importance
from hf_prune.recipe import Recipe
from hf_prune.report.plots import plot_sparsity_by_layer, plot_widths
from hf_prune.report.privacy import may_show_samples
from hf_prune.unfinished import Unfinished, is_finished

logger = logging.getLogger(__name__)


def run(recipe: Recipe, notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Do everything a recipe asks for; returns the report that stands in the output folder.

    With several processes all of them must call this; the main one writes and the others get a report without the
    parts that follow saving.

    Args:
        notes: further entries of the report: what led to the recipe.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: the run failed, verification included; nothing is left behind but what the same run goes on with.
            Where only the push at the end fails, the finished folder stays.
        Stopped: it was asked to stop; the same run goes on.
    """
    recipe.require("output_dir")
    distributed.initialise(recipe.model.device)
    if is_finished(recipe, drop=True):
        return _finished_before(recipe.output)
    watch = Stopwatch()
    with watch.phase("prepare"):
        ready = prepare(recipe)
        check_feasible(ready)
    with Unfinished.opened(recipe) as unfinished:
        return _run(ready, unfinished, watch, notes or {})


def _finished_before(output: OutputArguments) -> dict[str, Any]:
    """The report of a run that died when all but pushing was done."""
    assert output.output_dir is not None
    logger.info("%s is finished already, by a run that died while it cleared up.", output.output_dir)
    file = Path(output.output_dir).expanduser() / REPORT_FILE
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if distributed.rank() == 0:
        push(output)
    return report


def _run(ready: Preparation, unfinished: Unfinished, watch: Stopwatch, notes: Mapping[str, Any]) -> dict[str, Any]:
    recipe = ready.recipe
    with watch.phase("text"):
        revision = ready.source.revision or recipe.model.revision
        tokenizer = load_tokenizer(ready.source.path, recipe.model, revision)
        text, input_ids = None, None
        if needs_text(ready.config):
            text, input_ids = load_calibration(recipe.data, tokenizer, ready.model_config)
        evaluation = None
        if recipe.evaluation.eval_dataset_name:
            evaluation = QualityEvaluation(recipe.evaluation, tokenizer, ready.model_config)
    with PeakMemory(ready.device) as memory:
        with watch.phase("load"):
            model = open_model(ready.source.path, recipe.model, ready.device, revision, unfinished.work)
            windows = evaluation.windows.input_ids if evaluation else None
            unfinished.claim(ready, model, {"calibration windows": input_ids, "evaluation windows": windows})
        total = sum(parameter.numel() for parameter in model.parameters())
        with watch.phase("evaluate"):
            dense = None
            if evaluation:
                dense = unfinished.dense(partial(evaluation.measure, model, "evaluating the dense model"))
        folder = recipe.data.statistics_folder
        with watch.phase("prune"):

            def plan() -> Plan:
                made = ready.plan
                if not ready.plan_is_final:
                    kept = folder or unfinished.work.scratch
                    made = plan_pruning(model, ready.config, ready.source.base_model, input_ids, kept)
                return with_importance(model, ready.config, made, input_ids)

            rule = make_allocation(ready.config)
            trained = model if rule is not None and rule.train_weights else None
            final, allocation_seconds = unfinished.plan(plan, ready.device, trained)
            ready = replace(ready, plan=final, plan_is_final=True)
            result = prune(
                model,
                ready.config,
                input_ids=input_ids,
                plan=ready.plan,
                statistics_folder=folder,
                seed=recipe.data.seed,
                checkpoint=unfinished.walk,
            )
        watch.seconds["prune"] += result.earlier_seconds
        with watch.phase("evaluate"):
            pruned = evaluation.measure(model, "evaluating the pruned model") if evaluation else None
    report = {
        **describe(ready, model, result, text, total),
        "seconds": watch.seconds,
        "allocation_seconds": allocation_seconds,
        # What it takes that a run that is cut can be gone on with: the walk's state; fingerprints and plan.
        "saving_seconds": result.saving_seconds,
        "claiming_seconds": unfinished.seconds,
        "peak_memory_bytes": memory.bytes,
        # The recipe beside the report holds the flags as well, and no path of the machine it ran on.
        "command": f"hf-prune prune --config {RECIPE_FILE}",
        **notes,
    }
    if evaluation and dense and pruned:
        report["evaluation"] = evaluation.report(dense=dense, pruned=pruned)
        if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
            report["samples"] = evaluation.samples(dense=dense, pruned=pruned)
    if distributed.rank() == 0:
        write(ready, model, tokenizer, result, report, watch, unfinished)
    return report


def write(
    ready: Preparation,
    model: Any,
    tokenizer: Any,
    result: PruneResult,
    report: dict[str, Any],
    watch: Stopwatch,
    unfinished: Unfinished,
) -> None:
    """Finish the folder; displacement, sizes and speeds and plots are this run's own."""

    def complete(folder: Path) -> None:
        # Permuted weights stand in other places than the dense ones that they were.
        if result.reduction is None and not ready.config.channel_permutation:
            with watch.phase("compare"):
                add_displacement(report, ready, folder)
        if ready.recipe.evaluation.eval_efficiency and ready.recipe.model.offload != "none":
            logger.warning(
                "eval_efficiency: sizes and speeds are not measured with offload, for that holds both models whole; "
                "hf-prune evaluate does it elsewhere."
            )
        elif ready.recipe.evaluation.eval_efficiency:
            with watch.phase("efficiency"):
                revision = ready.source.revision or ready.recipe.model.revision
                revisions = {"dense": revision} if revision else None
                models: dict[str, str | Path] = {"dense": ready.source.path, "pruned": folder}
                report.update(efficiency(models, ready.recipe.model, ready.device, revisions))
        if result.reduction is None:
            plot_sparsity_by_layer(report["views"], folder / "plots" / "sparsity_by_layer.png")
        elif result.plan.structure and result.plan.structure["widths"]:
            plot_widths(report["structure"], folder / "plots" / "widths.png")

    recipe = ready.recipe
    texts = {RECIPE_FILE: recipe.text}
    trust = recipe.model.trust_remote_code
    finish(
        recipe.output,
        model,
        tokenizer,
        result,
        report,
        texts,
        watch,
        complete,
        placing=unfinished.placing,
        placed=unfinished.finished,
        trust_remote_code=trust,
    )


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
        model = open_model(source.path, recipe.model, device, source.revision)
        measured[name] = evaluation.measure(model, f"evaluating the {name} model")
        del model
        free_memory()
    assert evaluation is not None
    report: dict[str, Any] = {"evaluation": evaluation.report(**measured)}
    if recipe.evaluation.eval_efficiency and distributed.rank() == 0:
        revisions = {name: source.revision for name, source in sources.items() if source.revision} or None
        paths = {name: source.path for name, source in sources.items()}
        report |= efficiency(paths, recipe.model, device, revisions)
    return report
