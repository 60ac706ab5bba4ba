"""A pruned folder in, a better one out: a short training whose result keeps every zero and the whole provenance."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.folder import PLAN_FILE, RECIPE_FILE, RECOVERY_FILE, REPORT_FILE
from hf_prune.checkpoint.load import load_config, load_model, load_tokenizer, pick_device
from hf_prune.data.builtin import resolve_model
from hf_prune.data.windows import default_seq_length
from hf_prune.description import environment, zeros_of
from hf_prune.engine import distributed
from hf_prune.engine.walk import ViewResult
from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation.perplexity import perplexity
from hf_prune.evaluation.quality import Quality, QualityEvaluation
from hf_prune.finish import Stopwatch, efficiency, finish
from hf_prune.plan import Plan
from hf_prune.preparation import check_output
from hf_prune.pruning import PruneResult
from hf_prune.recipe import parse_yaml
from hf_prune.report.plots import plot_sparsity_by_layer
from hf_prune.report.privacy import is_private
from hf_prune.training.arguments import TrainRecipe, make_trainer, make_training_arguments
from hf_prune.training.checkpoints import StopAtNaN, last_checkpoint
from hf_prune.training.distillation import DistillationTrainer
from hf_prune.training.lora import MaskedLora
from hf_prune.training.masks import MaskCallback, masks_of
from hf_prune.training.text import open_text, training_windows
from hf_prune.weights import WeightView, find_views


class PrunedFolder:
    """A folder that hf_prune has written: its plan, report and recipes.

    Raises:
        BadInputError: it is none.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        if not (self.path / REPORT_FILE).is_file() or not (self.path / PLAN_FILE).is_file():
            raise BadInputError(
                f"{path}: there is no pruned model that hf_prune has written; give the output_dir of `hf-prune prune`."
            )
        self.plan = Plan.load(self.path / PLAN_FILE)
        self.report: dict[str, Any] = json.loads((self.path / REPORT_FILE).read_text(encoding="utf-8"))
        names = [RECIPE_FILE, *(RECOVERY_FILE.format(number) for number in ("", *range(2, 100)))]
        self.recipes = {
            name: (self.path / name).read_text(encoding="utf-8") for name in names if (self.path / name).is_file()
        }

    @property
    def dense_model(self) -> str | None:
        """What the pruning began with, where the recipe says so."""
        named = parse_yaml(self.recipes.get(RECIPE_FILE, ""), RECIPE_FILE).get("model_name_or_path")
        return str(named) if named else None


def recover(path: str, recipe: TrainRecipe) -> dict[str, Any]:
    """Train the pruned model in `path` as a recipe says; returns the report that stands in the output folder.

    Checkpoints are kept in `OUTPUT_DIR.training`, and a run that was cut goes on from the last one; the folder is
    removed at the end.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: the training or the verification failed; checkpoints stay.
    """
    recipe.require("output_dir", "eval_dataset_name")
    folder = PrunedFolder(path)
    check_output(recipe.output)
    watch = Stopwatch()
    with watch.phase("prepare"):
        work = Path(f"{recipe.output.output_dir}.training").absolute()
        arguments = make_training_arguments(recipe.training, work, recipe.text.seed, recipe.model.device)
        distributed.initialise(recipe.model.device)
        device = pick_device(recipe.model.device, distributed.local_rank())
        source = str(folder.path)
        model_config = load_config(source, recipe.model)
        tokenizer = load_tokenizer(source, recipe.model)
        text = open_text(recipe.text, tokenizer)
        length = recipe.text.seq_length or default_seq_length(model_config)
        windows = training_windows(text, tokenizer, length, recipe.text.max_train_windows)
        evaluation = QualityEvaluation(recipe.evaluation, tokenizer, model_config)
        dense_name = recipe.method.base_model or folder.dense_model
        if recipe.method.loss == "distillation" and not dense_name:
            raise BadInputError(
                "base_model: distillation needs the dense model, which the folder's recipe does not name; give it."
            )
        model = load_model(source, recipe.model, device)
        dense = _load_dense(dense_name, recipe.model, device, model) if dense_name else None
    qualities: dict[str, Quality] = {}
    with watch.phase("evaluate"):
        if dense is not None:
            qualities["dense"] = evaluation.measure(dense, "evaluating the dense model")
        before = evaluation.measure(model, "evaluating before the training")
    views = _views(model, folder.plan)
    masks = masks_of(model, [view.parameter_name for view in views])
    with watch.phase("train"):
        trainer = _train(recipe, model, dense, views, masks, windows, arguments, work)
    model.eval()
    del dense
    _check_zeros(model, masks)
    with watch.phase("evaluate"):
        qualities["pruned"] = evaluation.measure(model, "evaluating after the training")
    report = {
        **folder.report,
        **environment(),
        "evaluation": _measured(evaluation, qualities, folder.report),
        "seconds": {
            **folder.report.get("seconds", {}),
            **{f"recovery, {key}": own for key, own in watch.seconds.items()},
        },
        "hub_model_id": recipe.output.hub_model_id,
    }
    for gone in ("efficiency", "displacement", "samples"):
        report.pop(gone, None)
    result = _result(folder.plan, model, views)
    if "structure" not in report:
        report |= {**zeros_of(model, result, sum(own.numel() for own in model.parameters())), "reconstruction": []}
    report["recoveries"] = [
        *folder.report.get("recoveries", []),
        {
            "title": recipe.method.title,
            "options": asdict(recipe.method),
            "training": {
                "dataset": text.name,
                "config": text.config,
                "split": text.split,
                "revision": text.revision,
                "private": text.private,
                "seq_length": length,
                "windows": len(windows),
                "steps": trainer.state.global_step,
                "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
                "learning_rate": arguments.learning_rate,
                "seconds": watch.seconds["train"],
            },
            "perplexity_before": perplexity(before.nll),
            "perplexity_after": perplexity(qualities["pruned"].nll),
            "gap_closed": _gap_closed(qualities, before),
        },
    ]
    if recipe.evaluation.sample_prompts and "dense" in qualities:
        report["samples"] = evaluation.samples(**qualities)

    def complete(place: Path) -> None:
        if recipe.evaluation.eval_efficiency and dense_name:
            with watch.phase("efficiency"):
                models: dict[str, str | Path] = {"dense": resolve_model(dense_name).path, "pruned": place}
                report.update(efficiency(models, recipe.model, device, None))
        if "structure" not in report:
            plot_sparsity_by_layer(report["views"], place / "plots" / "sparsity_by_layer.png")

    number = len(report["recoveries"])
    recipes = {**folder.recipes, RECOVERY_FILE.format("" if number == 1 else number): recipe.text_as_run}
    if distributed.rank() == 0:
        trust = recipe.model.trust_remote_code
        finish(recipe.output, model, tokenizer, result, report, recipes, watch, complete, trust_remote_code=trust)
        shutil.rmtree(work, ignore_errors=True)
    return report


