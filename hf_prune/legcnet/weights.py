"""Recipe in, sparse language model out: weights or rows that do not cause a training's errors become zero."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from hf_prune.checkpoint.folder import free_space
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.finish import Stopwatch
from hf_prune.legcnet.folder import describe_causes, seconds_to_benchmark, write_causes
from hf_prune.legcnet.target import next_token_errors
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.report.cause_plots import plot_moved
from hf_prune.report.privacy import may_show_samples
from hf_prune.trained import Start, as_pruned, described, hand_over, prepare, procedure, quality_of
from hf_prune.training.arguments import TrainRecipe, make_training_arguments, planned_steps
from hf_prune.training.causes import target_steps
from hf_prune.training.checkpoints import fingerprint
from hf_prune.training.legcnet import LEGCNetSearch
from hf_prune.training.recorder import VALUES
from hf_prune.training.rounds import Look, Measuring, Round
from hf_prune.training.series import RowSeries, Series, WeightSeries
from hf_prune.training.text import Windows
from hf_prune.weights import WeightView


@dataclass
class Prepared:
    """A recipe's text, model, evaluation and procedure, before anything is trained; `windows` are trained on."""

    start: Start
    evaluation: QualityEvaluation
    views: list[WeightView]
    windows: Windows
    search: LEGCNetSearch


def run_weights(recipe: TrainRecipe) -> dict[str, Any]:
    """Record, decide, prune and train what a recipe says; returns the report that stands in the output folder.

    Every training takes all of its steps, so that the models differ in what was pruned alone. Rounds are kept in
    `rounds_folder`, from which a run that was cut goes on.

    Raises:
        BadInputError: something handed over cannot be used, and nothing has been written; or the target never changed,
            which is known once the training is over: it stays.
        RunError: the training or the verification failed; finished rounds stay.
    """
    watch = Stopwatch()
    with watch.phase("prepare"):
        ready = prepare_weights(recipe)
        start, evaluation, search = ready.start, ready.evaluation, ready.search
    with watch.phase("train"):
        model, causes, rounds = search.run()
    model.eval()
    method: LEGCNetConfig = recipe.method
    dense, own = rounds[:2]
    result = as_pruned(model, ready.views, own, method, f"legcnet, {method.decision}")
    perplexities = {found.kind: found.metrics["perplexity"] for found in rounds[1:]}
    report = {
        **described(recipe, start, model, result, ready.windows),
        "legcnet": {
            **describe_causes(causes, method, perplexities),
            "rounds": [_summary(found, search.reached(found, dense), causes.seconds, method) for found in rounds],
        },
        "seconds": {**watch.seconds, "train": sum(found.seconds for found in rounds)},
        "evaluation": evaluation.of(model).report(dense=quality_of(dense), pruned=quality_of(own)),
    }
    if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
        report["samples"] = evaluation.samples(dense=quality_of(dense), pruned=quality_of(own))

    def add(folder: Path) -> None:
        write_causes(folder, causes, search.series.label, method)
        plot_moved([by_kind(found) for found in rounds[:2]], folder / "plots" / "moved.png")

    hand_over(recipe, start, model, result, report, watch, add)
    return report


def prepare_weights(recipe: TrainRecipe) -> Prepared:
    """Everything of a run but the training.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    start, evaluation, views = prepare(recipe)
    config: LEGCNetConfig = recipe.method
    windows, held_out = start.windows.without_last(recipe.fresh.target_windows, "target_windows")
    arguments = make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    steps = planned_steps(arguments, len(windows))
    shared = procedure(recipe, start, evaluation, views, windows)
    recorded = config.recorded(steps)
    room = partial(_check_room, config, views, recorded // config.record_every, shared["folder"])
    distributed.all_or_none(lambda: room() if distributed.rank() == 0 else None)
    target_steps(config, recorded)
    search = LEGCNetSearch(
        make_model=lambda: start.make_model(None),
        series=_series(start.make_model(None), views, config, recipe.text.seed),
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
        stop_there=False,
    )
    return Prepared(start, evaluation, views, windows, search)


def by_kind(found: Round) -> Round:
    """A round whose layers are kinds of module, all blocks together."""

    def kind(name: str) -> str:
        return re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight").rpartition(".*.")[2]

    moved = []
    for look in found.moved:
        squares: dict[str, float] = defaultdict(float)
        for name, norm in look.items():
            squares[kind(name)] += norm**2
        moved.append({own: math.sqrt(value) for own, value in squares.items()})
    layers: dict[str, int] = defaultdict(int)
    for name, count in found.layers.items():
        layers[kind(name)] += count
    return replace(found, layers=dict(layers), moved=moved)


def _summary(found: Round, reached: Look | None, seconds: dict[str, float], method: LEGCNetConfig) -> dict[str, Any]:
    """What the report says of a round; accuracy is that on the target's windows behind the last look."""
    return {
        "kind": found.kind,
        "kept": found.kept,
        "collapsed": found.collapsed,
        "perplexity": found.metrics["perplexity"],
        "accuracy": found.looks[-1][1] if found.looks else None,
        "steps": found.steps,
        "steps_to_benchmark": reached[0] if reached else None,
        "seconds_to_benchmark": seconds_to_benchmark(found.kind, reached, seconds, method.restart),
        "seconds": found.seconds,
    }


def _check_room(config: LEGCNetConfig, views: list[WeightView], records: int, folder: Path) -> None:
    """Raise BadInputError where a recording would not fit the disk, or its test the memory."""
    sizes = [view.shape[0] * view.shape[1] for view in views]
    count = {
        "weights": sum(sizes),
        "sample": sum(min(size, config.samples_per_matrix) for size in sizes),
        "rows": sum(view.shape[0] for view in views),
    }[config.series]
    there = sum(file.stat().st_size for file in folder.rglob(VALUES))
    disk = 4 * count * records * (2 if config.perturbation else 1) - there
    # Exponents in float32, twice while they are put together, and in float64 for the test, with p and BIC of each lag.
    windows = max((records - config.window) // config.step + 1, 0)
    memory = 16 * count * (windows + config.max_lag)
    for needed, free, where in (
        (disk, free_space(folder), "disk"),
        (memory, psutil.virtual_memory().available, "memory"),
    ):
        if needed > free:
            raise BadInputError(
                f"series: {count:,} of them over {records} records need {needed / 1e9:.1f} GB of {where} and "
                f"{free / 1e9:.1f} GB are free; choose sample, rows or units, or raise record_every."
            )


def _series(model: nn.Module, views: list[WeightView], config: LEGCNetConfig, seed: int) -> Series:
    names = [view.parameter_name for view in views]
    if config.series == "rows":
        return RowSeries(model, names, frozenset(view.parameter_name for view in views if view.transposed))
    return WeightSeries(model, names, config.samples_per_matrix if config.series == "sample" else None, seed)
