"""hf-prune recover: train a pruned model for a while; zeros of its matrices stay."""

from __future__ import annotations

import os

from hf_prune.cli.arguments import console, quiet_libraries, split_positional, take_text
from hf_prune.cli.prune import relaunch
from hf_prune.recipe import read_recipe


def help_text() -> str:
    from hf_prune.training.arguments import training_help
    from hf_prune.training.recovery import RecoveryConfig

    return training_help("recover FOLDER", "Train a pruned model; zeros of its matrices stay.", RecoveryConfig)


def main(arguments: list[str]) -> int:
    folder, flags = split_positional(arguments, "the pruned model's folder")
    values, text = read_recipe(take_text(flags, "config"), flags)
    from hf_prune.training.arguments import make_train_recipe
    from hf_prune.training.recovery import RecoveryConfig

    recipe = make_train_recipe(values, RecoveryConfig, text, verb="recover")
    if recipe.model.num_processes > 1 and "RANK" not in os.environ:
        from hf_prune.recovery import prepare_recovery

        # What can be refused is refused here, in one sentence: the launcher would wrap it in a traceback.
        quiet_libraries()
        prepare_recovery(folder, recipe)
        return relaunch(recipe.model.num_processes, ["recover", *arguments])
    from hf_prune.recovery import recover
    from hf_prune.report import tables
    from hf_prune.report.findings import next_step, recoveries

    quiet_libraries()
    report = recover(folder, recipe)
    out = console()
    if report.get("verification"):
        out.print(tables.verification_table(report))
    out.print(tables.evaluation_table(report))
    if report.get("efficiency"):
        out.print(tables.efficiency_table(report))
    for sentence in [*recoveries(report), *next_step(report, str(recipe.output.output_dir))]:
        out.print(sentence, markup=False)
    return 0
