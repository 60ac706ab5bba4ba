"""What a user decides: one dataclass of flat keys a subject, checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

from hf_prune.clock import next_time, parse_duration
from hf_prune.errors import BadInputError
from hf_prune.patterns import Pattern

RECONSTRUCT = ("none", "linear", "block")
OUTPUT_IMPORTANCE = ("none", "fisher")

OFFLOAD = ("none", "cpu", "disk")
OFFLOAD_HELP = "cpu: weights stay in the host's memory, disk: in their files; only the block at work is on the device"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Which model, and where it runs."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id, local folder, or builtin:NAME"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the model"})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the model's repo carries"})
    device: str = field(default="auto", metadata={"help": "auto (a GPU where there is one), cpu, cuda, cuda:1, mps"})
    num_processes: int = field(default=1, metadata={"help": "start this many processes through accelerate"})
    offload: str = field(default="none", metadata={"help": OFFLOAD_HELP})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BadInputError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?", self.device):
            raise BadInputError(f"device: {self.device!r} is not a device; use auto, cpu, cuda, cuda:N or mps.")
        if self.num_processes < 1:
            raise BadInputError(f"num_processes: {self.num_processes} is too few; use 1 or more.")
        if self.offload not in OFFLOAD:
            raise BadInputError(f"offload: {self.offload!r} is not one of {', '.join(OFFLOAD)}.")


@dataclass
class PruneConfig:
    """What every pruning run decides, whatever the method. Each method's config extends it with its own keys.

    Args:
        method: a preset of criterion and update (`magnitude`, `wanda`, `sparsegpt`; `hf-prune methods` lists them).
        criterion: what to drop; the method's own unless given.
        update: what happens to the surviving weights; the method's own unless given, `none` leaves them alone.
        reconstruct: `linear`, a least squares refit of each matrix on its support; `block`, a short training of each
            block towards its dense outputs; `none`; `auto` is `block` where an `n:m` pattern leaves no densities to
            share out and pruned outputs are handed on, and `none` otherwise.
        sparsity: share of the targeted weights set to zero, in [0, 1); follows from the pattern where there is one.
        pattern: `unstructured`, or `n:m`: at most n of m consecutive inputs of an output row are kept.
        allocation: how the budget is shared out: `uniform`, `global`, `erk`, `owl`, `alpha`, `layerwise_l1`,
            `layerwise_l2`, `fisher`, `fcpts`, or the path of a saved `prune_plan.json` whose densities are used; `auto`
            is `fisher` where the pattern is unstructured and `uniform` otherwise.
        output_importance: how much an error of each output counts where weights are compared over the whole matrix:
            `none`, all alike; `fisher`, by the mean square of the log-likelihood's gradient by it, which takes a
            forward and a backward pass over a few calibration windows; `auto` is `fisher` where the pattern is
            unstructured and the criterion is the method's own, and `none` otherwise.
        min_keep_ratio: floor in [0, 1): each weight matrix and each of its rows keep at least this share.
        targets: modules to prune, or parts of fused ones (`qkv_proj.value`), by suffix (`q_proj`), full name, or `re:`
            and a regular expression over the full name; every linear layer of every block unless given. Embeddings and
            the LM head are never included by default.
        ignore: modules to leave alone, written like `targets`.
        channel_permutation: under an `n:m` pattern, put each block's MLP neurons in an order first that lets more of
            the large scores stay; the model computes the same.
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
    output_importance: str = "none"
    min_keep_ratio: float = 0.0
    targets: list[str] | None = None
    ignore: list[str] | None = None
    channel_permutation: bool = False
    propagate: bool = True
    # Own keys of parts that come from elsewhere than `method`.
    options: dict[str, Any] = field(default_factory=dict)

    # What a method's config declares: how tables call it and the parts it brings.
    info: ClassVar[Any] = None
    criterion_name: ClassVar[str | None] = None
    update_name: ClassVar[str] = "none"
    structured: ClassVar[bool] = False

    def make_criterion(self) -> Any:
        """The method's criterion, None where it has none."""
        return None

    def make_update(self) -> Any:
        """The method's update, None where survivors keep their values."""
        return None

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        self.allocation = resolved_allocation(self.allocation, self.pattern)
        if self.output_importance == "auto":
            # Under n:m, and for some criteria, weights are compared inside a row, whatever its outputs count.
            own = self.criterion in (None, self.criterion_name) and self.pattern == "unstructured"
            self.output_importance = "fisher" if own else "none"
        self.reconstruct = resolved_reconstruct(self.reconstruct, self.pattern, self.propagate)
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
            raise BadInputError(
                f"reconstruct: {self.reconstruct!r} is unknown; choose {', '.join(RECONSTRUCT)} or auto."
            )
        if self.output_importance not in OUTPUT_IMPORTANCE:
            raise BadInputError(
                f"output_importance: {self.output_importance!r} is unknown; choose {', '.join(OUTPUT_IMPORTANCE)} or "
                "auto."
            )
        if self.channel_permutation and pattern.density is None:
            raise BadInputError(
                "channel_permutation: an unstructured pattern has no groups of inputs; set pattern to n:m, or leave "
                "the key out."
            )
        for key in ("targets", "ignore"):
            for pattern_text in getattr(self, key) or []:
                check_module_pattern(key, pattern_text)


