"""What the verbs share: recipe flags, help from the dataclasses, a console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.arguments import SECTIONS, PruneConfig
from hf_prune.errors import BadInputError
from hf_prune.fields import field_lines, field_types
from hf_prune.recipe import Recipe, load_recipe, parse_flags

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Standard output, through rich; silent on every process but the main one."""
    from rich.console import Console

    from hf_prune.progress import is_main_process

    return Console(quiet=not is_main_process(), highlight=False)


def quiet_libraries() -> None:
    """Progress bars of our own only; call once transformers may be imported."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def read_recipe(arguments: list[str]) -> Recipe:
    """`--config file.yaml` with the other flags laid over it."""
    flags = parse_flags(arguments)
    return load_recipe(take_text(flags, "config"), flags)


def split_launch_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those flags of `accelerate launch`, with their values, that are no recipe keys."""
    ours = {key for section in (*SECTIONS.values(), PruneConfig) for key in field_types(section)} | {"config"}
    if all(_name(argument) in ours for argument in arguments if argument.startswith("--")):
        return arguments, []
    # Late: it brings torch.
    from accelerate.commands.launch import launch_command_parser

    theirs = {_name(option) for option in launch_command_parser()._option_string_actions} - ours
    own: list[str] = []
    launch: list[str] = []
    place = own
    for argument in arguments:
        if argument.startswith("--"):
            place = launch if _name(argument) in theirs else own
        place.append(argument)
    return own, launch


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0].replace("-", "_")


def split_positional(arguments: list[str], what: str) -> tuple[str, dict[str, Any]]:
    """The first argument and the flags behind it.

    Raises:
        BadInputError: the first argument is missing.
    """
    if not arguments or arguments[0].startswith("--"):
        raise BadInputError(f"name {what} first, then the flags.")
    return arguments[0], parse_flags(arguments[1:])


def take_text(flags: dict[str, Any], key: str) -> str | None:
    """Take a flag with a text value out of `flags`; None where it is absent.

    Raises:
        BadInputError: the flag stands without a value, or with several.
    """
    value = flags.pop(key, None)
    if value is True or isinstance(value, list):
        raise BadInputError(f"{key}: needs one value; write --{key} VALUE.")
    return None if value is None else str(value)


def take_flags(flags: dict[str, Any], *known: str) -> dict[str, Any]:
    """Flags a verb knows; BadInputError for the first that it does not."""
    for key in flags:
        if key not in known:
            raise BadInputError(f"{key}: unknown flag; this verb knows {', '.join('--' + name for name in known)}.")
    return flags


def recipe_help(verb: str, text: str) -> str:
    """Usage of a verb that takes a recipe, from the dataclasses themselves."""
    lines = [f"usage: hf-prune {verb} --config RECIPE.yaml [--key value ...]", "", text, ""]
    lines.append("Keys of a recipe and flags of the same names (a flag wins):")
    for title, section in [*SECTIONS.items(), ("pruning", PruneConfig)]:
        lines += ["", f"{title}:", *field_lines(section)]
    lines += ["", "A method's own keys (block_size, damping, ...) are flags as well; `hf-prune methods` lists them."]
    return "\n".join(lines) + "\n"
