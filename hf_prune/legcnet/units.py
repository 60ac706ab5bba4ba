"""Recipe in, smaller language model out: the units that do not cause a fine-tuning's errors go (LEGCNet; ours)."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from hf_prune.checkpoint.folder import LOGS, RECIPE_FILE, beside
from hf_prune.checkpoint.load import free_memory, load_model
from hf_prune.description import described_options, environment, sizes_of
from hf_prune.engine import distributed
from hf_prune.evaluation.perplexity import perplexity
from hf_prune.evaluation.quality import Quality
from hf_prune.finish import Stopwatch, efficiency, finish
from hf_prune.legcnet.folder import describe_causes, write_causes
from hf_prune.legcnet.target import next_token_errors
from hf_prune.legcnet.units_setup import Ready, prepare_units
from hf_prune.methods.legcnet import UNUSED_BY_UNITS
from hf_prune.pruning import PruneResult, prune
from hf_prune.report.plots import plot_widths
from hf_prune.report.privacy import may_show_samples
from hf_prune.trained import quality_of
from hf_prune.training.arguments import TrainRecipe, make_training_arguments
from hf_prune.training.causes import (
    Causes,
    causes_of,
    find_causes,
    target_steps,
)
from hf_prune.training.checkpoints import StopAtNaN, alone_in, claim, fingerprint, last_checkpoint
from hf_prune.training.legcnet import KINDS, RECORDED
from hf_prune.training.recorder import Recorder, read_record
from hf_prune.training.rounds import CHECKPOINTS, Measuring, Round, Trained, make_round
from hf_prune.training.series import UnitSeries
from hf_prune.training.text import describe_training
from hf_prune.training.trainer import make_trainer, only_weights_change, train


def run_units(recipe: TrainRecipe) -> dict[str, Any]:
    """Fine-tune and record, decide, remove units; returns the report that stands in the output folder.

    The fine-tuned model is what the smaller ones are measured against: LEGCNet's, and as many units by their norms and
    by chance.

    Raises:
        BadInputError: something handed over cannot be used, and nothing has been written; or the target never changed,
            which is known once the training is over: it stays.
        RunError: the training or the verification failed; the recording stays.
    """
    watch = Stopwatch()
    with watch.phase("prepare"):
        ready = prepare_units(recipe)
    with alone_in(ready.folder):
        return _run_units(ready, watch)


def _run_units(ready: Ready, watch: Stopwatch) -> dict[str, Any]:
    recipe = ready.recipe
    with watch.phase("prepare"):
        own = replace(recipe.model, dtype="float32")
        revision = ready.source.revision or recipe.model.revision
        model = load_model(ready.source.path, own, ready.device, revision)
        series = UnitSeries(model, recipe.method.units)
        _claim(ready, model)
    with watch.phase("train"):
        begun, measuring = Round(0, "dense"), _measuring(ready)
        dense = make_round(ready.folder / "dense", begun, model, {}, partial(_train, ready, model, series), measuring)
    with watch.phase("decide"):
        causes = _causes(ready)
    total = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, tuple[Quality, PruneResult]] = {}
    smaller: Any = None
    for kind in reversed(KINDS):
        with watch.phase("prune"):
            del smaller
            smaller = copy.deepcopy(model).eval()
            result = prune(
                smaller, replace(ready.config, importance=_scores(ready, series, causes, kind)), plan=ready.plan
            )
        with watch.phase("evaluate"):
            found[kind] = ready.evaluation.measure(smaller, f"evaluating what {kind} keeps"), result
    del model
    free_memory()
    pruned, result = found[KINDS[0]]
    assert result.reduction is not None
    # What went is up to the sizes, not to alpha.
    causes = replace(causes, keep=series.kept(result.reduction.kept))
    before = quality_of(dense)
    report = {
        **environment(),
        "base_model": ready.source.base_model,
        "base_revision": revision,
        "base_license": ready.source.license,
        "architecture": type(smaller).__name__,
        "dtype": "float32",
        "device": str(ready.device),
        "method": {
            **asdict(recipe.method.info),
            "pattern": "structured",
            "options": described_options(recipe.method, UNUSED_BY_UNITS),
        },
        "training": describe_training(ready.text, ready.windows, ready.arguments, dense.steps),
        **sizes_of(smaller, result, total),
        "forward_passes": 0.0,
        "legcnet": describe_causes(
            causes, recipe.method, {kind: perplexity(quality.nll) for kind, (quality, _) in found.items()}
        ),
        "seed": recipe.text.seed,
        "hub_model_id": recipe.output.hub_model_id,
        "seconds": watch.seconds,
        "command": f"hf-prune train --config {RECIPE_FILE}",
        "evaluation": ready.evaluation.report(dense=before, pruned=pruned),
    }
    if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
        report["samples"] = ready.evaluation.samples(dense=before, pruned=pruned)

    def complete(folder: Path) -> None:
        if recipe.evaluation.eval_efficiency:
            with watch.phase("efficiency"):
                models: dict[str, str | Path] = {"dense": ready.source.path, "pruned": folder}
                report.update(efficiency(models, own, ready.device, {"dense": revision} if revision else None))
        write_causes(folder, causes, series.label, recipe.method)
        if ready.plan.structure and ready.plan.structure["widths"]:
            plot_widths(report["structure"], folder / "plots" / "widths.png")

    if distributed.rank() == 0:
        texts, trust = {RECIPE_FILE: recipe.text_as_run}, recipe.model.trust_remote_code
        finish(recipe.output, smaller, ready.tokenizer, result, report, texts, watch, complete, trust_remote_code=trust)
    return report


def _claim(ready: Ready, model: nn.Module) -> None:
    method = ready.recipe.method
    identity = {
        "training": fingerprint(ready.recipe.decisive, {"windows": ready.windows.input_ids, "target": ready.target}),
        "weights": fingerprint("", model.state_dict()),
        "recording": [*(getattr(method, key) for key in RECORDED), method.units, ready.recorded, ready.steps],
        "processes": distributed.world_size(),
    }
    unfinished = ready.folder / "dense.unfinished" / CHECKPOINTS
    claim(ready.folder, identity, (ready.folder / "dense").is_dir() or last_checkpoint(unfinished) is not None)


def _train(ready: Ready, model: Any, series: UnitSeries, checkpoints: Path) -> Trained:
    recipe = ready.recipe
    method, ends = recipe.method, frozenset(target_steps(recipe.method, ready.recorded))
    set_seed(recipe.text.seed)
    recorder = Recorder(
        series.observe,
        ready.folder / "recording",
        method.record_every,
        partial(next_token_errors, ready.target),
        lambda step: step in ends,
        until=ready.recorded,
    )
    stop = StopAtNaN("the recorded training", checkpoints)
    callbacks: list[TrainerCallback] = [stop, recorder]
    with only_weights_change(model):
        model.train()
        arguments = make_training_arguments(recipe.training, checkpoints, recipe.text.seed, recipe.model.device)
        logs = beside(str(ready.recipe.output.output_dir), LOGS)
        parts = {"model": model, "args": arguments, "train_dataset": ready.windows, "callbacks": callbacks}
        trainer = make_trainer(Trainer, logs, **parts)
        seconds = train(trainer, last_checkpoint(checkpoints))
    return Trained(int(trainer.state.global_step), seconds=seconds)


def _measuring(ready: Ready) -> Measuring:
    def evaluate(model: Any) -> dict[str, Any]:
        quality = ready.evaluation.measure(model, "evaluating the trained model")
        return {"nll": quality.nll.tolist(), "continuations": quality.continuations, "seconds": quality.seconds}

    prompts = ready.recipe.evaluation.sample_prompts
    return Measuring(evaluate, fingerprint(prompts, {"windows": ready.evaluation.windows.input_ids}))


def _decision(ready: Ready) -> Path:
    hidden = (*RECORDED, "rounds_folder", "sparsity", "restart", *UNUSED_BY_UNITS)
    own = {key: value for key, value in asdict(ready.recipe.method).items() if key not in hidden}
    return ready.folder / f"{ready.recipe.method.variant}-{fingerprint(own, {})[:8]}"


def _causes(ready: Ready) -> Causes:
    """What the recording says; which of the units go follows from the sizes, here only how much each matters."""
    config = replace(ready.recipe.method, sparsity=None)
    return causes_of(_decision(ready), lambda: find_causes(ready.folder / "recording", config, ready.recorded))


def _scores(ready: Ready, series: UnitSeries, causes: Causes, kind: str) -> str:
    """A file with a score for each unit: the least causal (or sensitive) go first, what could not be tested stays."""
    if kind == "magnitude":
        last = ready.recorded // ready.recipe.method.record_every - 1
        scores = read_record(ready.folder / "recording", last)
    elif kind == "random":
        scores = torch.rand(len(causes.keep), generator=torch.Generator().manual_seed(ready.recipe.text.seed))
    else:
        scores = causes.scores.clamp(max=float(2 * len(causes.scores) + 1))
    file = _decision(ready) / f"{kind}.safetensors"
    if distributed.rank() == 0:
        save_file(series.scores(scores.float()), file)
    distributed.barrier()
    return str(file)
