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


def help_text() -> str:
    from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
    from hf_prune.methods.legcnet import LEGCNetConfig
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.training.arguments import FreshModelArguments, training_help
    from hf_prune.training.tabular import PerceptronArguments, TableArguments

    tickets = "Prune a model while it trains, round by round (method: lottery_ticket, the default)."
    moving = "Train a model that is sparse from its first step, with masks that move (method: dynamic_sparse)."
    causes = "Prune what does not cause a training's errors (method: legcnet)."
    return "\n".join(
        [
            training_help("train", tickets, LotteryTicketConfig, FreshModelArguments),
            training_help("train", moving, DynamicSparseConfig, FreshModelArguments),
            training_help("train", causes, LEGCNetConfig, PerceptronArguments, TableArguments),
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
        _prepare(recipe, method)
        return relaunch(recipe.model.num_processes, ["train", *arguments])
    quiet_libraries()
    if _of_units(recipe, method):
        _show_units(recipe)
    elif method == LEGCNET:
        _show_causes(recipe)
    elif method == DYNAMIC_SPARSE:
        _show_sparse(recipe)
    else:
        _show_tickets(recipe)
    return 0


def make_recipe(values: dict[str, Any], text: str | None = None) -> Any:
    """The recipe of the method that it names."""
    from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
    from hf_prune.methods.legcnet import LEGCNetConfig
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.training.arguments import make_train_recipe
    from hf_prune.training.tabular import PerceptronArguments, TableArguments

    if values.get("method") == LEGCNET and values.get("series") == "units":
        from hf_prune.legcnet_units_setup import TargetArguments

        return make_train_recipe(values, LEGCNetConfig, text, TargetArguments)
    if values.get("method") == LEGCNET:
        return make_train_recipe(values, LEGCNetConfig, text, PerceptronArguments, TableArguments)
    method = DynamicSparseConfig if values.get("method") == DYNAMIC_SPARSE else LotteryTicketConfig
    return make_train_recipe(values, method, text)


def _of_units(recipe: Any, method: str) -> bool:
    return method == LEGCNET and recipe.method.series == "units"


def _prepare(recipe: Any, method: str) -> None:
    if _of_units(recipe, method):
        from hf_prune.legcnet_units_setup import prepare_units

        prepare_units(recipe)
    elif method == LEGCNET:
        from hf_prune.legcnet import prepare_legcnet

        prepare_legcnet(recipe)
    elif method == DYNAMIC_SPARSE:
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


def _show_folder(recipe: Any, report: dict[str, Any]) -> None:
    from hf_prune.report import tables
    from hf_prune.report.findings import next_step

    out = console()
    if report.get("verification"):
        out.print(tables.verification_table(report))
    out.print(tables.evaluation_table(report))
    for sentence in next_step(report, str(recipe.output.output_dir)):
        out.print(sentence, markup=False)


def _show_causes(recipe: Any) -> None:
    from hf_prune.legcnet import run_legcnet
    from hf_prune.report.cause_table import causes_table, causes_text

    report = run_legcnet(recipe)
    out = console()
    out.print(causes_table(report["rounds"]))
    for sentence in [*causes_text(report), f"The model, its series and plots are in {recipe.output.output_dir}."]:
        out.print(sentence, markup=False)


def _show_units(recipe: Any) -> None:
    from hf_prune.legcnet_units import run_units
    from hf_prune.report import tables
    from hf_prune.report.cause_table import units_text
    from hf_prune.report.findings import next_step

    report = run_units(recipe)
    out = console()
    if report.get("verification"):
        out.print(tables.verification_table(report))
    out.print(tables.evaluation_table(report))
    if report.get("efficiency"):
        out.print(tables.efficiency_table(report))
    for sentence in [units_text(report), *next_step(report, str(recipe.output.output_dir))]:
        out.print(sentence, markup=False)
