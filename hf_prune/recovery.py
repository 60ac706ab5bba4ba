"""A pruned folder in, a better one out: a short training whose result keeps every zero and the whole provenance."""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.folder import LOGS, RECOVERY_FILE, beside
from hf_prune.checkpoint.load import free_memory, load_model
from hf_prune.description import environment, zeros_of
from hf_prune.engine import distributed
from hf_prune.engine.results import ViewResult
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import bootstrap_ratio, perplexity
from hf_prune.evaluation.quality import Quality, QualityEvaluation
from hf_prune.finish import Stopwatch, efficiency, finish
from hf_prune.plan import Plan
from hf_prune.pruning import PruneResult
from hf_prune.recovery_setup import PrunedFolder, Ready, prepare_recovery
from hf_prune.report.plots import plot_sparsity_by_layer
from hf_prune.report.privacy import is_private, may_show_samples
from hf_prune.training.arguments import TrainRecipe
from hf_prune.training.checkpoints import IDENTITY, StopAtNaN, alone_in, claim, config_of, fingerprint, last_checkpoint
from hf_prune.training.distillation import DistillationTrainer
from hf_prune.training.lora import MaskedLora
from hf_prune.training.masks import MaskCallback, check_zeros, masks_of
from hf_prune.training.text import describe_training
from hf_prune.training.trainer import in_float32, make_trainer, only_weights_change, train
from hf_prune.weights import WeightView, find_named

logger = logging.getLogger(__name__)


def recover(path: str, recipe: TrainRecipe) -> dict[str, Any]:
    """Train the pruned model in `path` as a recipe says; returns the report that stands in the output folder.

    Checkpoints are kept in `OUTPUT_DIR.training`, and a run that was cut goes on from the last one; the folder is
    removed at the end.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: the training or the verification failed; checkpoints stay.
    """
    watch = Stopwatch()
    with watch.phase("prepare"):
        ready = prepare_recovery(path, recipe)
    with alone_in(ready.work):
        return _recover(ready, watch)


