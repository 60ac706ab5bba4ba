"""Recipe in, folder out: LEGCNet on a perceptron, beside magnitude and chance at the same count."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from hf_prune.checkpoint.folder import LOGS, RECIPE_FILE, beside, check_output_folder, output_folder
from hf_prune.description import described_options, environment
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.evaluation.explanation import alphas, mean_shap, rank_correlation, require_explanations
from hf_prune.legcnet.folder import seconds_to_benchmark, write_causes
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.report.cause_plots import plot_moved
from hf_prune.training.arguments import TrainRecipe, make_training_arguments, planned_steps, steps_of_an_epoch
from hf_prune.training.causes import target_steps
from hf_prune.training.checkpoints import fingerprint
from hf_prune.training.legcnet import LEGCNetSearch
from hf_prune.training.rounds import Look, Measuring, Round, rounds_place
from hf_prune.training.series import RowSeries, Series, WeightSeries
from hf_prune.training.tabular import Perceptron, PerceptronConfig, Rows, load_table
from hf_prune.training.trainer import make_trainer

LEGCNET_REPORT = "legcnet_report.json"


def run_legcnet(recipe: TrainRecipe) -> dict[str, Any]:
    """Record, decide, prune and train what a recipe says; returns the report that stands in the output folder.

    Rounds are kept in `OUTPUT_DIR.rounds`, from which a run that was cut goes on.

    Raises:
        BadInputError: something handed over cannot be used, and nothing has been written; or the target never changed,
            which is known once the training is over: it stays.
        RunError: the loss is not a number; finished rounds stay.
    """
    output = recipe.output
    search, steps_an_epoch = prepare_legcnet(recipe)
    model, causes, rounds = search.run()
    dense = rounds[0]
    # Layers that `ignore` names are connections too.
    unwatched = sum(own.numel() for own in model.parameters() if own.ndim == 2) - dense.total
    report = {
        **environment(),
        "method": {**asdict(recipe.method.info), "options": described_options(recipe.method)},
        "dataset": recipe.text.dataset_name,
        "sizes": _perceptron(model).config.sizes,
        "seed": recipe.text.seed,
        "steps_an_epoch": steps_an_epoch,
        "recorded_steps": search.recorded,
        "benchmark": search.benchmark_of(dense),
        "series": {
            "all": len(causes.keep),
            "kept": int(causes.keep.sum()),
            "untested": int((~causes.tested).sum()),
            "windows": causes.exponents.shape[1],
        },
        "seconds": {**causes.seconds, **{found.kind: found.seconds for found in rounds}},
        "rounds": [
            {
                **_summary(found, dense, reached, steps_an_epoch, unwatched),
                "seconds_to_benchmark": seconds_to_benchmark(
                    found.kind, reached, causes.seconds, recipe.method.restart
                ),
            }
            for found in rounds
            for reached in [search.reached(found, dense)]
        ],
        "command": f"hf-prune train --config {RECIPE_FILE}",
    }
    if distributed.rank() == 0:
        assert output.output_dir is not None
        with output_folder(output.output_dir, output.overwrite_output_dir) as folder:
            _perceptron(model).save_pretrained(folder)
            write_causes(folder, causes, search.series.label, search.config)
            plot_moved(rounds[:2], folder / "plots" / "moved.png", steps_an_epoch)
            (folder / RECIPE_FILE).write_text(recipe.text_as_run, encoding="utf-8")
            (folder / LEGCNET_REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def prepare_legcnet(recipe: TrainRecipe) -> tuple[LEGCNetSearch, int]:
    """Everything of a run but the training, and the steps of an epoch.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    recipe.require("output_dir", "dataset_name")
    config: LEGCNetConfig = recipe.method
    output_dir = str(recipe.output.output_dir)
    if recipe.output.push_to_hub:
        raise BadInputError("push_to_hub: a perceptron is no language model; leave the key out.")
    if recipe.training.get("dataloader_drop_last"):
        raise BadInputError("dataloader_drop_last: an epoch is all rows; leave the key out.")
    if config.series == "units":
        raise BadInputError("series: a perceptron has weights and rows; choose weights, sample or rows.")
    if recipe.fresh.explain:
        require_explanations()
    check_output_folder(output_dir, recipe.output.overwrite_output_dir)
    # Before any process group: the arguments bring up the one that training wants.
    arguments = make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    distributed.initialise(recipe.model.device)
    training, held_out = load_table(recipe.text)
    steps_an_epoch = steps_of_an_epoch(arguments, len(training))
    sizes = [
        training.inputs.shape[1], *(int(size) for size in recipe.fresh.hidden_sizes), int(training.labels.max()) + 1
    ]  # fmt: skip

    def make_model() -> Perceptron:
        set_seed(recipe.text.seed)
        return Perceptron(PerceptronConfig(sizes, recipe.fresh.activation))

    def make(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        own = make_training_arguments(recipe.training, output_dir, recipe.text.seed, recipe.model.device)
        logs = beside(str(recipe.output.output_dir), LOGS) / output_dir.parent.name.removesuffix(".unfinished")
        return make_trainer(Trainer, logs, model=model, args=own, train_dataset=training, callbacks=callbacks)

    search = LEGCNetSearch(
        make_model=make_model,
        series=_series(make_model(), config, recipe.text.seed),
        make_trainer=make,
        target=lambda model: 1 - training.figures(model)[0],
        figure=lambda model: training.figures(model)[0],
        look_every=steps_an_epoch,
        benchmark=recipe.fresh.benchmark_accuracy,
        measuring=_measuring(training, held_out, recipe),
        config=config,
        steps=planned_steps(arguments, len(training)),
        folder=rounds_place(output_dir, config.rounds_folder),
        fingerprint=fingerprint(
            [recipe.decisive, sizes, recipe.fresh.activation], {"inputs": training.inputs, "labels": training.labels}
        ),
        seed=recipe.text.seed,
    )
    target_steps(config, search.recorded)
    return search, steps_an_epoch


def _perceptron(model: nn.Module) -> Perceptron:
    assert isinstance(model, Perceptron)
    return model


def _series(model: nn.Module, config: LEGCNetConfig, seed: int) -> Series:
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in config.ignore)
    ]
    if config.series == "rows":
        return RowSeries(model, names)
    return WeightSeries(model, names, config.samples_per_matrix if config.series == "sample" else None, seed)


