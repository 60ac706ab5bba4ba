"""From words of a recipe or a command line to fields of a dataclass: every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

from hf_prune.arguments import SECTIONS
from hf_prune.errors import BadInputError

Arguments = TypeVar("Arguments")


def field_types(section: type) -> dict[str, Any]:
    """Field names of a dataclass with their resolved annotations."""
    hints = typing.get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section) if item.init}


def fill(section: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Make a dataclass from recipe values, each coerced to its field's type; unknown keys are errors."""
    annotations = field_types(section)
    for key in values:
        if key not in annotations:
            raise unknown_key(key, annotations)
    return section(**{key: coerce(key, value, annotations[key]) for key, value in values.items()})


def unknown_key(key: str, known: typing.Iterable[str], verb: str = "prune") -> BadInputError:
    """The error for a key that nobody declares, with the nearest known one, or the verb's help."""
    everything = sorted({*known, *(name for section in SECTIONS.values() for name in field_types(section))})
    near = difflib.get_close_matches(key, everything, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`hf-prune {verb} --help` lists the keys."
    return BadInputError(f"{key}: unknown recipe key; {hint}")


def coerce(key: str, value: Any, annotation: Any) -> Any:
    """Turn a YAML or flag value into the annotated type; BadInputError where that loses or guesses anything."""
    choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if value is None:
        if type(None) in choices:
            return None
        raise BadInputError(f"{key}: needs a value.")
    kind = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(kind) is list:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
        return value.lower() in ("true", "yes")
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float and number == number and abs(number) != float("inf"):
                return number
            if kind is int and number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise BadInputError(f"{key}: {value!r} is not {names.get(kind, kind.__name__)}.")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def field_lines(section: type) -> list[str]:
    """A line of help for each field of a dataclass, from its metadata or its docstring."""
    documented = _documented(section)
    lines = []
    for item in dataclasses.fields(section):
        if item.name == "options":
            continue
        default = "" if item.default in (None, dataclasses.MISSING) else f" [{item.default}]"
        help_text = item.metadata.get("help") or documented.get(item.name, "")
        lines.append(f"  --{item.name:<24} {help_text}{default}")
    return lines


def _documented(section: type) -> dict[str, str]:
    """name -> first sentence, from the Args of a docstring."""
    described: dict[str, str] = {}
    name = None
    inside = False
    for line in inspect.getdoc(section).splitlines():  # type: ignore[union-attr]
        if line.strip() == "Args:":
            inside = True
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            described[name] = text
        elif inside and name and line.startswith("     "):
            described[name] += " " + line.strip()
        elif line.strip() and not line.startswith(" "):
            inside = False
    return {key: text.split(";")[0].rstrip(".").replace("`", "") for key, text in described.items()}
