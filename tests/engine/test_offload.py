"""A model that is never whole in memory ends with the bits of one that is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, MIXTURES, MORE_FAMILIES, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.offloaded import open_model
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.work import WorkFolder
from hf_prune.compose import make_config
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.pruning import PruneResult, plan_pruning, prune

CPU = torch.device("cpu")
EVERY = [*FAMILIES, *MORE_FAMILIES, *MIXTURES]
BLOCK = {"method": "wanda", "reconstruct": "block", "reconstruct_passes": 1}
CASES = {
    "magnitude": {"method": "magnitude", "pattern": "2:4"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5, "propagate": False},
    "balanced": {"method": "balanced", "sparsity": 0.6},
    "trained blocks": {**BLOCK, "sparsity": 0.5, "reconstruct_target": "model"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, in bfloat16 for some."""
    folder = tmp_path_factory.mktemp("dense")

    def saved(family: str) -> Path:
        if not (folder / family).exists():
            dtype = torch.bfloat16 if family in ("gemma3", "qwen3", "mixtral") else torch.float32
            tiny_model(family, dtype).save_pretrained(folder / family)
        return folder / family

    return saved


def opened(folder: Path, work: WorkFolder | None = None, dtype: str = "auto") -> PreTrainedModel:
    return open_model(str(folder), ModelArguments(dtype=dtype, offload="disk"), CPU, work=work)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files; those of one file are there once."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        own = load_file(file)
        assert not found.keys() & own.keys()
        found |= own
    return found


def same(first: Path, second: Path) -> bool:
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def pruned(model: PreTrainedModel, folder: Path, options: dict) -> PruneResult:
    config, input_ids = make_config(options), tiny_ids(24, 32)
    plan = plan_pruning(model, config, input_ids=input_ids)
    result = prune(model, config, input_ids=input_ids, plan=plan)
    save_model(model, None, folder)
    return result


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", EVERY)
def test_what_is_pruned_from_files_is_what_is_pruned_in_memory(
    family: str, case: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(dense(family), dtype="auto")
    expected = pruned(whole, tmp_path / "whole", CASES[case])
    windows = tiny_ids(5, 24, seed=3)
    with WorkFolder.opened(tmp_path / "work") as work:
        work.claim({})
        model = opened(dense(family), work)
        dense_nll = window_nll(model, windows)
        result = pruned(model, tmp_path / "parts", CASES[case])
        pruned_nll = window_nll(model, windows)
    assert result.views == expected.views and result.plan == expected.plan
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert sorted(name for name in (tmp_path / "parts").iterdir() if name.suffix == ".safetensors")[0].name.endswith(
        "-of-00004.safetensors"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype="auto")
    assert torch.equal(pruned_nll, window_nll(loaded, windows))
    assert torch.equal(dense_nll, window_nll(AutoModelForCausalLM.from_pretrained(dense(family), dtype="auto"), windows))
