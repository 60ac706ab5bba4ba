"""The peers of the structured benchmark on a tiny Llama, and on a tiny Gemma 3, whose config says less."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import FAMILIES, tiny_ids
from transformers import AutoModelForCausalLM

PEERS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "peers"


@pytest.fixture
def dense(request, tmp_path):
    """(folder, live model) of the test's family; Gemma with one key-value group, as Gemma-3-270m."""
    torch.manual_seed(0)
    family = getattr(request, "param", "gemma3")
    config = FAMILIES[family]()
    if family == "gemma3":
        config.num_key_value_heads = 1
    model = AutoModelForCausalLM.from_config(config).eval()
    # Standing values, so that there is a mean to lose: random gates alone put out nothing on average.
    for block in model.model.layers:
        block.mlp.up_proj.weight.data = block.mlp.gate_proj.weight.data * 2
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense", model


@pytest.fixture
def run(dense, tmp_path, monkeypatch):
    """run("flap", *flags): the stock model that a peer has saved, and its report."""
    monkeypatch.syspath_prepend(str(PEERS))
    save_file({"input_ids": tiny_ids(4, 32)}, tmp_path / "ids.safetensors")

    def work(name, *flags):
        places = ["--model", dense[0], "--token_ids", tmp_path / "ids.safetensors", "--output", tmp_path / "out"]
        words = [name, *places, "--report", tmp_path / "report.json", "--sparsity", "0.2", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        import_module(name).main()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        return loaded, json.loads((tmp_path / "report.json").read_text())

    return work


def mlp_outputs(model):
    """What the first block's MLP puts out, [tokens, hidden]."""
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(tiny_ids(4, 32))
    handle.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("missing_bias", ["fold", "leave_out"])
def test_flap_without_a_bias_of_the_mlp_keeps_the_mean_output_or_says_that_it_does_not(dense, run, missing_bias):
    dense = dense[1]
    pruned, report = run("flap", "--missing_bias", missing_bias)
    removed, total = 0, sum(p.numel() for p in dense.model.layers.parameters())
    for own, old in zip(pruned.model.layers, dense.model.layers, strict=True):
        gone = (own.mlp.up_proj.weight == 0).all(dim=1)
        removed += int(gone.sum()) * 3 * 32
        assert bool((own.mlp.down_proj.weight[:, gone] == 0).all())
        # The score of the only group is zero, that of a neuron that goes is below.
        assert torch.equal(own.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
        assert own.mlp.down_proj.bias is None and not bool(own.self_attn.o_proj.bias.any())
        if missing_bias == "leave_out":
            assert torch.equal(own.mlp.down_proj.weight[:, ~gone], old.mlp.down_proj.weight[:, ~gone])
    assert removed / total == pytest.approx(report["removed_share"]) == pytest.approx(0.2, abs=96 / total)
    means = [mlp_outputs(model).mean(0) for model in (dense, pruned)]
    off = float((means[1] - means[0]).norm() / means[0].norm())
    # Nothing before the first MLP has changed.
    assert off < 1e-4 if missing_bias == "fold" else off > 0.02
    said = {"fold": "folded into the kept columns in mlp", "leave_out": "left out in mlp"}
    assert report["compensation"] == said[missing_bias]


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_flap_keeps_the_mean_output_of_a_layer_by_a_bias(dense, run):
    """The published compensation: what the columns that go put out on average is the layer's bias."""
    live = dense[1]
    pruned, report = run("flap")
    own, old = pruned.model.layers[0].mlp, live.model.layers[0].mlp
    gone = (own.up_proj.weight == 0).all(dim=1)
    assert 0 < int(gone.sum()) < len(gone)
    assert torch.equal(own.down_proj.weight[:, ~gone], old.down_proj.weight[:, ~gone])
    seen = []
    handle = old.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        live(tiny_ids(4, 32))
    handle.remove()
    wanted = old.down_proj.weight[:, gone].double() @ seen[0][:, gone].double().mean(0)
    torch.testing.assert_close(own.down_proj.bias.double(), wanted, rtol=1e-4, atol=1e-6)
    assert pruned.config.mlp_bias and report["removed_share"] == pytest.approx(0.2, abs=0.02)


def test_shortgpt_keeps_the_kinds_of_the_blocks_that_stay(dense, run):
    pruned, report = run("shortgpt", "--sparsity", str(1 / 3))
    (gone,) = report["removed_blocks"]
    kept = [block for block in range(3) if block != gone]
    assert pruned.config.layer_types == [dense[1].config.layer_types[block] for block in kept]
    for new, old in enumerate(kept):
        weights = pruned.model.layers[new].state_dict()
        assert all(torch.equal(weights[k], v) for k, v in dense[1].model.layers[old].state_dict().items())
