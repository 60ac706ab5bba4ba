"""The loopback Hub answers the calls of huggingface_hub that the other tests do not reach, and feeds `datasets`."""

import json
from collections.abc import Callable

import pytest
from datasets import Dataset
from server import Hub
from visits import TOKEN, Visit

DOCUMENTS = ["Once upon a time there was a model.", "It had too many weights.", "Ünïcode: 模型 ✂"]


def test_calls_on_a_scratch_repository(visit: Callable[..., Visit], hub: Hub) -> None:
    assert visit("manage", HF_TOKEN=TOKEN).returned == {
        "user": "me",
        "tree": ["a", "two.bin"],
        "deep tree": ["a", "a/b", "a/b/one.txt"],
        "paths": ["a/b", "a/b/one.txt"],
        "commits": ["one again", "two files", "initial commit"],
        "head": True,
        "range": "3456",
        "no revision": 404,
        "stale parent": 412,
        "private": True,
        "exists": False,
    }
    assert ("models", "me/scratch") not in hub.repos


@pytest.fixture(scope="module")
def texts_read(visit: Callable[..., Visit], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("datasets")
    for name in ("text", "parquet-text", "lines"):
        (folder / name).mkdir()
    rows = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)
    (folder / "text" / "train.jsonl").write_text(rows)
    (folder / "text" / "test.jsonl").write_text(json.dumps({"text": "held out"}))
    Dataset.from_dict({"text": DOCUMENTS}).to_parquet(folder / "parquet-text" / "train-00000-of-00001.parquet")
    (folder / "lines" / "train.txt").write_text("\n".join(DOCUMENTS))
    visit("publish_text", folder, HF_TOKEN=TOKEN)
    return visit("read_text", "text", "parquet-text", "lines").returned


@pytest.mark.parametrize("name", ["text", "parquet-text", "lines"])
def test_a_pushed_dataset_feeds_load_dataset_and_load_text(texts_read: dict[str, dict], name: str) -> None:
    assert texts_read[name] == {"rows": DOCUMENTS, "documents": DOCUMENTS}
