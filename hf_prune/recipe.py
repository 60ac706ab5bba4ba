"""What a recipe holds: flat YAML keys, the same names as command-line flags, checked before anything is loaded.

A recipe is one flat mapping. Its keys are the fields of the dataclasses below plus the chosen method's own keys
(`block_size`, `damping`, ...), which the method's config dataclass declares. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union

import yaml

from hf_prune.errors import BadInputError
from hf_prune.patterns import Pattern

RECONSTRUCT = ("none", "linear", "block")
DTYPES = ("auto", "float32", "bfloat16", "float16")
Arguments = TypeVar("Arguments")


@dataclass
class ModelArguments:
    """Which model, and where it runs."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id, local folder, or builtin:NAME"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the model"})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the model's repo carries"})
    device: str = field(default="auto", metadata={"help": "auto (a GPU where there is one), cpu, cuda, cuda:1, mps"})
    num_processes: int = field(default=1, metadata={"help": "start this many processes through accelerate"})
    offload: str = field(default="none", metadata={"help": "none: the whole model stays on the device"})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BadInputError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?", self.device):
            raise BadInputError(f"device: {self.device!r} is not a device; use auto, cpu, cuda, cuda:N or mps.")
        if self.num_processes < 1:
            raise BadInputError(f"num_processes: {self.num_processes} is too few; use 1 or more.")
        if self.offload != "none":
            raise BadInputError(f"offload: {self.offload!r} is not supported; the only choice today is none.")


@dataclass
class PruneConfig:
    """What every pruning run decides, whatever the method. Each method's config extends it with its own keys.

    Args:
        method: a preset of criterion and update (`magnitude`, `wanda`, `sparsegpt`; `hf-prune methods` lists them).
        criterion: what to drop; the method's own unless given.
        update: what happens to the surviving weights; the method's own unless given, `none` leaves them alone.
        reconstruct: `linear`, a least squares refit of each matrix on its support; `block`, a short training of each
            block towards its dense outputs; `none`.
        sparsity: share of the targeted weights set to zero, in [0, 1); follows from the pattern where there is one.
        pattern: `unstructured`, or `n:m`: at most n of m consecutive inputs of an output row are kept.
        allocation: how the budget is shared out: `uniform`, `global`, `erk`, `owl`, `alpha`, `layerwise_l1`,
            `layerwise_l2`, `fcpts`, or the path of a saved `prune_plan.json` whose densities are used; `auto` is
            `fcpts` where the pattern is unstructured and `uniform` otherwise.
        min_keep_ratio: floor in [0, 1): each weight matrix and each of its rows keep at least this share.
        targets: modules to prune, by suffix (`q_proj`), full name, or `re:` and a regular expression over the full
            name; every linear layer of every block unless given. Embeddings and the LM head are never included
            by default.
        ignore: modules to leave alone, written like `targets`.
        propagate: every block sees what the pruned blocks before it hand over; false, what the dense ones do, which
            saves a forward pass and costs quality.

    Raises:
        BadInputError: a value is out of range, or sparsity and pattern contradict one another.
    """

    method: str | None = None
    criterion: str | None = None
    update: str | None = None
    reconstruct: str = "none"
    sparsity: float | None = None
    pattern: str = "unstructured"
    allocation: str = "uniform"
    min_keep_ratio: float = 0.0
    targets: list[str] | None = None
    ignore: list[str] | None = None
    propagate: bool = True
    # Own keys of parts that come from elsewhere than `method`.
    options: dict[str, Any] = field(default_factory=dict)

    # What a method's config declares: how tables call it and the parts it brings.
    info: ClassVar[Any] = None
    criterion_name: ClassVar[str | None] = None
    update_name: ClassVar[str] = "none"

    def make_criterion(self) -> Any:
        """The method's criterion, None where it has none."""
        return None

    def make_update(self) -> Any:
        """The method's update, None where survivors keep their values."""
        return None

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        self.allocation = resolved_allocation(self.allocation, self.pattern)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise BadInputError(f"sparsity: {self.sparsity} is outside [0, 1); 0.5 removes half of the weights.")
        if pattern.density is not None:
            if self.sparsity is not None and abs(self.sparsity - (1 - pattern.density)) > 1e-6:
                raise BadInputError(
                    f"sparsity: {self.sparsity} contradicts pattern {self.pattern}, which keeps {pattern.density:.4g} "
                    f"of the weights; leave sparsity out or set it to {1 - pattern.density:.4g}."
                )
            self.sparsity = 1 - pattern.density
        if not 0 <= self.min_keep_ratio < 1:
            raise BadInputError(f"min_keep_ratio: {self.min_keep_ratio} is outside [0, 1).")
        if self.sparsity is None and not self.allocation.endswith(".json"):
            self.sparsity = 0.5
        if self.sparsity is not None and self.min_keep_ratio > 1 - self.sparsity + 1e-9:
            raise BadInputError(
                f"min_keep_ratio: {self.min_keep_ratio} is more than the {1 - self.sparsity:.4g} that sparsity "
                f"{self.sparsity:.4g} keeps; lower one of them."
            )
        if self.reconstruct not in RECONSTRUCT:
            raise BadInputError(f"reconstruct: {self.reconstruct!r} is unknown; choose {', '.join(RECONSTRUCT)}.")
        for key in ("targets", "ignore"):
            for pattern_text in getattr(self, key) or []:
                check_module_pattern(key, pattern_text)


