"""hf-prune train: pruning while training; a recipe in, a verified folder out."""

from __future__ import annotations

import os

from hf_prune.cli.arguments import console, quiet_libraries, take_text
from hf_prune.cli.prune import relaunch
from hf_prune.recipe import parse_flags, read_recipe


def help_text() -> str:
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.training.arguments import training_help

    return training_help("train", "Prune a model while it trains, round by round.", LotteryTicketConfig, fresh=True)


def main(arguments: list[str]) -> int:
    flags = parse_flags(arguments)
    values, text = read_recipe(take_text(flags, "config"), flags)
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.training.arguments import make_train_recipe

    recipe = make_train_recipe(values, LotteryTicketConfig, text)
    if recipe.model.num_processes > 1 and "RANK" not in os.environ:
        from hf_prune.tickets import prepare_tickets

        # What can be refused is refused here, in one sentence: the launcher would wrap it in a traceback.
        quiet_libraries()
        prepare_tickets(recipe)
        return relaunch(recipe.model.num_processes, ["train", *arguments])
    from hf_prune.report import tables
    from hf_prune.report.findings import next_step
    from hf_prune.tickets import run_tickets

    quiet_libraries()
    report = run_tickets(recipe)
    out = console()
    out.print(tables.rounds_table(report["tickets"]))
    if report.get("verification"):
        out.print(tables.verification_table(report))
    out.print(tables.evaluation_table(report))
    for sentence in next_step(report, str(recipe.output.output_dir)):
        out.print(sentence, markup=False)
    return 0
