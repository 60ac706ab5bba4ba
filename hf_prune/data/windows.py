"""Token windows: what a model is calibrated on and what its perplexity is measured on."""

import itertools
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from hf_prune.data.text import TextData, adds_bos
from hf_prune.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Documents are shuffled among this many neighbours, so that a stream of any length can be shuffled and left early.
SHUFFLE_BUFFER = 10_000
CHARACTERS_PER_TOKEN = 4
# Families that look a position up in a table; others compute it.
_LEARNED_POSITIONS = ("biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt")


@dataclass(frozen=True)
class EvaluationWindows:
    """Windows that perplexity is measured on; each predicts its last seq_length - 1 tokens.

    input_ids: int64 [windows, seq_length]
    num_bytes: int64 [windows], UTF-8 bytes of the text that the predicted tokens cover
    add_bos: whether each window begins with the beginning-of-sequence token
    total_tokens: tokens of the text that was read, without that token
    """

    input_ids: torch.Tensor
    num_bytes: torch.Tensor
    add_bos: bool
    total_tokens: int


def sequence_length(config: "PreTrainedConfig", asked: int | None = None, key: str = "seq_length") -> int:
    """Tokens a window: as many as are asked for, under a key of the recipe, or min(2048, the model's context).

    A context of 128k would ask for tens of gigabytes of activations.

    Raises:
        BadInputError: the model has learned fewer positions, and cannot compute beyond them.
    """
    own = config.get_text_config()
    context = getattr(own, "max_position_embeddings", None)
    if asked and context and asked > context and own.model_type in _LEARNED_POSITIONS:
        raise BadInputError(f"{key}: {asked} is more than the {context} positions that the model has; lower it.")
    return asked or min(2048, int(context or 2048))


def calibration_windows(
    text: TextData, tokenizer: "PreTrainedTokenizerBase", num_samples: int, seq_length: int, seed: int
) -> torch.Tensor:
    """Full windows of shuffled documents, int64 [num_samples, seq_length].

    Documents are shuffled by `seed`, tokenised one after the other and packed without gaps, until there are enough
    tokens; a document may run on into the next window. So short documents serve too (of the first 1,000 of C4 only 32
    reach 2,048 tokens), and reading ends when the text does. Between documents stands what the model saw there in
    training: the beginning-of-sequence token before each where the tokenizer adds one, else the end-of-sequence token
    after each, else nothing; a document that already brings it (rendered chat) gets no second one.

    Raises BadInputError when the text is too short for num_samples windows.
    """
    needed = num_samples * seq_length
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    eos = tokenizer.eos_token_id if bos is None else None
    tokens: list[int] = []
    for document in _shuffled(_whole_documents(text.documents, seq_length * CHARACTERS_PER_TOKEN), seed):
        ids = list(_encode(tokenizer, document)["input_ids"])
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        tokens += ids
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed], dtype=torch.int64).view(num_samples, seq_length)
    raise BadInputError(
        f"num_calibration_samples: {text.name} holds {len(tokens):,} tokens and {num_samples} windows of {seq_length} "
        f"need {needed:,}; lower num_calibration_samples or seq_length, or give more text."
    )


def stored_windows(path: str) -> torch.Tensor:
    """Windows that were cut before: `input_ids` of a safetensors file, int64 [samples, tokens].

    Raises BadInputError where the file is missing or holds none.
    """
    try:
        windows = load_file(path).get("input_ids")
    except (OSError, SafetensorError) as error:
        raise BadInputError(f"dataset_name: {path} cannot be read ({error}); give a safetensors file.") from None
    if windows is None or windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise BadInputError(f"dataset_name: {path} holds no input_ids of int64 [samples, tokens]; write some there.")
    return windows


def stored_shape(path: str) -> tuple[int, int]:
    """(samples, tokens) of windows that were cut before, without reading them."""
    try:
        with safe_open(path, framework="pt") as tensors:
            samples, tokens = tensors.get_slice("input_ids").get_shape()
    except (OSError, SafetensorError, ValueError):
        # Says what is wrong with the file.
        samples, tokens = stored_windows(path).shape
    return samples, tokens