def resolved_allocation(name: str, pattern: str) -> str:
    """What `auto` stands for; an n:m pattern keeps the same share everywhere and leaves nothing to decide."""
    if name != "auto":
        return name
    return "fcpts" if pattern == "unstructured" else "uniform"


@dataclass
class DataArguments:
    """The calibration text."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local file or folder, or builtin:python-docs"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration (subset) of the dataset"})
    dataset_split: str | None = field(default=None, metadata={"help": "split, train unless given"})
    dataset_revision: str | None = field(default=None, metadata={"help": "revision of the dataset"})
    text_column: str | None = field(default=None, metadata={"help": "text column; messages holds chats"})
    num_calibration_samples: int = field(default=128, metadata={"help": "calibration windows"})
    seq_length: int | None = field(default=None, metadata={"help": "tokens a window; min(2048, context) unless given"})
    seed: int = field(default=0, metadata={"help": "seed of every random choice"})
    statistics_folder: str | None = field(
        default=None, metadata={"help": "share activations' statistics between runs with propagate: false"}
    )

    def __post_init__(self) -> None:
        if self.num_calibration_samples < 1:
            raise BadInputError(f"num_calibration_samples: {self.num_calibration_samples} is too few; use 1 or more.")
        if self.seq_length is not None and self.seq_length < 2:
            raise BadInputError(f"seq_length: {self.seq_length} is too short; use 2 or more.")


@dataclass
class EvaluationArguments:
    """The text and the measurements that say what pruning cost."""

    eval_dataset_name: str | None = field(default=None, metadata={"help": "as dataset_name; no evaluation without it"})
    eval_dataset_config: str | None = field(default=None, metadata={"help": "as dataset_config"})
    eval_split: str | None = field(default=None, metadata={"help": "split, test unless given"})
    eval_dataset_revision: str | None = field(default=None, metadata={"help": "as dataset_revision"})
    eval_text_column: str | None = field(default=None, metadata={"help": "as text_column"})
    eval_seq_length: int | None = field(default=None, metadata={"help": "as seq_length"})
    eval_max_windows: int | None = field(default=None, metadata={"help": "evaluate the first windows only"})
    eval_add_bos: bool | None = field(default=None, metadata={"help": "BOS in each window; as the tokenizer does"})
    eval_efficiency: bool = field(default=True, metadata={"help": "measure sizes and speeds as well"})
    sample_prompts: list[str] | None = field(default=None, metadata={"help": "prompts that both models continue"})

    def __post_init__(self) -> None:
        if self.eval_seq_length is not None and self.eval_seq_length < 2:
            raise BadInputError(f"eval_seq_length: {self.eval_seq_length} is too short; use 2 or more.")
        if self.eval_max_windows is not None and self.eval_max_windows < 1:
            raise BadInputError(f"eval_max_windows: {self.eval_max_windows} is too few; use 1 or more.")


@dataclass
class OutputArguments:
    """Where the result goes."""

    output_dir: str | None = field(default=None, metadata={"help": "folder of the pruned model"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace output_dir where it exists"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the folder when it is verified"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to push to, user/name"})
    hub_private_repo: bool = field(default=False, metadata={"help": "create the repository as private"})
    publish_samples: bool = field(default=False, metadata={"help": "let samples of local text into card and push"})

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise BadInputError("hub_model_id: push_to_hub needs the repository's name; set it to user/name.")


SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "evaluation": EvaluationArguments,
    "output": OutputArguments,
}


@dataclass
class Recipe:
    """A checked recipe. `method_options` are the keys that only the method knows; `text` is what gets saved."""

    model: ModelArguments
    data: DataArguments
    evaluation: EvaluationArguments
    output: OutputArguments
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
    except (yaml.YAMLError, TypeError) as error:
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
    text = _read_text(path)
    values = parse_yaml(text, str(path))
    return make_recipe({**values, **(flags or {})}, text=_recipe_text(text, values, dict(flags or {})))


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
    changed = {key: value for key, value in flags.items() if key not in values or values[key] != value}
    if not changed:
        return text
    if not values:
        return dump_yaml(changed)
    return f"# With {', '.join(changed)} from the command line.\n" + dump_yaml({**values, **changed})


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


def unknown_key(key: str, known: typing.Iterable[str]) -> BadInputError:
    """The error for a key that nobody declares, with the nearest known one."""
    everything = sorted({*known, *(name for section in SECTIONS.values() for name in field_types(section))})
    near = difflib.get_close_matches(key, everything, n=1)
    hint = f"did you mean {near[0]}?" if near else "`hf-prune prune --help` lists the keys."
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
    elif isinstance(value, kind):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise BadInputError(f"{key}: {value!r} is not {names.get(kind, kind.__name__)}.")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def check_module_pattern(key: str, pattern: str) -> None:
    """Raise BadInputError for an empty module pattern or a `re:` pattern that does not compile."""
    if not pattern:
        raise BadInputError(f"{key}: an empty name matches nothing; remove it.")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise BadInputError(f"{key}: {pattern!r} is not a regular expression ({error}).") from None


def matches(pattern: str, name: str) -> bool:
    """Whether a `targets` / `ignore` pattern names a module: full name, suffix, a parent's full name, or `re:`."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern) or name.startswith(pattern + ".")
