"""A model that is never whole in memory ends with the bits of one that is."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, MIXTURES, MORE_FAMILIES, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.load import load_model
from hf_prune.checkpoint.offloaded import open_model
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.work import WorkFolder
from hf_prune.compose import make_config
from hf_prune.engine import gradients
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.gradients import fisher_factors
from hf_prune.engine.offload import HostMemory, Offload, at_work, keep, offload_of
from hf_prune.engine.stream import Stream
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.preparation import check_offload
from hf_prune.pruning import PruneResult, plan_pruning, prune
from hf_prune.weights import find_views

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

# What is slow, on families that differ in how weights are kept: plain, sliding layers, transposed, fused, mixtures.
SLOW = ("balanced", "trained blocks")
KINDS = ("llama", "gemma3", "gpt2", "phi3", *MIXTURES)


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


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in EVERY for case in CASES if case not in SLOW or family in KINDS],
)
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
    assert len(list((tmp_path / "parts").glob("model-*-of-00004.safetensors"))) == 4
    for before, folder in ((dense_nll, dense(family)), (pruned_nll, tmp_path / "parts")):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert torch.equal(before, window_nll(loaded, windows))


@pytest.mark.parametrize(
    ("family", "options", "dtype"),
    [
        ("qwen3", {"method": "sparsegpt", "targets": ["lm_head", "model.layers.1"]}, "auto"),
        ("mixtral", {"method": "magnitude", "allocation": "global"}, "float32"),
        ("llama", {"method": "wanda", "allocation": "owl"}, "bfloat16"),
        ("gpt2", {"method": "sparsegpt", "allocation": "alpha"}, "float16"),
    ],
)
def test_heads_dtypes_and_allocations(
    family: str, options: dict, dtype: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(dense(family), dtype=dtype)
    expected = pruned(whole, tmp_path / "whole", {**options, "sparsity": 0.5})
    with WorkFolder.opened(tmp_path / "work") as work:
        work.claim({})
        result = pruned(opened(dense(family), work, dtype), tmp_path / "parts", {**options, "sparsity": 0.5})
    assert result.views == expected.views and same(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "config.json").read_text()) == json.loads(
        (tmp_path / "whole" / "config.json").read_text()
    )


@pytest.mark.parametrize("depth", [2, 7])
@pytest.mark.parametrize("method", ["balanced", "trained blocks"])
def test_one_block_is_there_at_a_time(method: str, depth: int, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.num_hidden_layers, config.layer_types = depth, None
    dense = AutoModelForCausalLM.from_config(config)
    dense.save_pretrained(tmp_path / "dense")
    block = sum(parameter.numel() for parameter in dense.model.layers[0].parameters())
    rest = sum(parameter.numel() for parameter in dense.parameters()) - depth * block
    seen: list[int] = []
    with WorkFolder.opened(tmp_path / "work") as work:
        work.claim({})
        model = opened(tmp_path / "dense", work)

        def look(*args: object) -> None:
            seen.append(sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta))

        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(look)
        window_nll(model, tiny_ids(3, 16))
        pruned(model, tmp_path / "out", CASES[method])
        with torch.no_grad():
            model(tiny_ids(1, 16))
        assert set(seen) == {rest + block}
        assert sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta) == rest


def mapping_of(tensor: torch.Tensor) -> str:
    """The line of this process's memory map that a tensor's values stand in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line
    raise AssertionError("in no mapping")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no memory map to read here")
def test_weights_and_hidden_states_are_mapped_and_not_held(dense: Callable[[str], Path], tmp_path: Path) -> None:
    with WorkFolder.opened(tmp_path / "work") as work:
        model = opened(dense("llama"), work)
        with at_work(model, 1):
            weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
            assert str(dense("llama") / "model.safetensors") in mapping_of(weight)
        with BlockRunner(model) as runner:
            stream = Stream(runner, tiny_ids(40, 64))
            stream.advance(0)
        whole = AutoModelForCausalLM.from_pretrained(dense("llama"), dtype="auto")
        with BlockRunner(whole) as runner:
            for chunk, states in zip(stream.chunks, stream.hidden, strict=True):
                assert str(tmp_path / "work") in mapping_of(states) and "(deleted)" in mapping_of(states)
                assert torch.equal(states, runner.run(0, chunk, None))
        # Nothing that a process which dies would leave behind.
        assert [file.name for file in work.path.iterdir()] == ["lock"]


