"""Recipe in, sparse language model out: weights or rows that do not cause a training's errors become zero."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_prune.checkpoint.folder import free_space
from hf_prune.errors import BadInputError
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.finish import Stopwatch
from hf_prune.legcnet.folder import describe_causes, write_causes
from hf_prune.legcnet.target import TargetArguments, next_token_errors
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.report.privacy import may_show_samples
from hf_prune.trained import Start, as_pruned, described, hand_over, prepare, procedure, quality_of
from hf_prune.training.arguments import FreshModelArguments, TrainRecipe, make_training_arguments
from hf_prune.training.causes import target_steps
from hf_prune.training.checkpoints import fingerprint
from hf_prune.training.legcnet import LEGCNetSearch
from hf_prune.training.rounds import Measuring
from hf_prune.training.series import RowSeries, Series, WeightSeries
from hf_prune.weights import WeightView


@dataclass
class WatchedModelArguments(FreshModelArguments, TargetArguments):
    """A language model to watch: where it begins, and what its series may cause."""

    def __post_init__(self) -> None:
        FreshModelArguments.__post_init__(self)
        TargetArguments.__post_init__(self)


def run_weights(recipe: TrainRecipe) -> dict[str, Any]:
    """Record, decide, prune and train what a recipe says; returns the report that stands in the output folder.

    Rounds are kept in `rounds_folder`, from which a run that was cut goes on.

    Raises:
        BadInputError: something handed over cannot be used, and nothing has been written; or the target never changed,
            which is known once the training is over: it stays.
        RunError: the training or the verification failed; finished rounds stay.
    """
    watch = Stopwatch()
    with watch.phase("prepare"):
        start, evaluation, views, search = prepare_weights(recipe)
    with watch.phase("train"):
        model, causes, rounds = search.run()
    model.eval()
    method: LEGCNetConfig = recipe.method
    dense, own = rounds[:2]
    result = as_pruned(model, views, own, method, f"legcnet, {method.decision}")
    perplexities = {found.kind: found.metrics["perplexity"] for found in rounds[1:]}
    report = {
        **described(recipe, start, model, result),
        "legcnet": {
            **describe_causes(causes, method, perplexities),
            "steps": {found.kind: found.steps for found in rounds},
        },
        "seconds": {**watch.seconds, "train": sum(found.seconds for found in rounds)},
        "evaluation": evaluation.report(dense=quality_of(dense), pruned=quality_of(own)),
    }
    if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
        report["samples"] = evaluation.samples(dense=quality_of(dense), pruned=quality_of(own))

    def complete(folder: Path) -> None:
        write_causes(folder, causes, search.series.label, method)

    hand_over(recipe, start, model, result, report, watch, complete)
    return report


def prepare_weights(recipe: TrainRecipe) -> tuple[Start, QualityEvaluation, list[WeightView], LEGCNetSearch]:
    """Everything of a run but the training.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    start, evaluation, views = prepare(recipe)
    config: LEGCNetConfig = recipe.method
    windows, held_out = start.windows.without_last(recipe.fresh.target_windows, "target_windows")
    arguments = make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(len(windows) / batch))
    shared = procedure(recipe, start, evaluation, views, windows)
    search = LEGCNetSearch(
        make_model=lambda: start.make_model(None),
        series=_series(start.make_model(None), views, config, recipe.text.seed, steps, shared["folder"]),
        make_trainer=shared["make_trainer"],
        target=lambda model: next_token_errors(held_out, model),
        figure=lambda model: 1 - next_token_errors(held_out, model),
        # As often as a window ends.
        look_every=config.step * config.record_every,
        benchmark=None,
        measuring=Measuring(shared["evaluate"], shared["evaluation"]),
        config=config,
        steps=steps,
        folder=shared["folder"],
        fingerprint=fingerprint(shared["fingerprint"], {"target": held_out}),
        seed=recipe.text.seed,
    )
    target_steps(config, search.recorded)
    return start, evaluation, views, search


def _series(
    model: nn.Module, views: list[WeightView], config: LEGCNetConfig, seed: int, steps: int, folder: Path
) -> Series:
    """What a recipe watches of a language model.

    Raises:
        BadInputError: its recording would not fit the disk.
    """
    count = {
        "weights": sum(view.shape[0] * view.shape[1] for view in views),
        "sample": sum(min(view.shape[0] * view.shape[1], config.samples_per_matrix) for view in views),
        "rows": sum(view.shape[0] for view in views),
    }[config.series]
    needed, free = 4 * count * (steps // config.record_every), free_space(folder)
    if needed > free:
        raise BadInputError(
            f"series: {count:,} of them over {steps // config.record_every} records take {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; choose sample, rows or units, or raise record_every."
        )
    names = [view.parameter_name for view in views]
    if config.series == "rows":
        return RowSeries(model, names, frozenset(view.parameter_name for view in views if view.transposed))
    return WeightSeries(model, names, config.samples_per_matrix if config.series == "sample" else None, seed)
