"""What procedures that train a language model share: where they begin, how they are measured, what they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, set_seed

from hf_prune.arguments import PruneConfig
from hf_prune.checkpoint.folder import LOGS, RECIPE_FILE, beside
from hf_prune.checkpoint.load import load_config, load_model, load_tokenizer, pick_device
from hf_prune.data.builtin import resolve_model
from hf_prune.data.windows import sequence_length
from hf_prune.description import described_options, environment, zeros_of
from hf_prune.engine import distributed
from hf_prune.engine.results import ViewResult
from hf_prune.errors import BadInputError
from hf_prune.evaluation.quality import Quality, QualityEvaluation
from hf_prune.finish import Stopwatch, efficiency, finish
from hf_prune.plan import make_plan, select_views
from hf_prune.preparation import check_output, check_unpruned
from hf_prune.pruning import PruneResult
from hf_prune.report.plots import plot_sparsity_by_layer
from hf_prune.training.arguments import TrainRecipe, check_smoothing, make_training_arguments
from hf_prune.training.checkpoints import config_of, fingerprint
from hf_prune.training.rounds import MakeTrainer, Round, rounds_place
from hf_prune.training.text import (
    Windows,
    describe_training,
    fresh_config,
    open_text,
    train_tokenizer,
    train_word_tokenizer,
    training_windows,
)
from hf_prune.training.trainer import make_trainer
from hf_prune.weights import WeightView


class Start:
    """Where the rounds begin: tokenizer, config, windows, and a model as often as one is wanted."""

    def __init__(self, recipe: TrainRecipe) -> None:
        self.recipe = recipe
        fresh, model, text = recipe.fresh, recipe.model, recipe.text
        if recipe.output.output_dir:
            # Known before anything is read.
            rounds_place(recipe.output.output_dir, recipe.method.rounds_folder)
        if bool(model.model_name_or_path) == bool(fresh.model_type):
            raise BadInputError("model_name_or_path: name a model to go on with, or a model_type to begin anew.")
        if bool(fresh.model_type) != bool(fresh.tokenizer_name or fresh.vocab_size):
            raise BadInputError("vocab_size: a fresh model, and no other, needs vocab_size or tokenizer_name.")
        self.base_model = self.revision = None
        self.source = None
        if model.model_name_or_path:
            self.source = resolve_model(model.model_name_or_path, model.revision)
            self.base_model, self.revision = self.source.base_model, self.source.revision or model.revision
            check_unpruned(self.source.path, self.revision)
            self.config = load_config(self.source.path, model, self.revision)
            self.tokenizer = load_tokenizer(self.source.path, model, self.revision)
            if "fresh_initialization" in getattr(recipe.method, "controls", ()):
                raise BadInputError("controls: a pretrained model has no fresh initialisation; leave that control out.")
            self.text = open_text(text, self.tokenizer)
            length = sequence_length(self.config, text.seq_length)
        else:
            length = text.seq_length or 128
            self.text = open_text(text)
            train = train_word_tokenizer if fresh.tokenizer_type == "word" else train_tokenizer
            self.tokenizer = (
                train(self.text, fresh.vocab_size, length)
                if fresh.vocab_size
                else load_tokenizer(str(fresh.tokenizer_name), model)
            )
            vocabulary = {
                "vocab_size": len(self.tokenizer),
                "bos_token_id": self.tokenizer.bos_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.pad_token_id,
            }
            self.config = fresh_config(str(fresh.model_type), fresh.config_overrides, vocabulary)
            sequence_length(self.config, length)
        self.windows: Windows = training_windows(self.text, self.tokenizer, length, text.max_train_windows)
        if recipe.training.get("label_smoothing_factor"):
            check_smoothing(recipe.training, type(self.make_model(None)).__name__)

    def make_model(self, seed: int | None) -> Any:
        """The model everything begins with, or one with other initial weights."""
        set_seed(self.recipe.text.seed if seed is None else self.recipe.text.seed + seed)
        if self.source is not None:
            # Small steps on 16-bit weights would be rounded away.
            own = replace(self.recipe.model, dtype="float32")
            return load_model(self.source.path, own, torch.device("cpu"), self.revision).train()
        return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)


def prepare(recipe: TrainRecipe) -> tuple[Start, QualityEvaluation, list[WeightView]]:
    """Where a recipe begins, how it is measured, and the weights that it prunes.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    recipe.require("output_dir", "eval_dataset_name")
    if recipe.model.dtype not in ("auto", "float32"):
        raise BadInputError("dtype: weights train in float32; leave the key out, or write bf16: true.")
    check_output(recipe.output)
    # Before any process group: the arguments bring up the one that training wants.
    make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    distributed.initialise(recipe.model.device)
    pick_device(recipe.model.device, distributed.local_rank())
    start = Start(recipe)
    evaluation = QualityEvaluation(recipe.evaluation, start.tokenizer, start.config)
    views, _ = select_views(start.make_model(None), None, recipe.method.ignore, whole=True)
    if any(view.expert is not None for view in views):
        raise BadInputError(
            "model_type: mixtures of experts are not pruned while they train; choose a model without experts."
        )
    return start, evaluation, views


