"""What a recipe holds: flat YAML keys, the same names as command-line flags, checked before anything is loaded.

A recipe is one flat mapping. Its keys are the fields of the dataclasses of `arguments` plus the chosen method's own
keys (`block_size`, `damping`, ...), which the method's config dataclass declares. Unknown keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_prune.arguments import (
    SECTIONS,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    OutputArguments,
    RunArguments,
)
from hf_prune.errors import BadInputError
from hf_prune.fields import field_types, fill


@dataclass
class Recipe:
    """A checked recipe. `prune_options` are the keys of pruning, unchecked; `text` is what gets saved."""

    model: ModelArguments
    data: DataArguments
    evaluation: EvaluationArguments
    output: OutputArguments
    run: RunArguments
    prune_options: dict[str, Any]
    text: str

    def require(self, *keys: str) -> None:
        """Raise BadInputError for the first of `keys` (section fields) that has no value."""
        for key in keys:
            if not any(getattr(getattr(self, name), key, None) for name in SECTIONS):
                raise BadInputError(f"{key}: the recipe does not say; add the key or the flag --{key}.")


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader that refuses doubled keys and reads 2:4 as text (YAML 1.1 reads it as the base-60 number 124)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise BadInputError(f"{key_node.value}: the key stands twice in the recipe; keep one of the two.")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# The tables belong to the parent class: copy them before the resolvers are changed.
RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))

RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"), list("-+.0123456789")
)


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever RecipeLoader, or YAML 1.1, would read as something else than text."""


RecipeDumper.yaml_implicit_resolvers = {
    letter: [*yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []), *resolvers]
    for letter, resolvers in {**yaml.SafeDumper.yaml_implicit_resolvers, **RecipeLoader.yaml_implicit_resolvers}.items()
}


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Read a flat mapping; `origin` names the text in errors."""
    try:
        values = yaml.load(text, Loader=RecipeLoader)  # a SafeLoader: plain data only
    except (yaml.YAMLError, TypeError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise BadInputError(f"{origin}: not valid YAML{line}; write one `key: value` a line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInputError(f"{origin}: a recipe is a mapping of keys to values; write one `key: value` a line.")
    for key, value in values.items():
        if not isinstance(key, str) or isinstance(value, dict):
            raise BadInputError(f"{key}: recipes are flat; write one `key: value` a line, lists as [a, b].")
    return values


def parse_flags(arguments: list[str]) -> dict[str, Any]:
    """Turn `--key value`, `--key=value`, `--key a b` (a list) and a bare `--key` (true) into recipe values."""
    values: dict[str, list[str]] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            if key in values:
                raise BadInputError(f"{key}: the flag stands twice; keep one of the two.")
            values[key] = [value] if equals else []
        elif key is None:
            raise BadInputError(f"{argument}: flags are written --key value.")
        else:
            values[key].append(argument)
    return {key: _flag_value(key, words) for key, words in values.items()}


def _flag_value(key: str, words: list[str]) -> Any:
    if len(words) != 1:
        return words or True
    word = words[0]
    # Only lists and null need YAML; everything else is coerced from text by the field's own type.
    if word in ("null", "None"):
        return None
    return parse_yaml(f"{key}: {word}", f"--{key}")[key] if word.startswith("[") else word


def load_recipe(path: str | Path | None, flags: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, lay the flags over it and check every key that does not belong to a method.

    Raises:
        BadInputError: the file is missing or not flat YAML, or a value is out of range.
    """
    return make_recipe(*read_recipe(path, flags or {}))


def read_recipe(path: str | Path | None, flags: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The mapping of a recipe file with the flags laid over it, unchecked, and its text as it ran."""
    text = _read_text(path)
    values = parse_yaml(text, str(path))
    return {**values, **flags}, _recipe_text(text, values, dict(flags))


def read_values(path: str | Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping of a recipe file with the flags laid over it, unchecked."""
    return {**parse_yaml(_read_text(path), str(path)), **flags}


def _read_text(path: str | Path | None) -> str:
    """A recipe file's text; none for no file."""
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInputError(f"config: there is no recipe at {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"config: {path} cannot be read as text ({error}).") from None


def make_recipe(values: Mapping[str, Any], text: str | None = None) -> Recipe:
    """Build a Recipe from a flat mapping; keys of no section are kept in `prune_options` for the method to check."""
    rest = dict(values)
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        own = {key: rest.pop(key) for key in field_types(section) if key in rest}
        sections[name] = fill(section, own)
    return Recipe(**sections, prune_options=rest, text=text if text is not None else dump_yaml(values))


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Flat YAML that `parse_yaml` reads back to the same values."""
    return yaml.dump(dict(values), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def _recipe_text(text: str, values: dict[str, Any], flags: dict[str, Any]) -> str:
    """The recipe as it ran: verbatim where no flag changed it, else rewritten with a comment that says so."""
    # When a run stops says nothing of what it makes.
    flags = {key: value for key, value in flags.items() if key not in field_types(RunArguments)}
    changed = {key: value for key, value in flags.items() if key not in values or values[key] != value}
    if not changed:
        return text
    if not values:
        return dump_yaml(changed)
    return f"# With {', '.join(changed)} from the command line.\n" + dump_yaml({**values, **changed})
