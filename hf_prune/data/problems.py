"""One sentence for each way a source of text can be unusable, naming the recipe key and the fix."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hf_prune.errors import BadInputError


@dataclass(frozen=True)
class RecipeKeys:
    """The recipe keys that errors name, and the splits taken when the recipe names none, best first."""

    name: str
    config: str
    split: str
    column: str
    default_splits: tuple[str, ...]


CALIBRATION_KEYS = RecipeKeys("dataset_name", "dataset_config", "dataset_split", "text_column", ("train",))
EVALUATION_KEYS = RecipeKeys(
    "eval_dataset_name", "eval_dataset_config", "eval_split", "eval_text_column", ("test", "validation")
)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def local_problem(files: list[Path], error: Exception, keys: RecipeKeys) -> BadInputError:
    """A local file that its reader gave up on, with the line of broken JSON where there is one."""
    for file in files:
        broken = _broken_json_line(file) if file.suffix in (".json", ".jsonl") else None
        if broken is not None:
            return BadInputError(f"{keys.name}: line {broken} of {file.name} is not valid JSON; correct or remove it.")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    names = ", ".join(file.name for file in files[:3])
    return BadInputError(f"{keys.name}: {names} cannot be read ({first_line(cause)}); repair or replace the file.")


def _broken_json_line(file: Path) -> int | None:
    """The first line that does not parse, of JSON lines or of one JSON array."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0].lstrip().startswith("["):
        return _json_error_line("\n".join(lines))
    return next((number for number, line in enumerate(lines, start=1) if line.strip() and _json_error_line(line)), None)


def _json_error_line(text: str) -> int | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno
    return None


def hub_problem(
    name: str, config: str | None, revision: str | None, error: Exception, keys: RecipeKeys
) -> BadInputError:
    """A Hub dataset that cannot be opened: absent, gated, private, offline, out of reach, or of no readable kind."""
    from datasets import exceptions
    from huggingface_hub import constants

    message = first_line(error)
    missing = isinstance(error, exceptions.FileNotFoundDatasetsError)
    if isinstance(error, ValueError) and "onfig" in message:
        listed = re.search(r"\[.*?\]", str(error), re.DOTALL)
        known = listed.group() if listed else "those on its page"
        wrong = f"{name} has no configuration {config!r}" if config else f"{name} has several configurations"
        return BadInputError(f"{keys.config}: {wrong}; choose one of {known}.")
    if "gated" in message:
        fix = "accept its terms on the Hub and log in with `hf auth login`"
    elif "Revision" in message:
        message, fix = f"{name} has no revision {revision!r} on the Hub", "correct the revision"
    elif isinstance(error, exceptions.DatasetNotFoundError):
        fix = "correct the id or give a local path, and log in with `hf auth login` if it is private"
    elif constants.HF_HUB_OFFLINE:
        message = f"{name} is not in the local cache and HF_HUB_OFFLINE forbids fetching it"
        fix = "unset HF_HUB_OFFLINE, or give a local file"
    elif isinstance(error, OSError) and not missing:
        message = f"{name} cannot be fetched from the Hub at {constants.ENDPOINT} ({message})"
        fix = "check the network, or give a local file"
    else:
        message = f"{name} cannot be read from the Hub ({message})"
        fix = "give another dataset or a local file"
    return BadInputError(f"{keys.name}: {message}; {fix}.")
