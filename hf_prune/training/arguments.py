"""What a training recipe holds: hf_prune's own flat keys, and those of transformers' TrainingArguments."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_prune.arguments import EvaluationArguments, ModelArguments, OutputArguments
from hf_prune.checkpoint.load import pick_device
from hf_prune.errors import BadInputError
from hf_prune.fields import coerce, field_lines, field_types, fill, unknown_key
from hf_prune.recipe import dump_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

Section = TypeVar("Section")


@dataclass
class FreshModelArguments:
    """A model that begins with random weights, instead of `model_name_or_path`."""

    model_type: str | None = field(
        default=None, metadata={"help": "architecture of a fresh model: llama, stacked_lstm, ..."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "its sizes, hidden_size=64,num_hidden_layers=2"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer of a fresh model"})
    vocab_size: int | None = field(
        default=None, metadata={"help": "instead: train a tokenizer of this size on the training text"}
    )
    tokenizer_type: str | None = field(
        default=None,
        metadata={"help": "bpe of bytes unless given, or word: the most frequent words, <unk> and <eos>"},
    )

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.tokenizer_name is not None:
            raise BadInputError("tokenizer_name: vocab_size trains a tokenizer; keep one of the two.")
        if self.tokenizer_type not in (None, "bpe", "word"):
            raise BadInputError(f"tokenizer_type: {self.tokenizer_type!r} is unknown; choose bpe or word.")
        if self.vocab_size is None and self.tokenizer_type is not None:
            raise BadInputError("tokenizer_type: it says what is trained; add vocab_size, or leave the key out.")
        if self.vocab_size is not None and self.vocab_size < self._least:
            why = "256 are bytes, and one ends a text" if self._least > 3 else "two are <unk> and <eos>"
            raise BadInputError(f"vocab_size: {self.vocab_size} is too small; {why}.")

    @property
    def _least(self) -> int:
        return 3 if self.tokenizer_type == "word" else 257


@dataclass
class TrainingTextArguments:
    """The text that is trained on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local file, or builtin:python-docs"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration (subset) of the dataset"})
    dataset_split: str | None = field(default=None, metadata={"help": "split, train unless given"})
    dataset_revision: str | None = field(default=None, metadata={"help": "revision of the dataset"})
    text_column: str | None = field(default=None, metadata={"help": "text column; messages holds chats"})
    seq_length: int | None = field(default=None, metadata={"help": "tokens a window; min(2048, context) unless given"})
    max_train_windows: int | None = field(default=None, metadata={"help": "train on the first windows only"})
    seed: int = field(default=0, metadata={"help": "of initial weights, of the order of windows, of the controls"})

    def __post_init__(self) -> None:
        for key in ("seq_length", "max_train_windows"):
            value = getattr(self, key)
            if value is not None and value < 2:
                raise BadInputError(f"{key}: {value} is too few; use 2 or more.")