def test_weights_in_host_memory(tmp_path: Path) -> None:
    """On a CPU device and host are one, but blocks come and go all the same."""
    expected = pruned(tiny_model("qwen3_moe"), tmp_path / "whole", CASES["balanced"])
    model = tiny_model("qwen3_moe")
    Offload(model, HostMemory(model), CPU)
    result = pruned(model, tmp_path / "parts", CASES["balanced"])
    assert result.views == expected.views and same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no memory map to read here")
def test_what_the_backward_pass_wants_of_each_block_lies_in_a_file(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[torch.Tensor] = []
    files: set[str] = set()

    def look(logits: torch.Tensor, seed: int) -> torch.Tensor:
        """Between the passes: which files are mapped where the blocks' inputs are."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, *rest = line.split(maxsplit=5)
            low, high = (int(end, 16) for end in span.split("-"))
            if any(low <= hidden.data_ptr() < high for hidden in inputs):
                files.add(rest[-1] if len(rest) == 5 else "anonymous")
        inputs.clear()
        return torch.zeros(len(logits), dtype=torch.int64)

    monkeypatch.setattr(gradients, "_drawn", look)
    found = {}
    with WorkFolder.opened(tmp_path / "work") as work:
        for name, model in (("memory", AutoModelForCausalLM.from_pretrained(dense("llama"))),
                            ("disk", opened(dense("llama"), work))):  # fmt: skip
            for block in model.model.layers:
                block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            files.clear()
            views = [view for view in find_views(model) if view.block < 3]
            found[name] = fisher_factors(model, views, tiny_ids(2, 24))
            assert files and all((str(tmp_path / "work") in file) == (name == "disk") for file in files), files
    for name, own in found["memory"].items():
        assert torch.equal(own.inputs, found["disk"][name].inputs)
        assert torch.equal(own.outputs, found["disk"][name].outputs)


def test_what_cannot_be_offloaded_is_refused(dense: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"offload: method intra_fusion .* whole model smaller"):
        check_offload("disk", make_config({"method": "intra_fusion"}))
    with pytest.raises(BadInputError, match=r"offload: allocation fcpts learns on the whole model"):
        check_offload("cpu", make_config({"method": "wanda", "allocation": "fcpts"}))
    with pytest.raises(BadInputError, match="offload: only prune, plan and evaluate"):
        load_model(str(dense("llama")), ModelArguments(offload="disk"), CPU)
    shared = tiny_model("llama")
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BadInputError, match=r"offload: .*layers.2.mlp.up_proj.weight and .* are one weight"):
        Offload(shared, HostMemory(shared), CPU)


def test_bad_files_are_named(dense: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("lost", "broken"):
        shutil.copytree(dense("llama"), tmp_path / name)
    tensors = load_file(tmp_path / "lost" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"layers.1.mlp.up_proj.weight holds NaN"):
        opened(tmp_path / "broken")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "lost" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"the files hold no model.layers.1.mlp.up_proj.weight"):
        opened(tmp_path / "lost")
    shutil.copytree(dense("opt"), tmp_path / "cut")
    model = opened(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadInputError, match=r"model.safetensors is not what it was"), at_work(model, 0):
        pass


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_whatever_blocks_change_in_any_order_the_files_hold_all_of_them(data: st.DataObject) -> None:
    """Units of random numbers, some written, some twice, from a source in any shards: a stock folder with the last."""
    family = data.draw(st.sampled_from(["llama", "gpt2", "phi3", "mixtral"]))
    size = data.draw(st.sampled_from(["5KB", "40KB", "10MB"]))
    turns = data.draw(st.lists(st.integers(0, 3), max_size=5))
    expected = tiny_model(family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected.save_pretrained(folder / "dense", max_shard_size=size)
        with WorkFolder.opened(folder / "work") as work:
            work.claim({})
            model = opened(folder / "dense", work)
            offload = offload_of(model)
            assert offload is not None
            for turn, unit in enumerate(turns):
                generator = torch.Generator().manual_seed(turn)
                with at_work(model, unit), torch.no_grad():
                    for parameter_name in offload.units[unit]:
                        new = torch.randn(expected.state_dict()[parameter_name].shape, generator=generator)
                        expected.state_dict()[parameter_name].copy_(new)
                        model.state_dict()[parameter_name].copy_(new)
                    keep(model, unit)
            save_model(model, None, folder / "parts")
        index = json.loads((folder / "parts" / "model.safetensors.index.json").read_text())
        own = stored(folder / "parts")
        assert index["weight_map"].keys() == own.keys()
        assert all(key in load_file(folder / "parts" / file) for key, file in index["weight_map"].items())
        loaded, information = AutoModelForCausalLM.from_pretrained(folder / "parts", output_loading_info=True)
        assert not any(information.values())
        for key, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