def evaluation_windows(
    text: TextData,
    tokenizer: "PreTrainedTokenizerBase",
    seq_length: int,
    max_windows: int | None = None,
    add_bos: bool | None = None,
) -> EvaluationWindows:
    """The windows of the usual perplexity protocol: rows joined with a blank line, tokenised once, cut in order.

    Windows do not overlap and the tail that fills none is dropped. With `add_bos` the beginning-of-sequence token takes
    the place of each window's first token, which is never predicted: the same tokens count with it and without it. None
    follows the tokenizer: models trained with that token need it (Gemma 3 270M, 512 x 16 windows of WikiText-2:
    perplexity 28.4 with it, 76.5 without). With `max_windows` only as much text is read as these windows take,
    tokenised with a margin behind it.

    `num_bytes` comes from the tokenizer's offsets: a character that several tokens share counts with the first of them.
    A tokenizer without offsets has its tokens decoded instead.

    Raises BadInputError when not even one window is full, or add_bos asks for a token that the tokenizer lacks.
    """
    if seq_length < 2:
        raise BadInputError(f"eval_seq_length: {seq_length} leaves no token to predict; give at least 2.")
    if add_bos and tokenizer.bos_token_id is None:
        raise BadInputError("eval_add_bos: the tokenizer has no beginning-of-sequence token; leave eval_add_bos out.")
    bos = adds_bos(tokenizer) if add_bos is None else add_bos
    joined, encoded = _read(text.documents, tokenizer, None if max_windows is None else max_windows * seq_length)

    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    windows = len(ids) // seq_length
    if windows == 0:
        raise BadInputError(
            f"eval_seq_length: {text.name} holds {len(ids):,} tokens and one window needs {seq_length:,}; lower "
            "eval_seq_length or give more text."
        )
    if max_windows is not None:
        if max_windows > windows:
            logger.warning("%s fills %d windows of %d tokens, not %d", text.name, windows, seq_length, max_windows)
        windows = min(windows, max_windows)
    cut = ids[: windows * seq_length].reshape(windows, seq_length)
    if "offset_mapping" in encoded:
        num_bytes = _covered_bytes(joined, encoded["offset_mapping"], windows, seq_length)
    else:
        num_bytes = np.array([_decoded_bytes(tokenizer, row[1:]) for row in cut], dtype=np.int64)
    if bos:
        cut[:, 0] = tokenizer.bos_token_id
    return EvaluationWindows(torch.tensor(cut), torch.tensor(num_bytes), bos, len(ids))


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, offsets: bool = False) -> Any:
    # verbose=False: the tokenizer would warn that a whole text is longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=offsets)


def _whole_documents(rows: Iterable[str], characters: int) -> Iterator[str]:
    """Documents of calibration: blank rows left out, lines of one text put together again.

    A row that is one line with its newline is a line of something longer (text files, the Hub's wikitext): it is joined
    to the rows after it, blank ones too, up to the first blank row after `characters`, or twice as many without one.
    Any other row is a document.
    """
    lines: list[str] = []
    length = 0
    for row in rows:
        blank = not row.strip()
        is_line = blank or row.find("\n") == len(row) - 1
        if lines and (not is_line or length >= (characters if blank else 2 * characters)):
            yield "".join(lines)
            lines, length = [], 0
        if is_line and (lines or not blank):
            lines.append(row or "\n")
            length += len(row)
        elif not blank:
            yield row
    if lines:
        yield "".join(lines)


def _shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    stream = iter(documents)
    while chunk := list(itertools.islice(stream, SHUFFLE_BUFFER)):
        generator.shuffle(chunk)
        yield from chunk


def _read(rows: Iterable[str], tokenizer: "PreTrainedTokenizerBase", needed: int | None) -> tuple[str, Any]:
    """The rows joined and tokenised: all of them, or, where `needed` tokens suffice, enough with a wide margin."""
    stream = iter(rows)
    taken: list[str] = []
    characters = None if needed is None else 2 * CHARACTERS_PER_TOKEN * (needed + 1)
    while True:
        exhausted = _take(stream, taken, characters)
        joined = "\n\n".join(taken)
        encoded = _encode(tokenizer, joined, offsets=tokenizer.is_fast)
        # Half as much again, so that no window ends near the cut, where a token might have been merged further.
        if exhausted or needed is None or characters is None or len(encoded["input_ids"]) >= 1.5 * needed:
            return joined, encoded
        characters *= 2


def _take(stream: Iterator[str], taken: list[str], characters: int | None) -> bool:
    """Append rows until `taken` holds so many characters; True when the stream ended first."""
    length = sum(map(len, taken))
    for row in stream:
        taken.append(row)
        length += len(row)
        if characters is not None and length >= characters:
            return False
    return True


def _covered_bytes(text: str, offsets: list[tuple[int, int]], windows: int, seq_length: int) -> np.ndarray:
    """UTF-8 bytes from the end of the token before the first predicted one to the end of the last, int64 [windows].

    Ends, not spans: byte-level tokenizers leave the space before a word out of its span.
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    byte_at = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    # ends[i]: bytes of the text up to token i.
    ends = np.concatenate([[0], byte_at[[end for _, end in offsets]]])
    starts = np.arange(windows) * seq_length
    return ends[starts + seq_length] - ends[starts + 1]


def _decoded_bytes(tokenizer: "PreTrainedTokenizerBase", ids: np.ndarray) -> int:
    return len(str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)).encode("utf-8"))
