"""hf-prune prune: recipe in, verified folder out."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from hf_prune.cli.arguments import command_line, console, quiet_libraries, read_recipe, recipe_help
from hf_prune.recipe import Recipe


def help_text() -> str:
    return recipe_help("prune", "Prune a model, evaluate it, save and verify it, and push it if asked.")


def main(arguments: list[str]) -> int:
    recipe = read_recipe(arguments)
    if recipe.model.num_processes > 1 and "RANK" not in os.environ:
        return relaunch(recipe.model.num_processes, ["prune", *arguments])
    report = run_and_show(recipe, command_line("prune", arguments))
    return 0 if report else 1


def relaunch(num_processes: int, arguments: list[str]) -> int:
    """The same command once per process, through accelerate."""
    import torch

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--multi_gpu"] if torch.cuda.is_available() else ["--cpu"]
    return subprocess.call([*launch, "-m", "hf_prune", *arguments])


def run_and_show(recipe: Recipe, command: str) -> dict[str, Any]:
    """Run a recipe and print what a person wants to know of it."""
    from hf_prune.pipeline import run
    from hf_prune.report import tables
    from hf_prune.report.findings import gained, next_step

    quiet_libraries()
    report = run(recipe, command)
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
        out.print(sentence)
    return report