def _recover(ready: Ready, watch: Stopwatch) -> dict[str, Any]:
    recipe = ready.recipe
    with watch.phase("prepare"):
        folder, evaluation, device = ready.folder, ready.evaluation, ready.device
        model = load_model(str(folder.path), recipe.model, device)
        views = _views(model, folder.plan)
        masks = masks_of(model, _trained_names(model, recipe, views))
        dense = _load_dense(ready, model)
        _claim(ready, model)
    qualities: dict[str, Quality] = {}
    with watch.phase("evaluate"):
        if dense is not None:
            qualities["dense"] = evaluation.measure(dense, "evaluating the dense model")
        before = evaluation.measure(model, "evaluating before the training")
    if recipe.method.loss != "distillation":
        dense = None
        free_memory()
    with watch.phase("train"):
        steps, seconds = _train(ready, model, dense, views, masks)
    del dense
    free_memory()
    for name, mask in masks.items():
        check_zeros(name, model.get_parameter(name), mask)
    with watch.phase("evaluate"):
        qualities["pruned"] = evaluation.measure(model, "evaluating after the training")
    number = len(folder.report.get("recoveries", [])) + 1
    again = "" if number == 1 else f" {number}"
    report = {
        **folder.report,
        **environment(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "evaluation": _measured(evaluation, qualities, folder.report),
        "seconds": {
            **folder.report.get("seconds", {}),
            **{f"recovery{again}, {key}": own for key, own in {**watch.seconds, "train": seconds}.items()},
        },
        "hub_model_id": recipe.output.hub_model_id,
    }
    for gone in ("efficiency", "displacement", "samples"):
        report.pop(gone, None)
    result = _result(folder, model, views)
    if "structure" not in report:
        report |= {**zeros_of(model, result, sum(own.numel() for own in model.parameters())), "reconstruction": []}
    report["recoveries"] = [
        *folder.report.get("recoveries", []),
        {
            "title": recipe.method.title,
            "options": asdict(recipe.method),
            "training": {
                **describe_training(ready.text, ready.windows, ready.arguments, steps),
                "seconds": seconds,
            },
            "perplexity_before": perplexity(before.nll),
            "perplexity_after": perplexity(qualities["pruned"].nll),
            "gap_closed": _gap_closed(qualities, before),
        },
    ]
    may_show = may_show_samples(report, asdict(recipe.output))
    if recipe.evaluation.sample_prompts and may_show:
        report["samples"] = evaluation.samples(**qualities)

    def complete(place: Path) -> None:
        if recipe.evaluation.eval_efficiency:
            baseline = ready.dense if "dense" in qualities else None
            with watch.phase("efficiency"):
                models: dict[str, str | Path] = {"dense": baseline.path} if baseline else {}
                models["pruned"] = place
                revisions = {"dense": baseline.revision} if baseline and baseline.revision else None
                report.update(efficiency(models, recipe.model, device, revisions))
        if "structure" not in report:
            plot_sparsity_by_layer(report["views"], place / "plots" / "sparsity_by_layer.png")

    recipes = {**folder.recipes, RECOVERY_FILE.format("" if number == 1 else number): recipe.text_as_run}
    if distributed.rank() == 0:
        trust = recipe.model.trust_remote_code
        finish(recipe.output, model, ready.tokenizer, result, report, recipes, watch, complete, trust_remote_code=trust)
        shutil.rmtree(ready.work, ignore_errors=True)
    return report


def _load_dense(ready: Ready, pruned: PreTrainedModel) -> Any:
    """The dense model in the pruned one's dtype, with its vocabulary; None where it is not there and can be spared."""
    if ready.dense is None:
        return None
    dtype = str(pruned.dtype).removeprefix("torch.")
    own = ModelArguments(dtype=dtype, trust_remote_code=ready.recipe.model.trust_remote_code)
    try:
        dense = load_model(ready.dense.path, own, ready.device, ready.dense.revision)
    except BadInputError as error:
        if ready.recipe.method.needs_dense:
            raise
        logger.warning("The dense model is not measured: %s", error)
        return None
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise BadInputError(
            f"base_model: {ready.dense.path} has {dense.config.vocab_size:,} tokens and the pruned model "
            f"{pruned.config.vocab_size:,}; name the model that was pruned."
        )
    return dense


def _leave(work: Path) -> None:
    """Nothing stays of a training that never began."""
    if distributed.rank() == 0 and not any(work.glob("checkpoint-*")):
        (work / IDENTITY).unlink(missing_ok=True)


def _views(model: nn.Module, plan: Plan) -> list[WeightView]:
    """The pruned matrices, or where units went all matrices of the blocks.

    Raises:
        BadInputError: the plan speaks of others.
    """
    views = {view.name: view for view in find_named(model, [view.name for view in plan.views])}
    for own in plan.views:
        found = views.get(own.name)
        if found is None or tuple(found.shape) != tuple(own.shape):
            there = "is not in the model" if found is None else f"is {list(found.shape)} in the model"
            raise BadInputError(
                f"prune_plan.json: {own.name} is {list(own.shape)} in the plan and {there}; they are of two models, "
                "get the folder again."
            )
    return list(views.values())


def _trained_names(model: nn.Module, recipe: TrainRecipe, views: list[WeightView]) -> set[str]:
    """The matrices that move: those with adapters, or all, of which others may have been pruned before."""
    if recipe.method.recovery == "lora":
        return {view.parameter_name for view in views}
    return {name for name, parameter in model.named_parameters() if parameter.ndim > 1}


def _claim(ready: Ready, model: nn.Module) -> None:
    """Raise BadInputError where another training's checkpoints are in the way."""
    decided = [asdict(ready.recipe.method), ready.recipe.decisive, config_of(model)]
    identity = {
        "training": fingerprint(decided, {"windows": ready.windows.input_ids}),
        "weights": fingerprint("", model.state_dict()),
        "processes": distributed.world_size(),
    }
    claim(ready.work, identity, last_checkpoint(ready.work) is not None)


def _train(
    ready: Ready, model: Any, dense: Any, views: list[WeightView], masks: dict[str, Tensor]
) -> tuple[int, float]:
    """Train in place; returns the steps and the seconds that it took over all sessions."""
    method, work = ready.recipe.method, ready.work
    set_seed(ready.recipe.text.seed)
    checkpoint = last_checkpoint(work)
    callbacks: list[TrainerCallback] = [StopAtNaN("recovery", work)]
    with ExitStack() as stack:
        stack.callback(_leave, work)
        trained: nn.Module = model
        if method.recovery == "lora":
            adapters = MaskedLora(model, views, masks, method.rank, method.alpha)
            trained = adapters.model
            stack.callback(model.requires_grad_, True)
            stack.callback(adapters.merge)
        else:
            stack.enter_context(in_float32(model))
            callbacks.append(MaskCallback(masks))
        with only_weights_change(trained):
            common: dict[str, Any] = {
                "model": trained, "args": ready.arguments, "train_dataset": ready.windows, "callbacks": callbacks,
                "logs": beside(str(ready.recipe.output.output_dir), LOGS),
            }  # fmt: skip
            trainer: Trainer
            if method.loss == "distillation":
                trainer = make_trainer(DistillationTrainer, **common, teacher=dense, temperature=method.temperature)
            else:
                trainer = make_trainer(Trainer, **common)
            seconds = train(trainer, checkpoint)
    return int(trainer.state.global_step), seconds


def _result(folder: PrunedFolder, model: nn.Module, views: list[WeightView]) -> PruneResult:
    """What there is now; what only the pruning saw is what its report says."""
    live = {view.name: view for view in views}
    said = {row.get("name"): row for row in folder.report.get("views", [])}
    outcome = []
    for own in folder.plan.views:
        row, kept = said.get(own.name, {}), live[own.name].count_nonzero()
        # Where units went, a zero that is there is none of the pruning's.
        before = row.get("zeros_before", 0) if said else math.prod(live[own.name].shape) - kept
        outcome.append(ViewResult(own.name, kept, before, scarce=row.get("scarce", False)))
    return PruneResult(folder.plan, outcome, 0.0)


def _measured(evaluation: QualityEvaluation, qualities: dict[str, Quality], before: dict[str, Any]) -> dict[str, Any]:
    """The report's `evaluation` entry; a text that the pruning's recipe kept to itself stays unnamed."""
    entry = evaluation.report(**qualities)
    entry["private"] = entry["private"] or is_private(before.get("evaluation"))
    return entry


def _gap_closed(qualities: dict[str, Quality], before: Quality) -> float | None:
    """Share of the rise of log-perplexity that the training took back; None where there is none beyond chance."""
    if "dense" not in qualities:
        return None
    _, low, _ = bootstrap_ratio(qualities["dense"].nll, before.nll)
    if low is None or low <= 1:
        return None
    dense, after = (float(qualities[key].nll.mean()) for key in ("dense", "pruned"))
    was = float(before.nll.mean())
    return (was - after) / (was - dense)