UNITS = ("mlp", "attention", "heads", "depth")
LAYOUTS = ("shrink", "pad")


@dataclass
class StructuredConfig(PruneConfig):
    """What every structured method decides: which units go, so that the model becomes smaller.

    Here `sparsity` is the share of the blocks' parameters that is removed.

    Args:
        units: what is removed: `mlp` neurons, whole key-value groups of `attention`, query `heads` (the same number in
            every key-value group), whole blocks (`depth`).
        budget: how the removed parameters are shared out over the units, `[mlp=0.8, depth=0.2]`; `search` tries several
            ways on calibration windows held out; unless given, `mlp`, `attention` and `heads` lose equal shares of
            their own parameters, and `depth` its part by number of units; where the stock config cannot say so few
            groups or heads, more of them stay and the MLPs give the rest.
        round_to: MLP widths stay multiples of this (8, 16, 64, 128).
        layout: `shrink`, the same width in every block; `pad`, widths by `allocation`, stored with zeros to the widest.
    """

    units: list[str] | None = None
    budget: list[str] | None = None
    round_to: int = 1
    layout: str = "shrink"

    structured: ClassVar[bool] = True

    @property
    def searches_budget(self) -> bool:
        """Whether shares of the budget are found by trying."""
        return self.budget == ["search"]

    def make_reducer(self, seed: int = 0) -> Any:
        """The method's arithmetic for one group of units."""
        raise NotImplementedError

    def describe_run(self) -> Any:
        """What tables and cards say of this choice of options."""
        return self.info

    def __post_init__(self) -> None:
        defaults = PruneConfig()
        if self.reconstruct == "linear":
            raise BadInputError(f"reconstruct: linear refits zeros; with method {self.method} set fusion to refit.")
        unused = ("criterion", "update", "pattern", "targets", "ignore", "min_keep_ratio", "propagate",
                  "output_importance", "channel_permutation")  # fmt: skip
        for key in unused:
            if getattr(self, key) != getattr(defaults, key):
                raise BadInputError(f"{key}: method {self.method} removes whole units; leave it out, units says which.")
        if self.sparsity is None:
            self.sparsity = 0.2
        super().__post_init__()
        self.units = list(self.units or ["mlp"])
        for unit in self.units:
            if unit not in UNITS:
                raise BadInputError(f"units: {unit!r} is unknown; choose of {', '.join(UNITS)}.")
        if {"attention", "heads"} <= set(self.units):
            raise BadInputError("units: attention removes key-value groups, heads thins them; choose one of the two.")
        if self.round_to < 1:
            raise BadInputError(f"round_to: {self.round_to} is no width; use 1, 8, 16, 64 or 128.")
        if self.layout not in LAYOUTS:
            raise BadInputError(f"layout: {self.layout!r} is unknown; choose {', '.join(LAYOUTS)}.")
        if self.layout == "shrink" and self.allocation != "uniform":
            raise BadInputError(
                f"allocation: {self.allocation} gives every block its own width, which a stock config cannot say; set "
                "layout to pad or leave allocation out."
            )
        if self.searches_budget and ("mlp" not in self.units or len(self.units) < 2):
            raise BadInputError("budget: search splits between mlp and other units; name both in units.")
        if self.layout == "pad" and self.units != ["mlp"]:
            raise BadInputError("layout: pad fills MLPs up with zeros; set units to mlp.")


def resolved_allocation(name: str, pattern: str) -> str:
    """What `auto` stands for; an n:m pattern keeps the same share everywhere and leaves nothing to decide."""
    if name != "auto":
        return name
    return "fisher" if pattern == "unstructured" else "uniform"


def resolved_reconstruct(name: str, pattern: str, propagate: bool) -> str:
    """What `auto` stands for: the time that no learning of densities takes."""
    if name != "auto":
        return name
    return "block" if pattern != "unstructured" and propagate else "none"


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
    seed: int = field(default=0, metadata={"help": "seed that chooses the calibration windows"})
    statistics_folder: str | None = field(
        default=None,
        metadata={"help": "keeps statistics (propagate: false) and learned thresholds for other runs"},
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


@dataclass
class RunArguments:
    """How a run goes on after a cut, and when it stops by itself; nothing in the result depends on it."""

    time_limit: str | None = field(default=None, metadata={"help": "stop between blocks in time, as in 6h"})
    deadline: str | None = field(default=None, metadata={"help": "stop between blocks before this time, as in 06:00"})
    checkpoint_every: int = field(
        default=0, metadata={"help": "blocks between saves; 0, as many as keep saving under 5 % of the time"}
    )
    restart: bool = field(default=False, metadata={"help": "throw away what an unfinished run of output_dir has kept"})

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            parse_duration("time_limit", self.time_limit)
        if self.deadline is not None:
            next_time("deadline", self.deadline, datetime.now())
        if self.checkpoint_every < 0:
            raise BadInputError(f"checkpoint_every: {self.checkpoint_every} is too few; use 0 or more.")


SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "evaluation": EvaluationArguments,
    "output": OutputArguments,
    "run": RunArguments,
}


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
