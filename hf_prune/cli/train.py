"""hf-prune train: pruning while training; a recipe in, a folder out."""

from __future__ import annotations

import os
from typing import Any

from hf_prune.cli.arguments import console, quiet_libraries, take_text
from hf_prune.cli.prune import relaunch
from hf_prune.errors import BadInputError
from hf_prune.recipe import parse_flags, read_recipe

LOTTERY_TICKET, LEGCNET, DYNAMIC_SPARSE = "lottery_ticket", "legcnet", "dynamic_sparse"
METHODS = (LOTTERY_TICKET, LEGCNET, DYNAMIC_SPARSE)
# What LEGCNet is of a language model.
UNITS, WEIGHTS = "legcnet of units", "legcnet of weights"


def help_text() -> str:
    from hf_prune.legcnet.target import WatchedModelArguments
    from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
    from hf_prune.methods.legcnet import LEGCNetConfig
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.training.arguments import FreshModelArguments, training_help
    from hf_prune.training.tabular import PerceptronArguments, TableArguments

    tickets = "Prune a model while it trains, round by round (method: lottery_ticket, the default)."
    moving = "Train a model that is sparse from its first step, with masks that move (method: dynamic_sparse)."
    causes = "Prune what does not cause the errors of a perceptron's training (method: legcnet)."
    caused = "The same of a language model, which model_name_or_path or model_type names (method: legcnet)."
    return "\n".join(
        [
            training_help("train", tickets, LotteryTicketConfig, FreshModelArguments),
            training_help("train", moving, DynamicSparseConfig, FreshModelArguments),
            training_help("train", causes, LEGCNetConfig, PerceptronArguments, TableArguments),
            training_help("train", caused, LEGCNetConfig, WatchedModelArguments),
        ]
    )


def main(arguments: list[str]) -> int:
    flags = parse_flags(arguments)
    values, text = read_recipe(take_text(flags, "config"), flags)
    method = values.get("method") or LOTTERY_TICKET
    if method not in METHODS:
        raise BadInputError(f"method: {method!r} is unknown or prunes without training; choose {', '.join(METHODS)}.")
    recipe = make_recipe(values, text)
    if recipe.model.num_processes > 1 and "RANK" not in os.environ:
        # What can be refused is refused here, in one sentence: the launcher would wrap it in a traceback.
        quiet_libraries()
        _prepare(recipe, _kind(values))
        return relaunch(recipe.model.num_processes, ["train", *arguments])
    quiet_libraries()
    {
        UNITS: _show_units,
        WEIGHTS: _show_weights,
        LEGCNET: _show_causes,
        DYNAMIC_SPARSE: _show_sparse,
        LOTTERY_TICKET: _show_tickets,
    }[_kind(values)](recipe)
    return 0


def make_recipe(values: dict[str, Any], text: str | None = None) -> Any:
    """The recipe of the method that it names."""
    from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
    from hf_prune.methods.legcnet import LEGCNetConfig
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.training.arguments import make_train_recipe
    from hf_prune.training.tabular import PerceptronArguments, TableArguments

    kind = _kind(values)
    if kind in (UNITS, WEIGHTS):
        from hf_prune.legcnet.target import WatchedModelArguments

        return make_train_recipe(values, LEGCNetConfig, text, WatchedModelArguments)
    if kind == LEGCNET:
        return make_train_recipe(values, LEGCNetConfig, text, PerceptronArguments, TableArguments)
    return make_train_recipe(values, DynamicSparseConfig if kind == DYNAMIC_SPARSE else LotteryTicketConfig, text)


def _kind(values: dict[str, Any]) -> str:
    """The method, and of LEGCNet what it watches: a perceptron, a language model's weights, or its units."""
    method = str(values.get("method") or LOTTERY_TICKET)
    if method == LEGCNET and values.get("series") == "units":
        return UNITS
    if method == LEGCNET and (values.get("model_name_or_path") or values.get("model_type")):
        return WEIGHTS
    return method


def _prepare(recipe: Any, kind: str) -> None:
    if kind == UNITS:
        from hf_prune.legcnet.units_setup import prepare_units

        prepare_units(recipe)
    elif kind == WEIGHTS:
        from hf_prune.legcnet.weights import prepare_weights

        prepare_weights(recipe)
    elif kind == LEGCNET:
        from hf_prune.legcnet.perceptron import prepare_legcnet

        prepare_legcnet(recipe)
    elif kind == DYNAMIC_SPARSE:
        from hf_prune.sparse_training import prepare_sparse

        prepare_sparse(recipe)
    else:
        from hf_prune.tickets import prepare_tickets

        prepare_tickets(recipe)


def _show_tickets(recipe: Any) -> None:
    from hf_prune.report import tables
    from hf_prune.tickets import run_tickets

    report = run_tickets(recipe)
    console().print(tables.rounds_table(report["tickets"]))
    _show_folder(recipe, report)


def _show_sparse(recipe: Any) -> None:
    from hf_prune.sparse_training import run_sparse

    _show_folder(recipe, run_sparse(recipe))


def _show_weights(recipe: Any) -> None:
    from hf_prune.legcnet.weights import run_weights

    _show_folder(recipe, run_weights(recipe))


def _show_units(recipe: Any) -> None:
    from hf_prune.legcnet.units import run_units

    _show_folder(recipe, run_units(recipe))


def _show_folder(recipe: Any, report: dict[str, Any]) -> None:
    from hf_prune.report import tables
    from hf_prune.report.cause_table import watched_text
    from hf_prune.report.findings import next_step

    out = console()
    if report.get("verification"):
        out.print(tables.verification_table(report))
    out.print(tables.evaluation_table(report))
    if report.get("efficiency"):
        out.print(tables.efficiency_table(report))
    if report.get("legcnet"):
        out.print(watched_text(report), markup=False)
    for sentence in next_step(report, str(recipe.output.output_dir)):
        out.print(sentence, markup=False)


def _show_causes(recipe: Any) -> None:
    from hf_prune.legcnet.perceptron import run_legcnet
    from hf_prune.report.cause_table import causes_table, causes_text

    report = run_legcnet(recipe)
    out = console()
    out.print(causes_table(report["rounds"]))
    for sentence in [*causes_text(report), f"The model, its series and plots are in {recipe.output.output_dir}."]:
        out.print(sentence, markup=False)
