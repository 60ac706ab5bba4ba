"""hf-prune evaluate: quality and efficiency of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    from hf_prune.fields import unknown_key
    from hf_prune.pipeline import evaluate
    from hf_prune.recipe import make_recipe
    from hf_prune.report import tables

    quiet_libraries()
    values, dense, revision, known = _brought_along(model)
    if baseline is None:
        baseline = dense
    recipe = make_recipe({**values, **flags, "model_name_or_path": model})
    if recipe.prune_options:
        raise unknown_key(next(iter(recipe.prune_options)), (), "evaluate")
    report = {**known, **evaluate(recipe, baseline, revision if baseline == dense else None)}
    out = console()
    out.print(tables.evaluation_table(report))
    if report.get("efficiency"):
        out.print(tables.efficiency_table(report))
    if output_file and is_main_process():
        Path(output_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        out.print(f"Saved to {output_file}.")


def _brought_along(model: str) -> tuple[dict[str, Any], str | None, str | None, dict[str, Any]]:
    """What a folder that hf_prune wrote says: keys of the evaluation, the dense model and its revision, and what its
    report knows of zeros and sizes; nothing of any other model.
    """
    from hf_prune.arguments import EvaluationArguments, ModelArguments
    from hf_prune.checkpoint.folder import RECIPE_FILE
    from hf_prune.fields import field_types
    from hf_prune.recovery_setup import PrunedFolder

    if not (Path(model) / RECIPE_FILE).is_file():
        return {}, None, None, {}
    folder = PrunedFolder(model)
    recipes = [parse_yaml(text, name) for name, text in folder.recipes.items()]
    # Of the last one alone: what was trained afterwards was scored on its own text, and in its own way.
    first, written = recipes[0], recipes[-1]
    dense, revision = written.get("base_model"), written.get("base_revision")
    # What a training began with is no dense model of the same text.
    if dense is None and not folder.report.get("training"):
        dense = first.get("model_name_or_path")
        revision = revision or folder.report.get("base_revision") or first.get("revision")
    # A folder from elsewhere does not say whether its code may run.
    left_out = {"trust_remote_code", "model_name_or_path", "revision"}
    wanted = {*field_types(ModelArguments), *field_types(EvaluationArguments)} - left_out
    values = {key: own for key, own in written.items() if key in wanted}
    known: dict[str, Any] = {key: folder.report[key] for key in ("sparsity", "structure") if key in folder.report}
    return values, dense, revision, known
