"""The interleaved measurement, on saved models in real processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation.efficiency import file_bytes, measure_efficiency, summarize
from hf_prune.evaluation.memory import PeakMemory, anonymous_bytes

TinyModel = Callable[..., PreTrainedModel]
KEYS = {
    "parameters", "nonzero_parameters", "file_bytes", "load_seconds", "peak_memory_bytes", "flops_per_token",
    "nonzero_flops_per_token", "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds",
    "decode_latency_p50_seconds", "decode_latency_p95_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 4 MB in two shards, and the same with the MLPs' down projections zeroed."""
    root = tmp_path_factory.mktemp("models")
    model = tiny("llama", hidden_size=128, intermediate_size=512)
    model.save_pretrained(root / "dense", max_shard_size="1MB")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(root / "pruned", max_shard_size="1MB")
    return {"dense": root / "dense", "pruned": root / "pruned"}


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path]) -> dict:
    return measure_efficiency(folders, dtype="bfloat16", device="cpu", prompt_length=100, new_tokens=8, repeats=2)


def test_describes_the_run(measured: dict) -> None:
    described = {key: measured[key] for key in measured if key not in ("dense", "pruned")}
    threads = torch.get_num_threads()
    assert described == {
        "device": "cpu, 1 thread" if threads == 1 else f"cpu, {threads} threads",
        "dtype": "bfloat16",
        "prompt_length": 64 - 8,  # the context holds 64 tokens
        "new_tokens": 8,
        "repeats": 2,
    }


def test_counts_are_exact(measured: dict, folders: dict[str, Path]) -> None:
    dense, pruned = measured["dense"], measured["pruned"]
    assert set(dense) == set(pruned) == KEYS
    zeros = 2 * 128 * 512
    assert pruned["parameters"] == dense["parameters"] == dense["nonzero_parameters"]
    assert pruned["nonzero_parameters"] == dense["nonzero_parameters"] - zeros
    assert pruned["flops_per_token"] == dense["flops_per_token"] == dense["nonzero_flops_per_token"]
    assert pruned["nonzero_flops_per_token"] == dense["nonzero_flops_per_token"] - 2 * zeros
    shards = list(folders["dense"].glob("*.safetensors"))
    assert len(shards) > 1
    assert dense["file_bytes"] == sum(len(shard.read_bytes()) for shard in shards)


def test_times_hang_together(measured: dict) -> None:
    for model in (measured["dense"], measured["pruned"]):
        assert 0 < model["decode_latency_p50_seconds"] <= model["decode_latency_p95_seconds"]
        assert model["prefill_tokens_per_second"] * model["time_to_first_token_seconds"] == pytest.approx(56)
        assert model["load_seconds"] > 0
        assert 1 / model["decode_tokens_per_second"] <= model["decode_latency_p95_seconds"] * 8


def test_peak_memory_is_that_of_a_process_with_torch(measured: dict) -> None:
    """Anonymous memory holds at least the parameters (bfloat16), and no mapped library."""
    if anonymous_bytes() is None:
        pytest.skip("this system does not tell anonymous memory apart")
    assert measured["dense"]["parameters"] * 2 < measured["dense"]["peak_memory_bytes"] < 2**30


def test_medians_and_percentiles() -> None:
    turns = [[4.0, 1.0, 1.0], [2.0, 1.0, 3.0], [9.0, 2.0, 2.0]]
    answer = {
        "count": [{"parameters": 5}],
        "load": [{"seconds": 3.0}, {"seconds": 1.0}, {"seconds": 2.0}],
        "warm_up": [{"peak_memory_bytes": 7, "dtype": "float32"}],
        "generate": [{"token_seconds": turn} for turn in turns],
    }
    assert summarize(answer, prompt_length=8, size=11) == {
        "parameters": 5,
        "file_bytes": 11,
        "load_seconds": 2.0,
        "peak_memory_bytes": 7,
        "prefill_tokens_per_second": 2.0,
        "time_to_first_token_seconds": 4.0,
        "decode_tokens_per_second": 0.5,  # median of 1, 1/2, 1/2
        "decode_latency_p50_seconds": 1.5,  # of 1 1 1 2 2 3
        "decode_latency_p95_seconds": pytest.approx(2.75),
    }


def test_peak_memory_sees_what_is_gone_again() -> None:
    before = anonymous_bytes()
    if before is None:
        pytest.skip("this system does not tell anonymous memory apart")
    size = 200 * 2**20
    with PeakMemory() as peak:
        block = torch.ones(size, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)
        del block
    assert peak.bytes is not None
    assert size * 0.95 < peak.bytes - before < size * 1.2


def test_file_bytes_of_a_folder_without_safetensors_is_none(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"1234")
    assert file_bytes(tmp_path) is None


@pytest.mark.parametrize("impossible", [{"new_tokens": 1}, {"repeats": 0}, {"new_tokens": 64}])
def test_refuses_impossible_lengths(folders: dict[str, Path], impossible: dict[str, int]) -> None:
    with pytest.raises(BadInputError, match="new_tokens"):
        measure_efficiency(folders, **impossible)


def test_a_model_that_cannot_be_loaded_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights that do not fit the config are found out in the worker, whose error comes back as ours."""
    broken = tmp_path / "broken"
    shutil.copytree(folders["dense"], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(RunError, match="of the pruned model failed at 'warm_up'") as caught:
        measure_efficiency({"pruned": broken}, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_found_before_anything_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["dense"], broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(BadInputError, match=shard.name):
        measure_efficiency({"pruned": broken}, device="cpu")