@dataclass
class TrainRecipe:
    """A checked training recipe. `training` are the keys for TrainingArguments, `text_as_run` is what gets saved."""

    model: ModelArguments
    fresh: Any
    text: Any
    evaluation: EvaluationArguments
    output: OutputArguments
    method: Any
    training: dict[str, Any]
    text_as_run: str

    def require(self, *keys: str) -> None:
        """Raise BadInputError for the first of `keys` that has no value."""
        for key in keys:
            if not any(getattr(part, key, None) for part in vars(self).values()):
                raise BadInputError(f"{key}: the recipe does not say; add the key or the flag --{key}.")

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides how its training goes, as far as keys say it: text and weights are looked at themselves."""
        rest = (
            "save_steps",
            "save_strategy",
            "save_total_limit",
            "logging_steps",
            "report_to",
            "disable_tqdm",
            "run_name",
        )
        own = {key: value for key, value in sorted(self.training.items()) if key not in rest}
        # What a launcher says where the recipe is silent.
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no" and not (own.get("bf16") or own.get("fp16")):
            own["mixed_precision"] = precision
        return {"seed": self.text.seed, "training": own}

    def refuse(self, why: str, *keys: str) -> None:
        """Raise BadInputError for the first of `keys` that has a value."""
        for key in keys:
            if any(getattr(part, key, None) for part in vars(self).values()):
                raise BadInputError(f"{key}: {why}; leave the key out.")


# What a recipe says in hf_prune's own words, or never should.
_OURS = {
    "output_dir",
    "seed",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "resume_from_checkpoint",
    "do_train",
    "do_eval",
    "do_predict",
    "use_cpu",
    "local_rank",
}
_REFUSED = {
    "hub_token": "log in with `hf auth login` instead; a recipe is published with the model",
    "save_only_model": "a training that was cut goes on from its optimizer's state as well; leave the key out",
    "ignore_data_skip": "a training that was cut goes on where it was in its text; leave the key out",
    "auto_find_batch_size": "a training that begins anew with smaller batches would go on from moved weights; "
    "leave the key out and lower per_device_train_batch_size",
    "eval_strategy": "the evaluation is before and behind the training; leave the key out",
    "eval_on_start": "the evaluation is before and behind the training; leave the key out",
    "load_best_model_at_end": "what is kept is the end of the training; leave the key out",
    "fsdp": "masks and scores are of whole weights; leave the key out, several processes each hold a copy",
    "fsdp_config": "masks and scores are of whole weights; leave the key out, several processes each hold a copy",
    "deepspeed": "masks and scores are of whole weights; leave the key out, several processes each hold a copy",
}


def make_train_recipe(
    values: Mapping[str, Any],
    method: type,
    text: str | None = None,
    fresh: type = FreshModelArguments,
    trained_on: type = TrainingTextArguments,
    verb: str = "train",
) -> TrainRecipe:
    """Sort a flat mapping into its sections; keys of no section are those of TrainingArguments.

    Args:
        method: the config dataclass that holds the method's own keys.
        text: the recipe as it was written.
        fresh, trained_on: dataclasses of the keys for a fresh model and for what it is trained on.
        verb: of the command line, whose help an error names.

    Raises:
        BadInputError: an unknown key, a value of the wrong type or out of range.
    """
    rest = dict(values)
    sections = {
        "model": ModelArguments,
        "fresh": fresh,
        "text": trained_on,
        "evaluation": EvaluationArguments,
        "output": OutputArguments,
        "method": method,
    }
    parts: dict[str, Any] = {name: _take(section, rest) for name, section in sections.items()}
    known = _training_types()
    options = {}
    for key, value in rest.items():
        if key in _REFUSED and value not in (False, "no"):
            raise BadInputError(f"{key}: {_REFUSED[key]}.")
        if key not in known:
            every = (name for section in sections.values() for name in field_types(section))
            raise unknown_key(key, [*known, *every], verb)
        options[key] = _coerced(key, value, known[key])
    if str(options.get("optim", "")).startswith("schedule_free"):
        raise BadInputError(
            "optim: schedule-free optimizers keep the weights that count to themselves, where no mask reaches them; "
            "choose another, as adamw_torch."
        )
    return TrainRecipe(**parts, training=options, text_as_run=text if text is not None else dump_yaml(values))


def _take(section: type[Section], rest: dict[str, Any]) -> Section:
    return fill(section, {key: rest.pop(key) for key in field_types(section) if key in rest})


def _training_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {key: kind for key, kind in field_types(TrainingArguments).items() if key not in _OURS}


def _coerced(key: str, value: Any, kind: Any) -> Any:
    """Plain kinds are checked here; what else transformers takes, it checks itself."""
    simple = (int, float, bool, str)
    choices = [choice for choice in getattr(kind, "__args__", (kind,)) if choice is not type(None)]
    return coerce(key, value, kind) if len(choices) == 1 and choices[0] in simple else value


def make_training_arguments(
    options: Mapping[str, Any], output_dir: str | os.PathLike[str], seed: int, device: str
) -> TrainingArguments:
    """TrainingArguments with our defaults below the recipe's keys: one checkpoint kept, quiet where we are.

    Raises:
        BadInputError: transformers refuses a value, a logger is not installed, the device is not there or is named by
            its number, or a launcher has weights sharded.
    """
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.training_args import ParallelMode

    if ":" in device:
        raise BadInputError(
            f"device: {device} names one of several, and a training takes the first that it sees; write "
            f"device: {device.partition(':')[0]} and choose it by CUDA_VISIBLE_DEVICES."
        )
    for sharding in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{sharding}", "false").lower() in ("true", "1"):
            raise BadInputError(f"accelerate launch: {_REFUSED['fsdp']} (the launcher's config says {sharding}).")
    device = pick_device(device, int(os.environ.get("LOCAL_RANK", "0"))).type
    defaults = {
        "save_total_limit": 1,
        "logging_steps": 10,
        "disable_tqdm": bool(os.environ.get("HF_PRUNE_QUIET")) or int(os.environ.get("RANK", "0")) != 0,
        # A loss that is no number has to be seen to be stopped at.
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": device != "cpu",
    }
    try:
        arguments = TrainingArguments(
            **{**defaults, **options}, output_dir=str(Path(output_dir)), seed=seed, use_cpu=device == "cpu"
        )
    except (ValueError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())[:300].rstrip(".")
        raise BadInputError(f"training: transformers' TrainingArguments refuses these keys ({text}).") from None
    try:
        for integration in get_reporting_integration_callbacks(arguments.report_to):
            integration()
    except (ValueError, ImportError, RuntimeError) as error:
        raise BadInputError(f"report_to: {' '.join(str(error).split())[:300].rstrip('.')}.") from None
    if arguments.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        # Otherwise a machine with several GPUs would get torch's DataParallel, which masks know nothing of.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_smoothing(options: Mapping[str, Any], architecture: str) -> None:
    """Raise BadInputError where labels would be smoothed that transformers does not shift for this architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if options.get("label_smoothing_factor") and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise BadInputError(
            f"label_smoothing_factor: transformers smooths labels of its own architectures, of which {architecture} is "
            "none; leave the key out."
        )


def planned_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps that a Trainer takes over so many rows of training text."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    return math.ceil(arguments.num_train_epochs * steps_of_an_epoch(arguments, rows))


def steps_of_an_epoch(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of one pass over so many rows."""
    together = arguments.train_batch_size * arguments.world_size
    batches = rows // together if arguments.dataloader_drop_last else math.ceil(rows / together)
    return max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)


def training_help(
    verb: str, text: str, method: type, fresh: type | None = None, trained_on: type = TrainingTextArguments
) -> str:
    """Usage of a verb that trains, from the dataclasses themselves; see `make_train_recipe`."""
    lines = [f"usage: hf-prune {verb} --config RECIPE.yaml [--key value ...]", "", text, ""]
    lines.append("Keys of a recipe and flags of the same names (a flag wins):")
    sections: list[tuple[str, type]] = [("model", ModelArguments)]
    sections += [("fresh model", fresh)] if fresh else []
    text_too = [("evaluation", EvaluationArguments)] if trained_on is TrainingTextArguments else []
    sections += [("trained on", trained_on), *text_too, ("output", OutputArguments)]
    for title, section in [*sections, ("method", method)]:
        lines += ["", f"{title}:", *field_lines(section)]
    lines += ["", "Every key of transformers' TrainingArguments is one too: learning_rate, max_steps, report_to, ..."]
    return "\n".join(lines) + "\n"