def _load_dense(name: str, arguments: ModelArguments, device: Any, pruned: PreTrainedModel) -> Any:
    """The dense model in the pruned one's dtype, with its vocabulary."""
    source = resolve_model(name)
    dtype = str(pruned.dtype).removeprefix("torch.")
    dense = load_model(source.path, ModelArguments(dtype=dtype, trust_remote_code=arguments.trust_remote_code), device)
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise BadInputError(
            f"base_model: {name} has {dense.config.vocab_size:,} tokens and the pruned model "
            f"{pruned.config.vocab_size:,}; name the model that was pruned."
        )
    return dense


def _views(model: nn.Module, plan: Plan) -> list[WeightView]:
    """The pruned matrices, or where units went all matrices of the blocks."""
    named = {view.name for view in plan.views}
    return [view for view in find_views(model) if view.name in named]


def _train(
    recipe: TrainRecipe,
    model: Any,
    dense: Any,
    views: list[WeightView],
    masks: dict[str, Tensor],
    windows: Any,
    arguments: Any,
    work: Path,
) -> Trainer:
    method = recipe.method
    set_seed(recipe.text.seed)
    callbacks: list[TrainerCallback] = [StopAtNaN("recovery", work)]
    adapters = None
    trained: nn.Module = model.train()
    if method.recovery == "lora":
        adapters = MaskedLora(model, views, masks, method.lora_rank, method.lora_alpha)
        trained = adapters.model
    else:
        callbacks.append(MaskCallback(masks))
    common: dict[str, Any] = {"model": trained, "args": arguments, "train_dataset": windows, "callbacks": callbacks}
    trainer: Trainer
    if method.loss == "distillation":
        temperature = method.distillation_temperature
        trainer = make_trainer(DistillationTrainer, **common, teacher=dense, temperature=temperature)
    else:
        trainer = make_trainer(Trainer, **common)
    last = last_checkpoint(work)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if adapters is not None:
        adapters.merge()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    return trainer


def _check_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        if bool((model.get_parameter(name).detach().cpu().masked_fill(mask.cpu(), 0) != 0).any()):
            raise RunError(f"{name}: the training brought pruned weights back; nothing was saved, please report this.")


def _result(plan: Plan, model: nn.Module, views: list[WeightView]) -> PruneResult:
    live = {view.name: view for view in views}
    return PruneResult(plan, [ViewResult(own.name, live[own.name].count_nonzero(), 0) for own in plan.views], 0.0)


def _measured(evaluation: QualityEvaluation, qualities: dict[str, Quality], before: dict[str, Any]) -> dict[str, Any]:
    """The report's `evaluation` entry; a text that the pruning's recipe kept to itself stays unnamed."""
    entry = evaluation.report(**qualities)
    entry["private"] = entry["private"] or is_private(before.get("evaluation"))
    return entry


def _gap_closed(qualities: dict[str, Quality], before: Quality) -> float | None:
    """Share of the rise of log-perplexity that the training took back; None without the dense model."""
    if "dense" not in qualities:
        return None
    dense, after = (float(qualities[key].nll.mean()) for key in ("dense", "pruned"))
    was = float(before.nll.mean())
    return (was - after) / (was - dense) if was > dense else None
