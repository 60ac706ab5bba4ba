"""Recipe in, ticket out: iterative pruning of a causal language model, and a folder like any other at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, set_seed

from hf_prune.arguments import PruneConfig
from hf_prune.checkpoint.folder import RECIPE_FILE, beside
from hf_prune.checkpoint.load import load_config, load_model, load_tokenizer, pick_device
from hf_prune.data.builtin import resolve_model
from hf_prune.data.windows import default_seq_length
from hf_prune.description import environment, zeros_of
from hf_prune.engine import distributed
from hf_prune.engine.walk import ViewResult
from hf_prune.errors import BadInputError
from hf_prune.evaluation.quality import Quality, QualityEvaluation
from hf_prune.finish import Stopwatch, efficiency, finish
from hf_prune.methods.lottery_ticket import LotteryTicketConfig
from hf_prune.plan import make_plan, select_views
from hf_prune.preparation import check_output
from hf_prune.pruning import PruneResult
from hf_prune.report.plots import plot_rounds, plot_sparsity_by_layer
from hf_prune.report.privacy import may_show_samples
from hf_prune.training.arguments import TrainRecipe, make_training_arguments
from hf_prune.training.checkpoints import fingerprint
from hf_prune.training.rounds import Round
from hf_prune.training.text import (
    Windows,
    describe_training,
    fresh_config,
    open_text,
    train_tokenizer,
    train_word_tokenizer,
    training_windows,
)
from hf_prune.training.tickets import MakeTrainer, TicketSearch
from hf_prune.training.trainer import make_trainer
from hf_prune.weights import WeightView


def run_tickets(recipe: TrainRecipe) -> dict[str, Any]:
    """Find the ticket that a recipe asks for; returns the report that stands in the output folder.

    Rounds are kept in `rounds_folder`, from which a run that was cut goes on; tickets of other measures with the
    same training share the dense round there.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: the training or the verification failed; finished rounds stay.
    """
    watch = Stopwatch()
    with watch.phase("prepare"):
        ready = prepare_tickets(recipe)
        start, evaluation, views, search = ready.start, ready.evaluation, ready.views, ready.search
        arguments = make_training_arguments(recipe.training, search.folder, recipe.text.seed, recipe.model.device)
    with watch.phase("train"):
        model, rounds = search.run()
    model.eval()
    tickets = [found for found in rounds if found.kind == "ticket"]
    result = _result(model, views, recipe.method, tickets[-1])
    report = {
        **environment(),
        "base_model": start.base_model,
        "base_revision": start.revision,
        "base_license": start.source.license if start.source else None,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "method": _method(recipe.method),
        "training": describe_training(start.text, start.windows, arguments),
        **zeros_of(model, result, sum(parameter.numel() for parameter in model.parameters())),
        "tickets": [_summary(found) for found in rounds],
        "rounds": search.ticket_folder.name,
        "seed": recipe.text.seed,
        "hub_model_id": recipe.output.hub_model_id,
        # Rounds that were finished before this run took their time as well.
        "seconds": {**watch.seconds, "train": sum(found.seconds for found in rounds)},
        "command": f"hf-prune train --config {RECIPE_FILE}",
        "evaluation": evaluation.report(dense=_quality(rounds[0]), pruned=_quality(tickets[-1])),
    }
    if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
        report["samples"] = evaluation.samples(dense=_quality(rounds[0]), pruned=_quality(tickets[-1]))
    device = torch.device(arguments.device)

    def complete(folder: Path) -> None:
        if recipe.evaluation.eval_efficiency:
            with watch.phase("efficiency"):
                models: dict[str, str | Path] = {"dense": start.source.path} if start.source else {}
                revisions = {"dense": start.revision} if start.revision else None
                report.update(efficiency({**models, "pruned": folder}, recipe.model, device, revisions))
        plot_sparsity_by_layer(report["views"], folder / "plots" / "sparsity_by_layer.png")
        plot_rounds(report["tickets"], folder / "plots" / "rounds.png")

    if distributed.rank() == 0:
        recipes, trust = {RECIPE_FILE: recipe.text_as_run}, recipe.model.trust_remote_code
        finish(
            recipe.output,
            model,
            start.tokenizer,
            result,
            report,
            recipes,
            watch,
            complete,
            trust_remote_code=trust,
        )
    return report


@dataclass
class Prepared:
    """A recipe's text, model, evaluation and procedure, before anything is trained."""

    start: Start
    evaluation: QualityEvaluation
    views: list[WeightView]
    search: TicketSearch