def trainers(recipe: TrainRecipe, windows: Windows) -> MakeTrainer:
    """Makes a Trainer for each round; every one of them sees the same batches."""

    def make(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        arguments = make_training_arguments(recipe.training, output_dir, recipe.text.seed, recipe.model.device)
        round_name = output_dir.parent.name.removesuffix(".unfinished")
        logs = beside(str(recipe.output.output_dir), LOGS) / round_name
        return make_trainer(Trainer, logs, model=model, args=arguments, train_dataset=windows, callbacks=callbacks)

    return make


def _figures(quality: Quality) -> dict[str, Any]:
    return {
        "perplexity": float(quality.nll.mean().exp()),
        "nll": quality.nll.tolist(),
        "continuations": quality.continuations,
        "seconds": quality.seconds,
    }


def quality_of(found: Round) -> Quality:
    metrics = found.metrics
    return Quality(torch.tensor(metrics["nll"], dtype=torch.float64), metrics["continuations"], metrics["seconds"])


def procedure(
    recipe: TrainRecipe,
    start: Start,
    evaluation: QualityEvaluation,
    views: Sequence[WeightView],
    windows: Windows | None = None,
) -> dict[str, Any]:
    """What every procedure over rounds is made with; `windows` to train on, all of the text's unless given."""
    method, windows = recipe.method, windows if windows is not None else start.windows
    assert recipe.output.output_dir is not None
    return {
        "make_model": start.make_model,
        "names": [view.parameter_name for view in views],
        "make_trainer": trainers(recipe, windows),
        "evaluate": lambda model: _figures(evaluation.measure(model, "evaluating")),
        "config": method,
        "folder": rounds_place(recipe.output.output_dir, method.rounds_folder),
        "fingerprint": fingerprint([recipe.decisive, config_of(start)], {"windows": windows.input_ids}),
        "evaluation": fingerprint(recipe.evaluation.sample_prompts, {"windows": evaluation.windows.input_ids}),
    }


def described(
    recipe: TrainRecipe, start: Start, model: Any, result: PruneResult, windows: Windows | None = None
) -> dict[str, Any]:
    """What every report of a training says; `windows` that were trained on, all of the text's unless given."""
    arguments = make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    return {
        **environment(),
        "base_model": start.base_model,
        "base_revision": start.revision,
        "base_license": start.source.license if start.source else None,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "method": {
            **asdict(recipe.method.info),
            "pattern": "unstructured",
            "options": described_options(recipe.method),
        },
        "training": describe_training(start.text, windows or start.windows, arguments),
        **zeros_of(model, result, sum(parameter.numel() for parameter in model.parameters())),
        "seed": recipe.text.seed,
        "hub_model_id": recipe.output.hub_model_id,
        "command": f"hf-prune train --config {RECIPE_FILE}",
    }


def as_pruned(model: nn.Module, views: Sequence[WeightView], found: Round, config: Any, allocation: str) -> PruneResult:
    """A trained model in the words of every other pruning; `allocation` says what decided its densities."""
    densities = {view.name: found.layers[view.parameter_name] / (view.shape[0] * view.shape[1]) for view in views}
    by_parameter = {view.parameter_name: view.name for view in views}
    named = PruneConfig(method=config.info.name, sparsity=min(found.sparsity, 1 - 1e-9))
    plan = make_plan(model, named, views, densities, held=frozenset(by_parameter[name] for name in found.held))
    plan.allocation, plan.min_keep_ratio = allocation, getattr(config, "min_keep_ratio", 0.0)
    live = {view.name: view for view in select_views(model, None, config.ignore, whole=True)[0]}
    return PruneResult(plan, [ViewResult(name, live[name].count_nonzero(), 0, None) for name in densities], 0.0)


def hand_over(
    recipe: TrainRecipe,
    start: Start,
    model: Any,
    result: PruneResult,
    report: dict[str, Any],
    watch: Stopwatch,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the folder: efficiency, plots, verification, card; `add` puts what is the method's own into it."""
    device = torch.device(pick_device(recipe.model.device, distributed.local_rank()).type)

    def complete(folder: Path) -> None:
        if recipe.evaluation.eval_efficiency:
            with watch.phase("efficiency"):
                models: dict[str, str | Path] = {"dense": start.source.path} if start.source else {}
                revisions = {"dense": start.revision} if start.revision else None
                report.update(efficiency({**models, "pruned": folder}, recipe.model, device, revisions))
        plot_sparsity_by_layer(report["views"], folder / "plots" / "sparsity_by_layer.png")
        add(folder)

    if distributed.rank() == 0:
        finish(
            recipe.output,
            model,
            start.tokenizer,
            result,
            report,
            {RECIPE_FILE: recipe.text_as_run},
            watch,
            complete,
            trust_remote_code=recipe.model.trust_remote_code,
        )
