"""hf-prune prune: recipe in, verified folder out."""

from __future__ import annotations

import os
import subprocess
import sys

from hf_prune.cli.arguments import console, quiet_libraries, read_recipe, recipe_help
from hf_prune.recipe import Recipe


def help_text() -> str:
    return recipe_help("prune", "Prune a model, evaluate it, save and verify it, and push it if asked.")


def main(arguments: list[str]) -> int:
    return execute(read_recipe(arguments), ["prune", *arguments])


def execute(recipe: Recipe, command: list[str]) -> int:
    """Run the recipe here, or `command` once per process where the recipe asks for several."""
    if recipe.model.num_processes > 1 and "RANK" not in os.environ:
        from hf_prune.preparation import check_feasible, prepare

        # What can be refused is refused here, in one sentence: the launcher would wrap it in a traceback.
        quiet_libraries()
        recipe.require("output_dir")
        check_feasible(prepare(recipe))
        return relaunch(recipe.model.num_processes, command)
    run_and_show(recipe)
    return 0


def relaunch(num_processes: int, arguments: list[str]) -> int:
    """The same command once per process, through accelerate."""
    # --multi_gpu is accelerate's word for several processes; without it (and with --cpu) it starts one only.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.call([*launch, "-m", "hf_prune", *arguments])


def run_and_show(recipe: Recipe) -> None:
    """Run a recipe and print what a person wants to know of it."""
    from hf_prune.pipeline import run
    from hf_prune.report import tables
    from hf_prune.report.findings import gained, next_step

    quiet_libraries()
    report = run(recipe)
    out = console()
    for entry, table in (
        ("verification", tables.verification_table),
        ("evaluation", tables.evaluation_table),
        ("efficiency", tables.efficiency_table),
    ):
        if report.get(entry):
            out.print(table(report))
    if report.get("samples"):
        out.print(tables.samples_table(report["samples"]))
    for sentence in [*gained(report), "", *next_step(report, str(recipe.output.output_dir))]:
        out.print(sentence, markup=False)
