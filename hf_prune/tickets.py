"""Recipe in, ticket out: iterative pruning of a causal language model, and a folder like any other at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.finish import Stopwatch
from hf_prune.report.plots import plot_rounds
from hf_prune.report.privacy import may_show_samples
from hf_prune.trained import Start, as_pruned, described, hand_over, prepare, procedure, quality_of
from hf_prune.training.arguments import TrainRecipe, make_training_arguments, planned_steps
from hf_prune.training.checkpoints import check_rewind
from hf_prune.training.rounds import Round
from hf_prune.training.tickets import TicketSearch
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
    with watch.phase("train"):
        model, rounds = search.run()
    model.eval()
    tickets = [found for found in rounds if found.kind == "ticket"]
    allocation = f"lottery_ticket, {recipe.method.importance}"
    result = as_pruned(model, views, tickets[-1], recipe.method, allocation)
    report = {
        **described(recipe, start, model, result),
        "tickets": [_summary(found) for found in rounds],
        "rounds": search.ticket_folder.name,
        # Rounds that were finished before this run took their time as well.
        "seconds": {**watch.seconds, "train": sum(found.seconds for found in rounds)},
        "evaluation": evaluation.of(model).report(dense=quality_of(rounds[0]), pruned=quality_of(tickets[-1])),
    }
    if recipe.evaluation.sample_prompts and may_show_samples(report, asdict(recipe.output)):
        report["samples"] = evaluation.samples(dense=quality_of(rounds[0]), pruned=quality_of(tickets[-1]))

    def add(folder: Path) -> None:
        plot_rounds(report["tickets"], folder / "plots" / "rounds.png")

    hand_over(recipe, start, model, result, report, watch, add)
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
    start, evaluation, views = prepare(recipe)
    arguments = make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    check_rewind(recipe.method.rewind_step, planned_steps(arguments, len(start.windows)))
    search = TicketSearch(**procedure(recipe, start, evaluation, views), seed=recipe.text.seed)
    return Prepared(start, evaluation, views, search)


def _summary(found: Round) -> dict[str, Any]:
    """What the report says of a round."""
    entry = {key: value for key, value in asdict(found).items() if key not in ("metrics", "layers")}
    return {**entry, "sparsity": found.sparsity, "perplexity": found.metrics["perplexity"]}