def prepare_tickets(recipe: TrainRecipe) -> Prepared:
    """Everything of a run but the training.

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
    views, _ = select_views(start.make_model(None), None, recipe.method.ignore)
    if any(view.expert is not None for view in views):
        raise BadInputError("model_type: tickets are not found in mixtures of experts; choose a model without experts.")
    method = recipe.method
    assert recipe.output.output_dir is not None
    search = TicketSearch(
        make_model=start.make_model,
        names=[view.parameter_name for view in views],
        make_trainer=_trainers(recipe, start.windows),
        evaluate=lambda model: _figures(evaluation.measure(cast("PreTrainedModel", model), "evaluating")),
        config=method,
        folder=beside(method.rounds_folder, "")
        if method.rounds_folder
        else beside(recipe.output.output_dir, ".rounds"),
        fingerprint=fingerprint(recipe.decisive, {"windows": start.windows.input_ids}),
        evaluation=fingerprint(recipe.evaluation.sample_prompts, {"windows": evaluation.windows.input_ids}),
    )
    return Prepared(start, evaluation, views, search)


class Start:
    """Where the rounds begin: tokenizer, config, windows, and a model as often as one is wanted."""

    def __init__(self, recipe: TrainRecipe) -> None:
        self.recipe = recipe
        fresh, model, text = recipe.fresh, recipe.model, recipe.text
        if bool(model.model_name_or_path) == bool(fresh.model_type):
            raise BadInputError("model_name_or_path: name a model to go on with, or a model_type to begin anew.")
        if bool(fresh.model_type) != bool(fresh.tokenizer_name or fresh.vocab_size):
            raise BadInputError("vocab_size: a fresh model, and no other, needs vocab_size or tokenizer_name.")
        self.base_model = self.revision = None
        self.source = None
        if model.model_name_or_path:
            self.source = resolve_model(model.model_name_or_path, model.revision)
            self.base_model, self.revision = self.source.base_model, self.source.revision or model.revision
            self.config = load_config(self.source.path, model, self.revision)
            self.tokenizer = load_tokenizer(self.source.path, model, self.revision)
            if "fresh_initialization" in recipe.method.controls:
                raise BadInputError("controls: a pretrained model has no fresh initialisation; leave that control out.")
            self.text = open_text(text, self.tokenizer)
            length = text.seq_length or default_seq_length(self.config)
        else:
            length = text.seq_length or 128
            self.text = open_text(text)
            train = train_tokenizer if fresh.tokenizer_type == "bpe" else train_word_tokenizer
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
        self.windows: Windows = training_windows(self.text, self.tokenizer, length, text.max_train_windows)

    def make_model(self, seed: int | None) -> Any:
        """The model everything begins with, or one with other initial weights."""
        set_seed(self.recipe.text.seed if seed is None else self.recipe.text.seed + seed)
        if self.source is not None:
            # Small steps on 16-bit weights would be rounded away.
            own = replace(self.recipe.model, dtype="float32")
            return load_model(self.source.path, own, torch.device("cpu"), self.revision).train()
        return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)


def _trainers(recipe: TrainRecipe, windows: Windows) -> MakeTrainer:
    """Makes a Trainer for each round; every one of them sees the same batches."""

    def make(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        arguments = make_training_arguments(recipe.training, output_dir, recipe.text.seed, recipe.model.device)
        return make_trainer(Trainer, model=model, args=arguments, train_dataset=windows, callbacks=callbacks)

    return make


def _figures(quality: Quality) -> dict[str, Any]:
    return {
        "perplexity": float(quality.nll.mean().exp()),
        "nll": quality.nll.tolist(),
        "continuations": quality.continuations,
        "seconds": quality.seconds,
    }


def _quality(found: Round) -> Quality:
    metrics = found.metrics
    return Quality(torch.tensor(metrics["nll"], dtype=torch.float64), metrics["continuations"], metrics["seconds"])


def _summary(found: Round) -> dict[str, Any]:
    """What the report says of a round."""
    entry = {key: value for key, value in asdict(found).items() if key not in ("metrics", "layers")}
    return {**entry, "sparsity": found.sparsity, "perplexity": found.metrics["perplexity"]}


def _method(config: LotteryTicketConfig) -> dict[str, Any]:
    options = {
        key: value for key, value in asdict(config).items() if key not in ("method", "rounds_folder") and value != []
    }
    return {**asdict(config.info), "pattern": "unstructured", "options": options}


def _result(model: nn.Module, views: list[WeightView], config: LotteryTicketConfig, found: Round) -> PruneResult:
    """The ticket in the words of every other pruning."""
    sizes = {view.name: view.shape[0] * view.shape[1] for view in views}
    densities = {view.name: found.layers[view.parameter_name] / sizes[view.name] for view in views}
    named = PruneConfig(method="lottery_ticket", sparsity=min(found.sparsity, 1 - 1e-9))
    by_parameter = {view.parameter_name: view.name for view in views}
    held = frozenset(by_parameter[name] for name in found.held)
    plan = make_plan(model, named, views, densities, held=held)
    plan.allocation = f"lottery_ticket, {config.importance}"
    live = {view.name: view for view in select_views(model, None, config.ignore)[0]}
    return PruneResult(plan, [ViewResult(name, live[name].count_nonzero(), 0, None) for name in sizes], 0.0)
