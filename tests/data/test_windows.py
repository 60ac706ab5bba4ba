"""Token windows, against packing and cutting by brute force."""

import itertools
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer, Gemma3Config, GPT2Config, LlamaConfig, PreTrainedTokenizer
from transformers import PreTrainedTokenizerFast as Fast

from hf_prune.data.text import TextData, load_text
from hf_prune.data.windows import calibration_windows, evaluation_windows, sequence_length, stored_shape
from hf_prune.errors import BadInputError

FIXTURES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.lists(st.sampled_from(["the", "quick", "brown", "fox", "over", "a", "lazy", "dog"]), min_size=1, max_size=12)
# No newline: a row that is one line with its newline is a line of a longer document.
DOCUMENTS = st.lists(WORDS.map(" ".join), min_size=1, max_size=12)
ANY_TEXT = st.lists(st.text(max_size=20), min_size=1, max_size=8)


def text_of(documents: list[str]) -> TextData:
    return TextData(documents=documents, name="text")


def encode(tokenizer: Fast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@FIXTURES
@given(documents=DOCUMENTS, seed=st.integers(0, 5), length=st.integers(2, 9))
def test_calibration_packs_shuffled_documents_without_gaps(
    plain: Fast, with_bos: Fast, documents: list[str], seed: int, length: int
) -> None:
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    for tokenizer, pack in (
        (plain, lambda ids: [*ids, plain.eos_token_id]),
        (with_bos, lambda ids: [with_bos.bos_token_id, *ids]),
    ):
        expected = [token for document in shuffled for token in pack(encode(tokenizer, document))]
        count = len(expected) // length
        if count:
            windows = calibration_windows(text_of(documents), tokenizer, count, length, seed)
            assert windows.dtype == torch.int64 and windows.shape == (count, length)
            assert windows.flatten().tolist() == expected[: count * length]
        with pytest.raises(BadInputError) as caught:
            calibration_windows(text_of(documents), tokenizer, count + 1, length, seed)
        assert f"holds {len(expected):,} tokens" in str(caught.value)
        assert f"need {(count + 1) * length:,};" in str(caught.value)


def test_the_seed_decides_which_documents_come_first(plain: Fast) -> None:
    text = text_of([f"document {number}" for number in range(100)])
    first, again, other = (calibration_windows(text, plain, 4, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_stream_without_end_and_without_one_long_document_is_left_early(plain: Fast) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield f"short {number}"

    windows = calibration_windows(TextData(documents=endless(), name="stream"), plain, 2, 512, seed=0)
    assert windows.shape == (2, 512) and read <= 10_000


def test_no_special_token_is_doubled_around_rendered_chat(tmp_path: Path, plain: Fast, with_bos: Fast) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "quick fox"}]}\n' * 20)
    for tokenizer in (plain, with_bos):
        tokens = calibration_windows(load_text(str(path), tokenizer=tokenizer), tokenizer, 2, 30, seed=0).flatten()
        text = tokenizer.decode(tokens)
        start = "<s>" if tokenizer is with_bos else ""
        assert text.startswith(f"{start}<|user|>quick fox</s>" * 3)


def test_lines_of_a_text_file_stay_together(plain: Fast) -> None:
    lines = ["Title\n", "", "first line\n", "second line\n", "\n", "another story\n"]
    tokens = calibration_windows(text_of(lines), plain, 1, 30, seed=0).flatten()
    assert plain.decode(tokens).startswith("Title\n\nfirst line\nsecond line\n\na"), (
        "one stretch of text, no end of sequence"
    )
    long = ["word " * 8 + "\n", ""] * 4
    tokens = calibration_windows(text_of(long), plain, 5, 8, seed=0).flatten()
    assert plain.decode(tokens).startswith("word " * 8 + "\n</s>word"), "a window's worth of text ends at a blank line"


@FIXTURES
@given(documents=ANY_TEXT, length=st.integers(2, 8), limit=st.none() | st.integers(1, 4))
def test_evaluation_cuts_the_joined_text_in_order(
    plain: Fast, with_bos: Fast, documents: list[str], length: int, limit: int | None
) -> None:
    joined = "\n\n".join(documents)
    for tokenizer in (plain, with_bos):
        ids = encode(tokenizer, joined)
        ends = [end for _, end in tokenizer.backend_tokenizer.encode(joined, add_special_tokens=False).offsets]
        for add_bos in (None, False, True):
            bos = tokenizer is with_bos if add_bos is None else add_bos
            starts = list(range(0, len(ids) - length + 1, length))[:limit]
            if not starts:
                with pytest.raises(BadInputError, match=rf"holds {len(ids)} tokens and one window needs {length};"):
                    evaluation_windows(text_of(documents), tokenizer, length, limit, add_bos)
                continue
            windows = evaluation_windows(text_of(documents), tokenizer, length, limit, add_bos)
            firsts = [tokenizer.bos_token_id if bos else ids[start] for start in starts]
            assert windows.input_ids[:, 0].tolist() == firsts
            assert windows.input_ids[:, 1:].tolist() == [ids[start + 1 : start + length] for start in starts]
            assert windows.add_bos is bos
            predicted = [joined[ends[start] : ends[start + length - 1]] for start in starts]
            expected = [len(text.encode("utf-8")) for text in predicted]
            assert windows.num_bytes.tolist() == expected


