"""hf-prune evaluate: quality and efficiency of a model."""

from __future__ import annotations

import json
from pathlib import Path

from hf_prune.cli.arguments import console, quiet_libraries, recipe_help, split_positional, take_text
from hf_prune.progress import is_main_process
from hf_prune.recipe import parse_yaml


def help_text() -> str:
    text = (
        "usage: hf-prune evaluate MODEL [--baseline DENSE] [--output_file RESULT.json] [--key value ...]\n\n"
        "MODEL is a folder or a Hub id. A folder that hf_prune wrote brings its recipe along: the same text, and the\n"
        "dense model as baseline. Otherwise name --eval_dataset_name, and --baseline where there is one."
    )
    return text + "\n\n" + recipe_help("evaluate", "").split("\n\n", 1)[1]


def main(arguments: list[str]) -> None:
    model, flags = split_positional(arguments, "the model's folder or Hub id")
    baseline, output_file = take_text(flags, "baseline"), take_text(flags, "output_file")
    from hf_prune.checkpoint.folder import RECIPE_FILE
    from hf_prune.compose import make_config
    from hf_prune.pipeline import evaluate
    from hf_prune.recipe import make_recipe
    from hf_prune.report import tables

    quiet_libraries()
    values = {}
    recipe_file = Path(model) / RECIPE_FILE
    if recipe_file.is_file():
        values = parse_yaml(recipe_file.read_text(encoding="utf-8"), str(recipe_file))
        baseline = baseline or values.get("model_name_or_path")
    baseline_revision = values.pop("revision", None)
    recipe = make_recipe({**values, **flags, "model_name_or_path": model})
    if recipe.prune_options:
        # The recipe's own pruning keys are fine here; anything else is a slip.
        make_config(recipe.prune_options)
    report = evaluate(recipe, baseline, baseline_revision)
    out = console()
    out.print(tables.evaluation_table(report))
    if report.get("efficiency"):
        out.print(tables.efficiency_table(report))
    if output_file and is_main_process():
        Path(output_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        out.print(f"Saved to {output_file}.")
