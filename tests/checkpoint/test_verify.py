"""Verification passes on what was saved and fails, in the right row, for each planted fault."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_prune
from hf_prune.checkpoint import verify
from hf_prune.checkpoint import verify_folder as script
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.verify import expectation, verify_folder
from hf_prune.weights import find_blocks, find_views

DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
# Before the suite puts one in its place that shares imports.
FRESH = verify.in_fresh_process


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified as users have it."""
    monkeypatch.setattr(verify, "in_fresh_process", FRESH)


def prune(model: torch.nn.Module) -> list[dict]:
    """2:4 in block 0, half of the weights in block 1; the views as the plan lists them, with what may be kept."""
    views = []
    for view in find_views(model)[:-1]:
        weight, (outputs, inputs) = view.read(), view.shape
        assert view.block < len(find_blocks(model)[1])
        if view.block == 0:
            groups = weight.reshape(outputs, inputs // 4, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0)
        else:
            weight.view(-1)[weight.abs().flatten().argsort()[: weight.numel() // 2]] = 0
        view.write(weight)
        views.append(
            {
                "name": view.name,
                "parameter": view.parameter_name,
                "block": view.block,
                "shape": [outputs, inputs],
                "transposed": view.transposed,
                "outputs": view.outputs and asdict(view.outputs),
                "density": 0.5,
                "pattern": "2:4" if view.block == 0 else "unstructured",
                "floor": False,
                "kept": outputs * inputs // 2,
            }
        )
    return views


@pytest.fixture
def saved(tmp_path: Path, tiny_model: Callable, tiny_tokenizer: object) -> Callable:
    """(family, dtype) -> folder, model in memory and views of a pruned, saved model."""

    def save(family: str, dtype: torch.dtype = torch.float32) -> tuple[Path, torch.nn.Module, list[dict]]:
        model = tiny_model(family, dtype)
        views = prune(model)
        save_model(model, tiny_tokenizer, tmp_path / family)
        return tmp_path / family, model, views

    return save


def failing(rows: list[dict]) -> dict[str, str]:
    """check -> detail of the rows that failed."""
    return {row["check"]: row["detail"] for row in rows if not row["passed"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt", "phi3", "gpt_neox"])
def test_a_correct_folder_passes(saved, tiny_tokenizer, family, dtype):
    folder, model, views = saved(family, dtype)
    rows = script.verify(folder, *expectation(model, views, tiny_tokenizer))
    assert not failing(rows)
    details = {row["check"]: row["detail"] for row in rows}
    kept = sum(int((model.get_parameter(name) != 0).sum()) for name in {view["parameter"] for view in views})
    assert details[script.DENSITY] == f"{len(views)} modules, {kept:,} of {2 * kept:,} weights kept"
    assert details[script.PATTERN] == f"{sum(view['pattern'] == '2:4' for view in views)} modules"
    assert ("tied" in details[script.TIES]) == (family in ("qwen3", "phi3", "gpt_neox"))  # "none are tied"
    assert details[script.DTYPE] == str(dtype).removeprefix("torch.")


def nonzero_too_many(tensors: dict[str, torch.Tensor]) -> None:
    row, column = (tensors[DOWN] == 0).nonzero()[0]
    tensors[DOWN][row, column] = 1e-30  # far too small to move a logit


def broken_group(tensors: dict[str, torch.Tensor]) -> None:
    groups = tensors[UP][5].view(-1, 4)
    zero, kept = (groups[3] == 0).nonzero()[0], (groups[6] != 0).nonzero()[0]
    groups[3, zero], groups[6, kept] = groups[6, kept].clone(), 0.0


def untied_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.001


def changed_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.nextafter(tensors[NORM], torch.tensor(2.0))


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM][3] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN][tensors[DOWN] != 0] = float("-inf")


def removed_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def foreign_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.mask"] = torch.ones(3)


def other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN][:, :-4].contiguous()


LOGITS = script.LOGITS
FAULTS = {
    nonzero_too_many: {script.DENSITY: r"^model.layers.1.mlp.down_proj: 769 nonzero weights, at most 768 allowed$"},
    broken_group: {
        script.PATTERN: r"^model.layers.0.mlp.up_proj: 1 of 384 groups keep more than 2 of 4 inputs, "
        r"the first at output 5, input 12$",
        LOGITS: "differ",
    },
    untied_head: {
        script.TIES: "^model.embed_tokens.weight and lm_head.weight are no longer tied$",
        LOGITS: "differ",
    },
    changed_weight: {LOGITS: "differ, by up to"},
    not_a_number: {script.FINITE_PARAMETERS: NORM, script.FINITE_LOGITS: "of 16640", LOGITS: "nan"},
    infinite: {script.FINITE_PARAMETERS: DOWN, script.FINITE_LOGITS: "of 16640", LOGITS: "nan"},
    removed_tensor: {script.LOADS: f"missing_keys: {NORM}"},
    foreign_tensor: {script.LOADS: "unexpected_keys: model.layers.0.mlp.mask"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_fails_its_row(saved, tiny_tokenizer, fault):
    folder, model, views = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    fault(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    failed = failing(script.verify(folder, *expectation(model, views, tiny_tokenizer)))
    failed = {check: detail for check, detail in failed.items() if fault is not removed_tensor or check == script.LOADS}
    assert failed.keys() == FAULTS[fault].keys()
    for check, pattern in FAULTS[fault].items():
        assert re.search(pattern, failed[check]), failed[check]


def test_shapes_are_held_against_the_config(saved, tiny_tokenizer):
    folder, model, views = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    other_shape(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    failed = failing(script.verify(folder, *expectation(model, views, tiny_tokenizer)))
    assert "mismatched_keys" in failed[script.LOADS]
    assert failed[script.SHAPES] == f"{DOWN}: [32, 48] by the config, [32, 44] in model.safetensors"

    folder, model, views = saved("gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_inner": 64}))
    failed = failing(script.verify(folder, *expectation(model, views)))
    assert "transformer.h.0.mlp.c_fc: [64, 32] by the config, [128, 32] in memory" in failed[script.SHAPES]


def test_dtype_and_tokenizer_are_held_against_memory(saved, tiny_tokenizer):
    folder, model, views = saved("llama", torch.bfloat16)
    expected = expectation(model, views, tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (folder / "chat_template.jinja").unlink()
    failed = failing(script.verify(folder, *expected))
    assert failed == {
        script.TOKENIZER: "another chat template",
        script.DTYPE: "config.json says torch.float32, the model in memory is torch.bfloat16",
    }
    (folder / "tokenizer.json").write_text("{}")
    assert script.TOKENIZER in failing(script.verify(folder, *expected))


def test_more_kept_in_memory_than_allowed_fails(saved):
    folder, model, views = saved("opt")
    views[2]["kept"] -= 1
    failed = failing(script.verify(folder, *expectation(model, views)))
    assert failed.keys() == {script.DENSITY} and failed[script.DENSITY].startswith(views[2]["name"] + ": ")


def test_the_expectation_leaves_the_model_as_it_was(saved):
    _, model, views = saved("opt")
    model.train()
    first = expectation(model, views)
    assert model.training and torch.equal(first[1], expectation(model, views)[1])  # dropout was off
    assert not torch.equal(first[1], expectation(model, views, seed=1)[1])


@pytest.mark.usefixtures("fresh_processes")
def test_a_fresh_process_verifies_and_never_imports_hf_prune(saved, tiny_tokenizer, tmp_path, monkeypatch):
    folder, model, views = saved("llama", torch.bfloat16)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as under a launcher
    rows = verify_folder(folder, model, views, tiny_tokenizer)
    assert not failing(rows) and rows[-1]["check"] == script.STOCK
    assert [row["check"] for row in rows] == [
        script.LOADS, script.DENSITY, script.PATTERN, script.SHAPES, script.TIES, script.DTYPE,
        script.FINITE_PARAMETERS, script.FINITE_LOGITS, script.LOGITS, script.TOKENIZER, script.STOCK,
    ]  # fmt: skip

    # A process into which something does import hf_prune must be caught.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import hf_prune\n")
    package = Path(hf_prune.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(package)]))
    shutil.copy(folder / "model.safetensors", tmp_path / "whole")
    (folder / "model.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    failed = failing(verify_folder(folder, model, views, tiny_tokenizer))
    assert failed.keys() == {script.LOADS, script.STOCK}
    assert "hf_prune" in failed[script.STOCK] and "SafetensorError" in failed[script.LOADS]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("last_words", "detail"),
    [
        ("raise RuntimeError('out of memory')", "died (exit code 1): RuntimeError: out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "died (signal 9): no message"),
    ],
)
def test_a_child_that_dies_is_a_failed_row(saved, tmp_path, request, monkeypatch, last_words, detail, fresh):
    if fresh:
        request.getfixturevalue("fresh_processes")
    folder, model, views = saved("opt")
    (tmp_path / "dying.py").write_text(last_words)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "dying.py"))
    (row,) = verify_folder(folder, model, views)
    assert not row["passed"] and row["detail"].endswith(detail)


def test_the_suite_is_told_what_a_fresh_process_says(saved, tiny_tokenizer, request):
    folder, model, views = saved("llama")
    weights = load_file(folder / "model.safetensors")
    weights[UP][0, :8] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    forked = verify_folder(folder, model, views, tiny_tokenizer)
    request.getfixturevalue("fresh_processes")
    assert verify_folder(folder, model, views, tiny_tokenizer) == forked
    assert failing(forked).keys() == {script.DENSITY, script.PATTERN, script.LOGITS}
