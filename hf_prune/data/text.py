"""Text from anywhere `datasets` can read: a Hub id, a local file or folder, or the documentation Python ships with."""

import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.data.builtin import PYTHON_DOCS, PYTHON_DOCS_SPLITS, python_docs
from hf_prune.data.files import READERS, choose_split, local_files, looks_like_path, suffix
from hf_prune.data.problems import (
    CALIBRATION_KEYS,
    EVALUATION_KEYS,
    RecipeKeys,
    first_line,
    hub_problem,
    local_problem,
)
from hf_prune.errors import BadInputError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class TextData:
    """Documents and where they came from.

    documents: strings; may be read lazily, can be iterated more than once
    name: Hub id, `builtin:python-docs`, or the file's or folder's own name without the path that leads to it
    revision: commit sha of a Hub dataset, None where it is not known
    private: True for local files and folders, whose text must not reach a card or a Hub
    """

    documents: Iterable[str]
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    private: bool = False


def load_text(
    name: str,
    *,
    config: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    revision: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_documents: int | None = None,
    evaluation: bool = False,
) -> TextData:
    """Open a source of text; documents are streamed, so a large Hub dataset is never downloaded whole.

    name: Hub id | .jsonl, .json, .txt, .raw, .parquet or .csv file (also with .gz) or a folder of one such kind |
        `builtin:python-docs`. A path that exists wins over a Hub id.
    split: None takes `train` (with `evaluation`: `test`, else `validation`), or the only split there is. A single
        file is the split `train`.
    text_column: None takes `text`, else a chat column `messages` (a list of {role, content}, rendered with the chat
        template of `tokenizer`), else the only column of strings.
    evaluation: errors name the evaluation's recipe keys, and the split defaults to a held-out one.

    The rows of a .txt or .raw file are its lines, each with its newline, and "" for a line of white space: exactly the
    rows of wikitext-2-raw-v1 on the Hub. Joined with a blank line ("\\n\\n", the protocol of the published WikiText-2
    perplexities), WikiText-2's raw test file gives 304,986 tokens of SmolLM2. Stripping the newlines (304,734), the
    whole lines (305,276), or keeping the lone space of blank lines (306,453) does not.

    Raises BadInputError for a missing, empty or broken source, here or while the documents are read.
    """
    keys = EVALUATION_KEYS if evaluation else CALIBRATION_KEYS
    if name.startswith("builtin:"):
        return _builtin_text(name, split, max_documents, keys)

    import datasets

    path = Path(name).expanduser()
    local = path.exists()
    if not local and looks_like_path(name):
        raise BadInputError(f"{keys.name}: there is no file or folder {name!r}; give an existing path or a Hub id.")
    files, chosen = local_files(path, split, keys) if local else ([], "")
    source = path.resolve().name if local else name
    reader, options = READERS[suffix(files[0])] if local else (name, {})

    def problem(error: Exception) -> BadInputError:
        return local_problem(files, error, keys) if local else hub_problem(name, config, revision, error, keys)

    try:
        if local:
            # Escaped, or a bracket in a folder's name would be read as a pattern.
            data_files = [glob.escape(str(file.resolve())) for file in files]
            builder = datasets.load_dataset_builder(reader, data_files=data_files, **options)
        else:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
        streams = builder.as_streaming_dataset()
    except Exception as error:  # readers, the Hub's client and HTTP raise what they like; people need one sentence
        raise problem(error) from error
    chosen = chosen or choose_split(source, list(streams), split, keys)
    stream = streams["train" if local else chosen]

    def rows() -> Iterator[Row]:
        try:
            yield from stream
        except Exception as error:
            raise problem(error) from error

    first = next(rows(), None)
    if first is None:
        raise BadInputError(f"{keys.name}: {source} holds no documents in {chosen}; give a source that holds text.")
    column = _choose_column(stream, first, source, text_column, keys)
    render = _line if reader == "text" else _renderer(first, column, source, tokenizer, keys)
    return TextData(
        documents=_Documents(rows, column, render, max_documents),
        name=source,
        config=None if local else config,
        split=chosen,
        revision=None if local else _commit(builder) or revision,
        private=local,
    )


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True where the tokenizer itself puts a beginning-of-sequence token before a text (Llama, Gemma)."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


@dataclass(frozen=True)
class _Documents:
    """The text of each row, read anew by every iteration."""

    rows: Callable[[], Iterator[Row]]
    column: str
    render: Callable[[Any], str]
    limit: int | None

    def __iter__(self) -> Iterator[str]:
        for row in itertools.islice(self.rows(), self.limit):
            yield self.render(row[self.column])


def _builtin_text(name: str, split: str | None, max_documents: int | None, keys: RecipeKeys) -> TextData:
    if name != PYTHON_DOCS:
        raise BadInputError(f"{keys.name}: there is no built-in text {name!r}; the only one is {PYTHON_DOCS!r}.")
    chosen = choose_split(name, list(PYTHON_DOCS_SPLITS), split, keys)
    return TextData(documents=python_docs(chosen)[:max_documents], name=name, split=chosen)


def _choose_column(stream: "IterableDataset", first: Row, source: str, column: str | None, keys: RecipeKeys) -> str:
    available = ", ".join(first)
    if column is not None:
        if column in first:
            return column
        raise BadInputError(f"{keys.column}: {source} has no column {column!r}; choose one of {available}.")
    for usual in ("text", "messages"):
        if usual in first:
            return usual
    types = {key: getattr(feature, "dtype", None) for key, feature in (stream.features or {}).items()}
    strings = [key for key in first if isinstance(first[key], str) or types.get(key) in ("string", "large_string")]
    if len(strings) == 1:
        return strings[0]
    raise BadInputError(f"{keys.column}: {source} has no column 'text'; name its column of text, one of {available}.")


def _line(value: str) -> str:
    return value if value.strip() else ""


def _renderer(
    first: Row, column: str, source: str, tokenizer: "PreTrainedTokenizerBase | None", keys: RecipeKeys
) -> Callable[[Any], str]:
    """What turns a value of the column into text: the chat template for a conversation, nothing for a string."""
    if not isinstance(first[column], list):

        def render_text(value: Any) -> str:
            if value is None or isinstance(value, str):
                return value or ""
            raise BadInputError(
                f"{keys.column}: {column!r} of {source} holds {type(value).__name__}, not text; choose a text column."
            )

        return render_text

    if tokenizer is None or not tokenizer.chat_template:
        raise BadInputError(
            f"{keys.column}: {column!r} of {source} holds conversations and the tokenizer has no chat template; "
            "choose a column of text or a model with a chat template."
        )
    # Windows begin with this token where the tokenizer adds one; the template must not write it a second time.
    # The newline many templates end a turn with goes too, so that a conversation ends with its end-of-sequence token.
    bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""

    def render_chat(value: Any) -> str:
        try:
            rendered = str(tokenizer.apply_chat_template(value, tokenize=False)) if value else ""
        except Exception as error:  # templates are programs and raise what they like
            raise BadInputError(
                f"{keys.column}: the chat template cannot render a conversation of {source} ({first_line(error)}); "
                "each must be a list of {role, content} that the model's template accepts."
            ) from error
        return rendered.removeprefix(bos).rstrip("\n")

    return render_chat


def _commit(builder: "DatasetBuilder") -> str | None:
    """The commit a Hub builder reads from, which is its hash, from the cache too."""
    found = re.fullmatch(r"[0-9a-f]{40}", str(builder.hash))
    return found.group() if found else None
