"""Recipe in, a model that was sparse from its first step out, in a folder like any other."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from hf_prune.evaluation.perplexity import window_nll
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.finish import Stopwatch
from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
from hf_prune.report.privacy import may_show_samples
from hf_prune.trained import Start, as_pruned, described, hand_over, prepare, procedure, quality_of
from hf_prune.training.arguments import TrainRecipe
from hf_prune.training.dynamic import DynamicSparseTraining
from hf_prune.training.text import Windows
from hf_prune.weights import WeightView

# Of the training's windows, the last so many tell when averaging begins; they are not trained on.
HELD_OUT = 16


def run_sparse(recipe: TrainRecipe, notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train as a recipe says; returns the report that stands in the output folder.

    Trainings are kept in `rounds_folder`, from which a run that was cut goes on. `notes` go into the report.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: the training or the verification failed; checkpoints stay.
    """
    watch = Stopwatch()
    with watch.phase("prepare"):
        start, evaluation, views, training, windows = prepare_sparse(recipe)
    with watch.phase("train"):
        model, rounds = training.run()
    model.eval()
    method: DynamicSparseConfig = recipe.method
    allocation = f"dynamic_sparse, {method.initialization}, {method.redistribution}"
    result = as_pruned(model, views, rounds[-1], method, allocation)
    qualities = {"dense" if own.kind == "dense" else "pruned": quality_of(own) for own in rounds}
    report = {
        **described(recipe, start, model, result, windows),
        "seconds": {**watch.seconds, "train": sum(own.seconds for own in rounds)},
        "evaluation": evaluation.of(model).report(**qualities),
        **(notes or {}),
    }
    if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
        report["samples"] = evaluation.samples(**qualities)
    hand_over(recipe, start, model, result, report, watch)
    return report


def prepare_sparse(
    recipe: TrainRecipe,
) -> tuple[Start, QualityEvaluation, list[WeightView], DynamicSparseTraining, Windows]:
    """Everything of a run but the training.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    start, evaluation, views = prepare(recipe)
    method: DynamicSparseConfig = recipe.method
    windows, held_out = start.windows.without_last(HELD_OUT if method.averaging else 0, "averaging")

    def held_out_loss(model: nn.Module) -> float:
        training = model.training
        model.eval()
        try:
            return float(window_nll(cast("PreTrainedModel", model), held_out).mean())
        finally:
            model.train(training)

    training = DynamicSparseTraining(
        **procedure(recipe, start, evaluation, views, windows),
        seed=recipe.text.seed,
        held_out_loss=held_out_loss,
    )
    return start, evaluation, views, training, windows
