"""Windows to train on, a tokenizer for them, and a fresh model: everything a small language model begins with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_prune.data.text import TextData, load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.models import AutoConfig
from hf_prune.recipe import parse_yaml
from hf_prune.training.arguments import TrainingTextArguments

END_OF_TEXT = "<|endoftext|>"
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"


def describe_training(
    text: TextData, windows: Windows, arguments: TrainingArguments, steps: int | None = None
) -> dict[str, Any]:
    """A report's words on a training: its text, and as many steps as it took or as were asked for."""
    asked = arguments.max_steps if arguments.max_steps > 0 else None
    count, length = windows.input_ids.shape
    return {
        "dataset": text.name,
        "config": text.config,
        "split": text.split,
        "revision": text.revision,
        "private": text.private,
        "windows": count,
        "seq_length": length,
        "steps": steps or asked,
        "epochs": None if steps or asked else arguments.num_train_epochs,
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "mixed_precision": arguments.mixed_precision,
    }


class Windows(Dataset[dict[str, Tensor]]):
    """int64 [windows, tokens] as what a Trainer takes: each window predicts itself."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[number], "labels": self.input_ids[number]}

    def without_last(self, count: int, key: str) -> tuple[Windows, Tensor]:
        """All but the last `count` windows, and those.

        Raises:
            BadInputError: nothing is left to train on, which `key` asked for.
        """
        left = len(self) - count
        if left < 1:
            raise BadInputError(f"{key}: {count} windows are held out, and the text fills {len(self)}; use more text.")
        return Windows(self.input_ids[:left]), self.input_ids[left:]


def open_text(arguments: TrainingTextArguments, tokenizer: PreTrainedTokenizerBase | None = None) -> TextData:
    """The training text.

    Raises:
        BadInputError: none is named, or it is missing, broken or empty.
    """
    if not arguments.dataset_name:
        raise BadInputError("dataset_name: training needs text; name a dataset, a file or builtin:python-docs.")
    return load_text(
        arguments.dataset_name,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        text_column=arguments.text_column,
        revision=arguments.dataset_revision,
        tokenizer=tokenizer,
    )


def training_windows(
    text: TextData, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None
) -> Windows:
    """Windows of `length` tokens one behind another, cut as those of the evaluation are.

    Raises:
        BadInputError: the text does not fill two.
    """
    try:
        windows = Windows(evaluation_windows(text, tokenizer, length, most).input_ids)
    except BadInputError as error:
        raise BadInputError(str(error).replace("eval_seq_length", "seq_length")) from None
    if len(windows) < 2:
        raise BadInputError(f"dataset_name: {text.name} fills one window of {length} tokens; lower seq_length.")
    return windows


def train_tokenizer(text: TextData, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, one of which ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=context)


def train_word_tokenizer(text: TextData, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """The rule of the Penn Treebank in language modelling: the most frequent words, `<unk>` for all others.

    Words are what stands between white space, as that corpus and WikiText-2 are written; other text wants its
    punctuation set apart first. The end of a line, several in a row counted once, is the word `<eos>`. Mikolov et al.
    (2010), https://www.isca-archive.org/interspeech_2010/mikolov10_interspeech.html.
    """
    end_of_line = normalizers.Replace(Regex(r"\s*\n\s*"), f" {END_OF_LINE} ")
    words = pre_tokenizers.WhitespaceSplit()
    counts: Counter[str] = Counter()
    for document in text.documents:
        counts.update(word for word, _ in words.pre_tokenize_str(end_of_line.normalize_str(document)))
    special = [UNKNOWN, END_OF_LINE]
    frequent = [word for word, _ in counts.most_common() if word not in special][: vocab_size - len(special)]
    vocabulary = {word: number for number, word in enumerate([*special, *frequent])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = end_of_line, words
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END_OF_LINE, model_max_length=context
    )


def fresh_config(model_type: str, overrides: str | None, more: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a fresh causal language model; `more` are the vocabulary's keys, which overrides may not name.

    Raises:
        BadInputError: an unknown architecture, or a key that its config does not have.
    """
    try:
        known = AutoConfig.for_model(model_type)
    except (ValueError, KeyError):
        raise BadInputError(
            f"model_type: {model_type!r} is no architecture; choose one of transformers, as llama, or "
            "stacked_lstm, rhn or awd_lstm_mos."
        ) from None
    keys = known.to_dict()
    values: dict[str, Any] = {}
    for item in (overrides or "").split(","):
        key, equals, text = item.strip().partition("=")
        if not key:
            continue
        if not equals or key not in keys:
            raise BadInputError(
                f"config_overrides: {item.strip()!r} sets no key of {type(known).__name__}; write hidden_size=64,..."
            )
        if key in more:
            raise BadInputError(f"config_overrides: {key} follows from the tokenizer; leave it out.")
        values[key] = parse_yaml(f"{key}: {text}", "config_overrides")[key]
    try:
        return AutoConfig.for_model(model_type, **values, **more)
    except Exception as error:  # configs check themselves and raise what they like
        raise BadInputError(f"config_overrides: {' '.join(str(error).split())[-200:].rstrip('.')}.") from None
