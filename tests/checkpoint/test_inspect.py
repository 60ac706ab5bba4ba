"""Inspection against brute force, and the early checks on broken files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_prune.checkpoint import inspect as module
from hf_prune.checkpoint.inspect import Tally, check_safetensors, inspect_checkpoint
from hf_prune.errors import BadInputError


def pattern_by_hand(weight: np.ndarray) -> str:
    """The documented rule, group by group."""
    if (weight != 0).all():
        return "dense"
    best = None
    for m in (4, 8, 16):
        if weight.shape[1] % m:
            continue
        fullest = max(
            int(np.count_nonzero(row[start : start + m])) for row in weight for start in range(0, weight.shape[1], m)
        )
        explains = np.count_nonzero(weight) / weight.size >= 0.75 * fullest / m
        if 0 < fullest <= m / 2 and explains and (best is None or fullest / m < best[0]):
            best = (fullest / m, f"{fullest}:{m}")
    return best[1] if best else "unstructured"


def detected(weight: np.ndarray, rows_at_once: int = 10**6) -> str:
    """What the library says of [out, in], fed in chunks of outputs."""
    tally = Tally()
    for start in range(0, len(weight), rows_at_once):
        tally.add(torch.from_numpy(weight[start : start + rows_at_once]) != 0, grouped=True)
    return tally.pattern


def keep_n_of_m(random: np.random.Generator, outputs: int, inputs: int, n: int, m: int) -> np.ndarray:
    """Exactly n nonzero weights in each group of m."""
    places = random.random((outputs, inputs // m, m)).argsort(-1)
    return (places < n).astype(np.float32).reshape(outputs, inputs)


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_any_mask_gets_the_pattern_of_the_rule(outputs, inputs, density, seed, rows_at_once):
    mask = (np.random.default_rng(seed).random((outputs, inputs)) < density).astype(np.float32)
    assert detected(mask, rows_at_once) == pattern_by_hand(mask)


@given(st.sampled_from([(1, 4), (2, 4), (1, 8), (3, 8), (4, 8), (5, 16), (8, 16), (1, 16)]), st.integers(0, 2**32 - 1))
def test_a_planted_pattern_is_found(pattern, seed):
    n, m = pattern
    weight = keep_n_of_m(np.random.default_rng(seed), 64, 96, n, m)
    assert detected(weight) == f"{n}:{m}"
    group, zero = weight[7, :m], weight[7, :m] == 0
    group[zero.argmax()] = 1  # one weight too many in one group
    # A wider pattern may still hold (1:8 with one pair is 2:8, if dense enough), never the old one.
    assert detected(weight) == pattern_by_hand(weight) != f"{n}:{m}"


def test_a_very_sparse_weight_is_no_pattern():
    random = np.random.default_rng(0)
    weight = (random.random((64, 64)) < 0.02).astype(np.float32)
    assert max(np.count_nonzero(weight.reshape(-1, 4), axis=1)) <= 2  # 2:4 holds, by accident
    assert detected(weight) == "unstructured" == detected(np.zeros((4, 8), np.float32))


@pytest.fixture
def sparse_folder(tmp_path, tiny_model):
    """family -> folder of a model with 2:4 in block 0, 1:8 in block 1's MLP and loose zeros elsewhere in block 1."""

    def save(family: str, **options: object) -> tuple[Path, dict[str, np.ndarray]]:
        model = tiny_model(family, torch.bfloat16)
        random = np.random.default_rng(0)
        expected = {}
        for name, layer in model.named_modules():
            transposed = type(layer).__name__ == "Conv1D"
            number = next((int(part) for part in name.split(".") if part.isdigit()), None)
            if number is None or not (transposed or isinstance(layer, torch.nn.Linear)):
                continue
            weight = layer.weight.detach().T if transposed else layer.weight.detach()
            if number == 0:
                mask = keep_n_of_m(random, *weight.shape, 2, 4)
            elif "mlp" in name or "fc" in name:
                mask = keep_n_of_m(random, *weight.shape, 1, 8)
            else:
                mask = (random.random(weight.shape) < 0.7).astype(np.float32)
            weight.mul_(torch.from_numpy(mask))
            expected[name] = weight.float().numpy().copy()
        model.save_pretrained(tmp_path / family, **options)
        return tmp_path / family, expected

    return save


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("chunk", [2**24, 600])
def test_rows_and_summary_equal_brute_force(sparse_folder, family, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)  # 600 weights: every matrix comes in several pieces
    folder, expected = sparse_folder(family)
    rows, summary = inspect_checkpoint(folder)
    inside = {row["name"]: row for row in rows if row["kind"] in ("linear", "conv1d")}
    assert inside.keys() == expected.keys()
    for name, weight in expected.items():
        row = inside[name]
        assert row["shape"] == list(weight.shape)
        assert row["zeros"] == int((weight == 0).sum())
        assert row["density"] == pytest.approx(1 - (weight == 0).mean(), abs=1e-12)
        assert row["pattern"] == pattern_by_hand(weight)
        assert f".{row['block']}." in name
    assert {row["pattern"] for row in inside.values() if row["block"] == 0} == {"2:4"}
    assert {row["pattern"] for row in inside.values() if row["block"] == 1} == {"1:8", "unstructured"}
    outside = {row["kind"] for row in rows if row["block"] is None}
    assert outside == ({"embedding", "head"} if family == "qwen3" else {"embedding"})

    zeros = sum(int((weight == 0).sum()) for weight in expected.values())
    size = sum(weight.size for weight in expected.values())
    stored = load_file(folder / "model.safetensors").values()
    assert (summary["block_parameters"], summary["block_nonzeros"]) == (size, size - zeros)
    assert summary["block_sparsity"] == pytest.approx(zeros / size, abs=1e-12)
    assert summary["total_parameters"] == sum(tensor.numel() for tensor in stored)
    assert summary["total_nonzeros"] == sum(int((tensor != 0).sum()) for tensor in stored)
    assert summary["patterns"]["2:4"] == sum(row["block"] == 0 for row in inside.values())


