"""Text from files, folders and the standard library, and one sentence for each way a source can be unusable."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from hf_prune.data.text import adds_bos, load_text
from hf_prune.errors import BadInputError

ROWS = [{"id": 1, "text": "one"}, {"id": 2, "text": "two\nlines"}, {"id": 3, "text": "drei Öfen"}]
TEXTS = ["one", "two\nlines", "drei Öfen"]
CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"messages": [{"role": "user", "content": "bye"}]},
]


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_gzip(path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write(jsonl(ROWS))


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text(jsonl(ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "rows.json.gz": write_gzip,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "rows.csv": lambda path: path.write_text('id,text\n1,one\n2,"two\nlines"\n3,drei Öfen\n', encoding="utf-8"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_text_column(tmp_path: Path, name: str) -> None:
    # A folder whose name would be a pattern to glob.
    folder = tmp_path / "my [1] data*"
    folder.mkdir()
    WRITERS[name](folder / name)
    text = load_text(str(folder / name))
    assert list(text.documents) == TEXTS
    assert list(text.documents) == TEXTS, "documents can be read again"
    assert (text.name, text.config, text.split, text.revision, text.private) == (name, None, "train", None, True)
    assert list(load_text(str(folder / name), max_documents=2).documents) == TEXTS[:2]


def test_the_rows_of_a_text_file_are_those_of_wikitext_on_the_hub(tmp_path: Path) -> None:
    content = " \n = Title = \n \n First paragraph . \n Second , with \u2028 inside . \n\nend"
    (tmp_path / "wiki.raw").write_text(content, encoding="utf-8")
    # The Hub's rows are the lines, and "" for a line of white space.
    expected = ["", " = Title = \n", "", " First paragraph . \n", " Second , with \u2028 inside . \n", "", "end"]
    assert list(load_text(str(tmp_path / "wiki.raw")).documents) == expected


def test_a_folder_is_read_by_split_and_named_without_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "secret place" / "corpus"
    (folder / "test").mkdir(parents=True)
    for path, word in (("train-00000.jsonl", "a"), ("train-00001.jsonl", "b"), ("test/x.jsonl", "c")):
        (folder / path).write_text(jsonl([{"text": word}]))
    (folder / "README.md").write_text("not data")
    (folder / "dataset_info.json").write_text("{}")
    train = load_text(str(folder))
    assert (list(train.documents), train.split, train.name, train.private) == (["a", "b"], "train", "corpus", True)
    held_out = load_text(str(folder), evaluation=True)
    assert (list(held_out.documents), held_out.split) == (["c"], "test")
    with pytest.raises(BadInputError, match=r"^dataset_split: corpus has no split 'dev'; choose one of test, train\.$"):
        load_text(str(folder), split="dev")


def test_a_folder_without_splits_is_one_text(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert list(load_text(str(tmp_path)).documents) == ["a.txt", "b.txt"]


def test_the_column_is_the_one_named_or_the_only_one_of_strings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl([{"n": 1, "body": "x", "tags": ["t"]}, {"n": 2, "body": None, "tags": []}]))
    assert list(load_text(str(path)).documents) == ["x", ""]
    path.write_text(jsonl([{"title": "t", "body": "x"}]))
    assert list(load_text(str(path), text_column="title").documents) == ["t"]


def test_chat_is_rendered_and_brings_no_second_special_token(
    tmp_path: Path, plain: PreTrainedTokenizerFast, with_bos: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(jsonl(CHAT))
    rendered = ["<|user|>hi</s>\n<|assistant|>hello</s>", "<|user|>bye</s>"]
    assert not adds_bos(plain) and adds_bos(with_bos)
    assert list(load_text(str(path), tokenizer=plain).documents) == rendered
    # Its template begins with <s>; the tokenizer, or the window, puts it there.
    assert with_bos.apply_chat_template(CHAT[1]["messages"], tokenize=False) == f"<s>{rendered[1]}\n"
    assert list(load_text(str(path), tokenizer=with_bos).documents) == rendered


BAD_FILES = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n', r"line 2 of broken\.jsonl is not valid JSON"),
    "broken.json": (b'[{"text": "a"},\n{"text": "b"},\n', r"line 3 of broken\.json is not valid JSON"),
    "binary.jsonl": (bytes(range(256)), r"line 1 of binary\.jsonl is not valid JSON"),
    "empty.jsonl": (b"", r"empty\.jsonl is empty"),
    "blank.jsonl": (b"\n\n", r"blank\.jsonl holds no documents"),
    "rows.parquet": (b"PAR1 and then nothing", r"rows\.parquet cannot be read \("),
    "latin.txt": ("Öfen".encode("latin-1"), r"latin\.txt cannot be read \('utf-8' codec"),
    "paper.pdf": (b"%PDF", r"paper\.pdf is no file of text that can be read"),
    "numbers.jsonl": (b'{"text": 1}\n', r"'text' of numbers\.jsonl holds int, not text"),
    "two.jsonl": (b'{"a": "x", "b": "y"}\n', r"two\.jsonl has no column 'text'; .* one of a, b\."),
    "chat.jsonl": (jsonl(CHAT).encode(), r"'messages' of chat\.jsonl holds conversations .* no chat template"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    for evaluation, keys in ((False, "(dataset_name|text_column)"), (True, "(eval_dataset_name|eval_text_column)")):
        with pytest.raises(BadInputError, match=f"^{keys}: .*{message}") as caught:
            list(load_text(str(tmp_path / name), evaluation=evaluation).documents)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_json_that_breaks_behind_the_first_megabytes_is_found_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(jsonl([{"text": "x" * 1000}]) * 12_000 + '{"text": \n')
    documents = iter(load_text(str(path)).documents)
    assert next(documents) == "x" * 1000
    with pytest.raises(BadInputError, match=r"line 12001 of long\.jsonl"):
        list(documents)


def test_other_bad_input_is_one_sentence(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "bad_chat.jsonl").write_text(jsonl([{"messages": [{"who": "me"}]}]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / "mixed" / name).write_text("{}")
    strict = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    for arguments, message in (
        ({"name": "rows.jsonl", "split": "test"}, r"dataset_split: rows\.jsonl has no split 'test'; .* train\."),
        ({"name": "rows.jsonl", "text_column": "body"}, r"text_column: .* no column 'body'; choose one of id, text\."),
        ({"name": "bad_chat.jsonl", "tokenizer": strict}, r"text_column: the chat template .*\(roles must alternate\)"),
        ({"name": "absent.jsonl"}, r"dataset_name: there is no file or folder '.*absent\.jsonl'"),
        ({"name": "empty"}, r"dataset_name: .*empty is no file of text that can be read, nor holds one"),
        ({"name": "mixed"}, r"dataset_name: .*mixed mixes json and text files"),
    ):
        arguments["name"] = str(tmp_path / str(arguments["name"]))
        with pytest.raises(BadInputError, match=f"^{message}"):
            list(load_text(**arguments).documents)
    with pytest.raises(BadInputError, match=r"^dataset_name: there is no built-in text 'builtin:java-docs'"):
        load_text("builtin:java-docs")
    with pytest.raises(
        BadInputError, match=r"^eval_split: builtin:python-docs has no split 'dev'; choose one of train"
    ):
        load_text("builtin:python-docs", split="dev", evaluation=True)


def test_a_hub_id_offline_and_not_in_the_cache_says_so() -> None:
    with pytest.raises(BadInputError, match=r"^dataset_name: me/absent is not in the local cache .*HF_HUB_OFFLINE"):
        load_text("me/absent")


def test_python_docs_are_public_and_held_out_for_evaluation() -> None:
    calibration, evaluation = load_text("builtin:python-docs"), load_text("builtin:python-docs", evaluation=True)
    assert (calibration.name, calibration.split, calibration.private) == ("builtin:python-docs", "train", False)
    assert evaluation.split == "test"
    assert not set(calibration.documents) & set(evaluation.documents)
