"""What may be said of a text that lies on the user's disk: nothing but that it is local.

A text is private unless the report marks it public; its name, the recipe keys and flags that describe it, and prompts
(unless `publish_samples: true`) stay out of everything that is published.
"""

import shlex
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.folder import RECOVERY_FILE
from hf_prune.errors import BadInputError
from hf_prune.recipe import dump_yaml, parse_yaml
from hf_prune.report.markdown import code

LOCAL_TEXT = "local text"
HIDDEN = "not shown"
TEXT_KEYS = {
    "calibration": ("dataset_name", "dataset_config", "dataset_split", "dataset_revision", "text_column"),
    "evaluation": (
        "eval_dataset_name",
        "eval_dataset_config",
        "eval_split",
        "eval_dataset_revision",
        "eval_text_column",
    ),
}
"""The recipe keys, also flags, that describe a text: their values are not published where that text is private."""
PLACE_KEYS = (
    "model_name_or_path",
    "base_model",
    "importance",
    "tokenizer_name",
    "output_dir",
    "rounds_folder",
    "statistics_folder",
    "logging_dir",
)
"""The recipe keys that may name a folder of the machine."""


def is_private(text: Any) -> bool:
    """Whether a calibration or evaluation text must stay unnamed: everything that is not marked public."""
    return isinstance(text, dict) and text.get("private") is not False


def text_name(text: Any) -> str | None:
    """What a text may be called in public: `allenai/c4` (split `train`), or local text; None without one."""
    if not isinstance(text, dict) or not text:
        return None
    if is_private(text):
        return LOCAL_TEXT
    if not text.get("dataset"):
        return None
    details = [f"{key} {code(text[key])}" for key in ("config", "split", "revision") if text.get(key)]
    return code(text["dataset"]) + (f" ({', '.join(details)})" if details else "")


def _text(report: dict[str, Any], part: str) -> Any:
    """The text that a recipe's keys describe: where there was no calibration, they named what was trained on."""
    return report.get(part) or (report.get("training") if part == "calibration" else None)


def _texts(report: dict[str, Any]) -> list[Any]:
    """Every text that went into a model: prompts may be answered with any of them."""
    later = [recovery.get("training") for recovery in report.get("recoveries") or []]
    return [*(_text(report, part) for part in TEXT_KEYS), *later]


def last_recipe(folder: Path, report: dict[str, Any], recipe_text: str) -> str:
    """The recipe of the run that wrote the folder: the last recovery's, else the pruning's, which is handed over."""
    count = len(report.get("recoveries") or [])
    if not count:
        return recipe_text
    file = folder / RECOVERY_FILE.format("" if count == 1 else count)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def recovery_report(report: dict[str, Any], recovery: dict[str, Any]) -> dict[str, Any]:
    """The texts that a recovery's own recipe describes."""
    return {"training": recovery.get("training"), "evaluation": report.get("evaluation")}


def parsed_recipe(recipe_text: str) -> dict[str, Any]:
    """The recipe's keys and values; empty where it is no flat YAML mapping."""
    try:
        return parse_yaml(recipe_text, "recipe")
    except BadInputError:
        return {}


def hidden_keys(report: dict[str, Any], recipe: dict[str, Any]) -> set[str]:
    """The recipe keys whose values must not be published: those of every text that is not known to be public."""
    hidden: set[str] = set()
    for part, keys in TEXT_KEYS.items():
        used, packaged = _text(report, part), str(recipe.get(keys[0])).startswith("builtin:")
        if is_private(used) or not (used or packaged):
            hidden.update(keys)
    return hidden if may_show_samples(report, recipe) else hidden | {"sample_prompts"}


def may_show_samples(report: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether prompts and generations may be published: every text that was used is public, or the user said so."""
    # A flag reaches the saved recipe as text.
    agreed = str(recipe.get("publish_samples")).lower() in ("true", "yes")
    return agreed or not any(is_private(text) for text in _texts(report))


def public_recipe(report: dict[str, Any], recipe_text: str) -> tuple[str, bool]:
    """The recipe as it may be published, and whether that is verbatim.

    Where it names something to hide it is written anew, without comments; where it then cannot be parsed it is ''.
    """
    recipe = parsed_recipe(recipe_text)
    hidden = hidden_keys(report, recipe)
    used_private = any(is_private(_text(report, part)) for part in TEXT_KEYS)
    shown = {key: _without_place(key, value) for key, value in recipe.items()}
    if not used_private and shown == recipe and not any(recipe.get(key) for key in hidden):
        return recipe_text.strip("\n"), True
    shown = {key: HIDDEN if key in hidden and value is not None else value for key, value in shown.items()}
    return (dump_yaml(shown).strip() if shown else ""), False


def _without_place(key: str, value: Any) -> Any:
    """A folder of this machine by its own name alone."""
    if key in PLACE_KEYS and isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return value


def public_report(report: dict[str, Any], recipe_text: str) -> dict[str, Any]:
    """The report as it may be published: private texts unnamed, samples where the recipe that made them lets them."""
    public = _without_names(report, *TEXT_KEYS, "training")
    if report.get("recoveries"):
        public["recoveries"] = [_without_options(_without_names(own, "training")) for own in report["recoveries"]]
    if not may_show_samples(report, parsed_recipe(recipe_text)):
        public.pop("samples", None)
    return public


def _without_names(entry: dict[str, Any], *parts: str) -> dict[str, Any]:
    """A copy in which private texts have no name."""
    public = dict(entry)
    for part in parts:
        text = entry.get(part)
        if isinstance(text, dict) and is_private(text):
            public[part] = {**text, "dataset": LOCAL_TEXT, "config": None, "split": None, "revision": None}
    return public


def _without_options(recovery: dict[str, Any]) -> dict[str, Any]:
    """The teacher may be a path of this machine."""
    options = {key: value for key, value in (recovery.get("options") or {}).items() if key != "base_model"}
    return {**recovery, "options": options}


def public_command(command: Any, hidden: set[str]) -> str:
    """The command line with the values of hidden flags replaced; '' where it cannot be read for sure."""
    if not command or not hidden:
        return str(command or "")
    try:
        words = shlex.split(str(command))
    except ValueError:
        return ""
    shown: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            flag = word[2:].split("=")[0].replace("-", "_")
            skipping = flag in hidden
            shown += [f"--{flag}", HIDDEN] if skipping else [word]
        elif not skipping:
            shown.append(word)
    return shlex.join(shown)