@FIXTURES
@given(documents=DOCUMENTS)
def test_num_bytes_are_those_of_the_decoded_predicted_tokens(plain: Fast, with_bos: Fast, documents: list[str]) -> None:
    documents = [*documents, "the quick brown fox"]
    for tokenizer in (plain, with_bos):
        windows = evaluation_windows(text_of(documents), tokenizer, 4)
        decoded = [len(tokenizer.decode(row[1:])) for row in windows.input_ids]
        assert windows.num_bytes.tolist() == decoded


def test_only_as_much_is_read_as_the_windows_take(plain: Fast) -> None:
    rows = [f"row {number} the quick brown fox" for number in range(3000)]
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        for row in rows:
            read += 1
            yield row

    few = evaluation_windows(TextData(documents=stream(), name="stream"), plain, 16, max_windows=3)
    assert read < 100
    everything = evaluation_windows(text_of(rows), plain, 16)
    assert torch.equal(few.input_ids, everything.input_ids[:3])
    assert torch.equal(few.num_bytes, everything.num_bytes[:3])
    assert everything.total_tokens == len(encode(plain, "\n\n".join(rows)))


def test_text_of_very_long_tokens_is_read_on_until_it_suffices(plain: Fast) -> None:
    tokenizer = Fast(tokenizer_object=plain.backend_tokenizer, eos_token="</s>")
    tokenizer.add_tokens(["-" * 300])
    windows = evaluation_windows(text_of(["-" * 300] * 400), tokenizer, 50, max_windows=8)
    assert windows.input_ids.shape == (8, 50)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, one token a letter: it has no offsets."""

    letters = "abcdefghijklmnopqrstuvwxyz \nöüß€"

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self.letters)}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_tokenizer_without_offsets_has_its_tokens_decoded() -> None:
    tokenizer = Letters()
    assert not tokenizer.is_fast
    joined = "die straße\n\nöl für fünf €\n\nende"
    windows = evaluation_windows(text_of(joined.split("\n\n")), tokenizer, 7)
    expected = [len(joined[start + 1 : start + 7].encode()) for start in range(0, len(joined) - 6, 7)]
    assert windows.num_bytes.tolist() == expected


def test_a_long_text_warns_of_nothing(with_bos: Fast, plain: Fast) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        for tokenizer in (plain, with_bos):
            tokenizer.model_max_length = 8
            evaluation_windows(text_of(["the quick brown fox " * 50]), tokenizer, 8)
            calibration_windows(text_of(["the quick brown fox " * 50]), tokenizer, 4, 8, seed=0)
        assert records == []
        plain("the quick brown fox " * 50)
        assert len(records) == 1, "the warning that is kept away"
    finally:
        logger.removeHandler(handler)


def test_default_length_is_the_context_up_to_2048() -> None:
    assert sequence_length(LlamaConfig(max_position_embeddings=131_072)) == 2048
    assert sequence_length(LlamaConfig(max_position_embeddings=512)) == 512
    assert sequence_length(GPT2Config(n_positions=1024)) == 1024
    assert sequence_length(Gemma3Config(text_config={"max_position_embeddings": 600})) == 600


def test_no_window_is_longer_than_learned_positions() -> None:
    assert sequence_length(GPT2Config(n_positions=64), 64) == 64
    with pytest.raises(BadInputError, match=r"^eval_seq_length: 65 is more than the 64 positions"):
        sequence_length(GPT2Config(n_positions=64), 65, "eval_seq_length")
    # Rotary ones can be computed for any position, as well as the model may like it.
    assert sequence_length(LlamaConfig(max_position_embeddings=64), 65) == 65


def test_bad_lengths_and_a_missing_bos_are_one_sentence(plain: Fast) -> None:
    with pytest.raises(BadInputError, match=r"^eval_seq_length: 1 leaves no token to predict"):
        evaluation_windows(text_of(["text"]), plain, 1)
    without = Fast(tokenizer_object=plain.backend_tokenizer)
    with pytest.raises(BadInputError, match=r"^eval_add_bos: the tokenizer has no beginning-of-sequence token"):
        evaluation_windows(text_of(["some text"]), without, 4, add_bos=True)
    # Neither token to separate documents with: they are packed as they are.
    ids = encode(plain, "one") * 4
    assert calibration_windows(text_of(["one"] * 4), without, 1, len(ids), seed=0).tolist() == [ids]


def test_a_real_sentencepiece_vocabulary(shared_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_folder / "models" / "stories260K")
    story = (shared_folder / "data" / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    windows = evaluation_windows(text_of([story]), tokenizer, 64, add_bos=True)
    assert (windows.input_ids[:, 0] == tokenizer.bos_token_id).all()
    ids = torch.tensor(encode(tokenizer, story))[: windows.input_ids.numel()].view(-1, 64)
    assert torch.equal(windows.input_ids[:, 1:], ids[:, 1:])
    for row, num_bytes in zip(ids, windows.num_bytes.tolist(), strict=True):
        difference = len(tokenizer.decode(row[1:]).encode()) - num_bytes
        assert abs(difference) <= 1  # its decoder eats a leading space, or leaves one


def test_the_shape_of_stored_windows(tmp_path: Path) -> None:
    save_file({"input_ids": torch.zeros(5, 7, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    assert stored_shape(str(tmp_path / "ids.safetensors")) == (5, 7)
    save_file({"tokens": torch.zeros(5, 7)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("other", "broken", "absent"):
        with pytest.raises(BadInputError, match="dataset_name"):
            stored_shape(str(tmp_path / f"{name}.safetensors"))