def _measuring(training: Rows, held_out: Rows, recipe: TrainRecipe) -> Measuring:
    explain, seed = recipe.fresh.explain, recipe.text.seed

    def evaluate(model: nn.Module) -> dict[str, Any]:
        (accuracy, loss), (own, own_loss) = held_out.figures(model), training.figures(model)
        figures: dict[str, Any] = {"accuracy": accuracy, "loss": loss, "train_accuracy": own, "train_loss": own_loss}
        if explain:
            layers = _perceptron(model).layers
            figures["alphas"] = alphas(layers)
            figures["mean_shap"] = mean_shap(layers, training.inputs, held_out.inputs, seed)
        return figures

    identity = [explain, seed] if explain else ""
    return Measuring(evaluate, fingerprint(identity, {"inputs": held_out.inputs, "labels": held_out.labels}))


def _summary(
    found: Round,
    dense: Round,
    reached: Look | None,
    steps_an_epoch: int,
    unwatched: int,
) -> dict[str, Any]:
    """What the report says of a round; `epochs_to_benchmark` is None where it was never reached."""
    features: list[list[float]] = [own.metrics.get("mean_shap", []) for own in (dense, found)]
    return {
        "kind": found.kind,
        "connections": found.kept + unwatched,
        "all_connections": found.total + unwatched,
        "held": found.held,
        # A multiplication and an addition for each connection and row.
        "flops": 2 * (found.kept + unwatched),
        **found.metrics,
        **({"shap_rank_correlation": rank_correlation(*features)} if all(features) else {}),
        "steps": found.steps,
        "epochs_to_benchmark": reached[0] / steps_an_epoch if reached else None,
        "moved": found.moved,
        "seconds": found.seconds,
    }