def test_shards_give_the_same_as_one_file(sparse_folder):
    folder, _ = sparse_folder("llama")
    whole = inspect_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    folder, _ = sparse_folder("llama", max_shard_size="10KB")
    assert len(check_safetensors(folder)) > 2
    rows, summary = inspect_checkpoint(folder)
    assert sorted(rows, key=lambda row: row["name"]) == sorted(whole.rows, key=lambda row: row["name"])
    assert summary == whole.summary


def test_names_without_the_models_prefix_and_stored_masks(sparse_folder):
    """GPT-2 on the Hub: no `transformer.`, and each block's causal mask is stored, half of it zeros."""
    folder, expected = sparse_folder("gpt2")
    _, before = inspect_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64).tril() for block in range(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rows, summary = inspect_checkpoint(folder)
    assert summary == before
    patterns = {row["name"]: row["pattern"] for row in rows if row["kind"] == "conv1d"}
    assert patterns == {name.removeprefix("transformer."): pattern_by_hand(w) for name, w in expected.items()}


def test_a_checkpoint_of_an_unknown_architecture(tmp_path):
    """Only the tensors' names are left: experts, a fused 3-D weight, integers, several files without an index."""
    random = np.random.default_rng(0)
    weight = torch.from_numpy(keep_n_of_m(random, 8, 16, 4, 8))
    save_file(
        {
            "tok_embeddings.weight": torch.ones(10, 16),
            "layers.1.moe.experts.7.w1.weight": weight.clone(),
            "layers.1.moe.fused": weight.reshape(2, 4, 16).clone(),
            "layers.1.norm.weight": torch.ones(16),
            "scale": torch.tensor(2.0),
        },
        tmp_path / "a.safetensors",
    )
    save_file(
        {"layers.0.q.qweight": torch.ones(4, 4, dtype=torch.int32), "output.weight": weight}, tmp_path / "b.safetensors"
    )
    rows, summary = inspect_checkpoint(tmp_path)
    assert [(row["name"], row["block"], row["kind"], row["pattern"]) for row in rows] == [
        ("layers.1.moe.experts.7.w1", 1, "linear", "4:8"),
        ("layers.1.moe.fused", 1, "other", "unstructured"),
        ("tok_embeddings", None, "embedding", "dense"),
        ("output", None, "head", "4:8"),
    ]
    assert (summary["block_parameters"], summary["block_nonzeros"], summary["skipped"]) == (
        128,
        64,
        ["layers.0.q.qweight"],
    )
    assert (summary["total_parameters"], summary["total_nonzeros"]) == (160 + 3 * 128 + 17, 160 + 3 * 64 + 17)


def test_stories260k_is_dense(shared_folder):
    rows, summary = inspect_checkpoint(shared_folder / "models" / "stories260K")
    assert summary["total_parameters"] == 260_032 and summary["patterns"] == {"dense": 35}
    assert [row["block"] for row in rows] == [block for block in range(5) for _ in range(7)] + [None]


def test_broken_checkpoints_are_refused_by_name(sparse_folder, tmp_path):
    folder, _ = sparse_folder("llama", max_shard_size="10KB")
    shards = check_safetensors(folder)
    whole = shards[1].read_bytes()
    index = folder / module.INDEX

    def refused(match: str, checkpoint: Path = folder) -> None:
        for check in (check_safetensors, inspect_checkpoint):
            with pytest.raises(BadInputError, match=match) as caught:
                check(checkpoint)
            assert "\n" not in str(caught.value)

    for content in (whole[:-10], whole + b"x", whole[:5], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        shards[1].write_bytes(content)
        refused(f"{shards[1].name}: truncated or no safetensors")
    shards[1].unlink()
    refused(f"{shards[1].name}: this shard is missing")
    shards[1].write_bytes(whole)
    held = json.loads(index.read_text())
    index.write_text(json.dumps(held | {"weight_map": held["weight_map"] | {"model.extra": shards[0].name}}))
    refused(f"{shards[0].name}: 1 tensors of the index .* model.extra")
    for content in ("{", "{}", '{"weight_map": 3}', "[]"):
        index.write_text(content)
        refused("no index of safetensors")

    (tmp_path / "pickled").mkdir()
    refused("holds no weights", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    refused("only pickled weights .pytorch_model.bin.", tmp_path / "pickled")
    refused("no such folder", tmp_path / "nowhere")


def test_an_unknown_hub_id_is_one_sentence():
    with pytest.raises(BadInputError, match=r"^somebody/nothing: no such folder here, and no such model from the Hub"):
        inspect_checkpoint("somebody/nothing")
