"""Every method on every family: the plan is met, the function is kept as well as the method promises."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, MIXTURES, MORE_FAMILIES, matrix_of, tiny_ids, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_prune.arguments import PruneConfig
from hf_prune.compose import make_config, make_solver
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.walk import walk
from hf_prune.errors import BadInputError, RunError
from hf_prune.methods import methods
from hf_prune.methods.magnitude import MagnitudeConfig
from hf_prune.methods.sparsegpt import SparseGPTConfig
from hf_prune.methods.wanda import WandaConfig
from hf_prune.pruning import PruneResult, plan_pruning, prune
from hf_prune.weights import find_views

COMBINATIONS = [*(name for name in methods() if not methods()[name].structured), "wanda+sparsegpt", "sparsegpt+none"]


def make(name: str, **common: object) -> PruneConfig:
    criterion, _, update = name.partition("+")
    return PruneConfig(criterion=criterion, update=update, **common) if update else methods()[name](**common)


def check(model: nn.Module, result: PruneResult, pattern: str) -> None:
    for view, outcome in zip(result.plan.views, result.views, strict=True):
        kept = matrix_of(model.state_dict(), view) != 0
        assert tuple(kept.shape) == tuple(view.shape)
        assert outcome.name == view.name and outcome.kept == int(kept.sum())
        if pattern == "unstructured":
            rows = view.shape[0]
            # Rows round on their own (Wanda), blocks of 128 columns do as well (SparseGPT).
            assert abs(int(kept.sum()) - view.density * kept.numel()) <= rows
        else:
            n, m = map(int, pattern.split(":"))
            assert int(kept.reshape(view.shape[0], -1, m).sum(-1).max()) <= n
            assert int(kept.sum()) == kept.numel() * n // m


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_meets_its_plan_on_every_family(family: str, name: str, pattern: str) -> None:
    model = tiny_model(family)
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    config = make(name, pattern=pattern, sparsity=0.6 if pattern == "unstructured" else None)
    if name == "fcpts" and pattern != "unstructured":
        with pytest.raises(BadInputError, match="nothing to decide; set allocation to uniform or pattern to unstruct"):
            prune(model, config, input_ids=tiny_ids(4, 32))
        return
    result = prune(model, config, input_ids=tiny_ids(4, 32))
    check(model, result, pattern)
    may_move = {view.parameter for view in result.plan.views}
    if result.reconstruction:
        may_move |= {key for key, value in untouched.items() if value.ndim == 1 and ("norm" in key or "ln_" in key)}
    for key, value in model.state_dict().items():
        assert (key in may_move) or torch.equal(value, untouched[key]), key


@pytest.mark.parametrize("family", [*MORE_FAMILIES, *MIXTURES])
def test_every_method_meets_its_plan_on_the_other_families(family: str) -> None:
    for name in COMBINATIONS:
        for pattern in ("unstructured", "2:4", "1:4", "4:8"):
            if name == "fcpts" and pattern != "unstructured":
                continue
            model = tiny_model(family)
            short = {"reconstruct_passes": 1, "fcpts_steps": 2}
            options = {key: value for key, value in short.items() if key.split("_")[0] in (name, "reconstruct")}
            config = make(name, pattern=pattern, sparsity=None, options=options if name in ("best", "fcpts") else {})
            check(model, prune(model, config, input_ids=tiny_ids(4, 32)), pattern)


@pytest.mark.parametrize("model_type", ["olmo2", "stablelm", "cohere", "falcon", "bloom", "gptj", "granite", "phi"])
def test_a_family_that_nobody_described_takes_the_same_path(model_type: str, tmp_path: Path) -> None:
    """Names of sizes differ; what a config does not know it ignores."""
    sizes = {"hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "num_hidden_layers": 3, "n_layer": 3}
    heads = {"num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2 if model_type != "phi" else 4}
    common = {"vocab_size": 260, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "rotary_dim": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **common)).eval()
    for method, pattern in (("sparsegpt", "2:4"), ("wanda", "unstructured")):
        check(model, prune(model, make(method, pattern=pattern, sparsity=None), input_ids=tiny_ids(4, 32)), pattern)
    model.save_pretrained(tmp_path)
    ids = tiny_ids(2, 16, seed=5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_pruned_model_reloads_stock_with_the_same_logits(family: str, tmp_path: Path) -> None:
    model, input_ids = tiny_model(family), tiny_ids(2, 16, seed=5)
    prune(model, SparseGPTConfig(pattern="2:4"), input_ids=tiny_ids(4, 32))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits
        assert torch.equal(model(input_ids).logits, reloaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_order_pruning_hurts_least(family: str) -> None:
    """The output error of the whole model on calibration text: SparseGPT < Wanda < nothing in between is random."""
    input_ids = tiny_ids(16, 64)
    dense = tiny_model(family)
    with torch.no_grad():
        target = dense(input_ids).logits
    errors = {}
    for name in COMBINATIONS:
        model = tiny_model(family)
        prune(model, make(name, sparsity=0.5), input_ids=input_ids)
        with torch.no_grad():
            errors[name] = float((model(input_ids).logits - target).square().mean())
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["wanda+sparsegpt"] < errors["wanda"]


def test_later_blocks_are_observed_behind_pruned_ones() -> None:
    """Wanda's last block by hand: prune the first two, then score the third on what the pruned prefix hands it."""
    input_ids = tiny_ids(8, 32)
    model, reference = tiny_model("llama"), tiny_model("llama")
    prune(model, WandaConfig(sparsity=0.5), input_ids=input_ids)
    first_two = [f"model.layers.{index}" for index in (0, 1)]
    prune(reference, WandaConfig(sparsity=0.5, targets=first_two), input_ids=input_ids)
    seen = []
    down = reference.model.layers[2].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 48).double()))
    with torch.no_grad():
        reference(input_ids)
    score = down.weight.detach().abs() * seen[0].norm(dim=0).float()
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(24, dim=1).indices, True)
    assert torch.equal(model.model.layers[2].mlp.down_proj.weight != 0, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_solved_in_float32(dtype: torch.dtype) -> None:
    half, full = tiny_model("llama", dtype), tiny_model("llama", dtype).float()
    results = [prune(model, MagnitudeConfig(sparsity=0.5)) for model in (half, full)]
    check(half, results[0], "unstructured")
    assert all(
        torch.equal(matrix_of(half.state_dict(), view) != 0, matrix_of(full.state_dict(), view) != 0)
        for view in results[0].plan.views
    )
    result = prune(tiny_model("llama", dtype), SparseGPTConfig(sparsity=0.5), input_ids=tiny_ids())
    assert abs(result.sparsity - 0.5) < 0.01


def test_the_walk_costs_two_forwards_less_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"blocks": 0}
    original = BlockRunner._forward

    def counted(self: BlockRunner, input_ids: torch.Tensor) -> None:
        calls["blocks"] += 1
        original(self, input_ids)

    monkeypatch.setattr(BlockRunner, "_forward", counted)
    result = prune(tiny_model("llama"), WandaConfig(sparsity=0.5), input_ids=tiny_ids(8, 64))
    assert calls["blocks"] == 5 * 1  # 3 blocks: observe each, hand on all but the last; 512 tokens are one forward
    assert result.forward_passes == pytest.approx(5 / 3)
    assert prune(tiny_model("llama"), MagnitudeConfig(sparsity=0.5)).forward_passes == 0


def test_an_untied_head_can_be_a_target_and_a_tied_one_cannot() -> None:
    model = tiny_model("qwen3")
    result = prune(model, SparseGPTConfig(sparsity=0.5, targets=["lm_head", "down_proj"]), input_ids=tiny_ids())
    assert result.plan.views[-1].name == "lm_head" and len(result.plan.views) == 4
    check(model, result, "unstructured")
    with pytest.raises(BadInputError, match="tied to the embeddings"):
        plan_pruning(tiny_model("llama"), SparseGPTConfig(targets=["lm_head"]))


def test_the_floor_holds_in_every_row() -> None:
    for config in (
        MagnitudeConfig(sparsity=0.9, min_keep_ratio=0.1),
        SparseGPTConfig(sparsity=0.85, min_keep_ratio=0.1),
    ):
        model = tiny_model("llama")
        result = prune(model, config, input_ids=tiny_ids())
        for view in result.plan.views:
            assert int((matrix_of(model.state_dict(), view) != 0).sum(1).min()) >= 0.1 * view.shape[1]


def test_zeros_that_were_there_before_are_counted() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :5] = 0
    result = prune(model, MagnitudeConfig(sparsity=0.5))
    zeros = {view.name: view.zeros_before for view in result.views}
    assert zeros.pop("model.layers.0.mlp.up_proj") == 48 * 5 and set(zeros.values()) == {0}


def test_relative_errors_are_those_of_the_outputs() -> None:
    input_ids = tiny_ids()
    model, dense = tiny_model("llama"), tiny_model("llama")
    result = prune(
        model, SparseGPTConfig(sparsity=0.5, targets=["model.layers.0.self_attn.q_proj"]), input_ids=input_ids
    )
    seen = []
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    with torch.no_grad():
        dense(input_ids)
    before, after = (net.model.layers[0].self_attn.q_proj.weight.detach().double() for net in (dense, model))
    expected = (seen[0] @ (after - before).T).square().sum() / (seen[0] @ before.T).square().sum()
    assert result.views[0].error == pytest.approx(float(expected), rel=1e-4)


def test_what_cannot_work_is_said() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(BadInputError, match=r"layers\.1\.mlp\.up_proj: the weights hold NaN"):
        prune(model, MagnitudeConfig(sparsity=0.5))
    with pytest.raises(BadInputError, match="needs calibration text"):
        prune(tiny_model("llama"), WandaConfig(sparsity=0.5))
    overflowing = tiny_model("llama")
    with torch.no_grad():
        overflowing.model.embed_tokens.weight.fill_(torch.inf)
    for name, own in {"wanda": {}, "sparsegpt": {}, "balanced": {"allocation": "uniform"}, "best": {}}.items():
        config = make_config({"method": name, "sparsity": 0.5, **own})
        with pytest.raises(RunError, match=r"layers\.0\.\S+: its calibration inputs hold NaN or Inf"):
            prune(copy.deepcopy(overflowing), config, input_ids=tiny_ids())


def test_a_plan_of_another_model_is_refused() -> None:
    plan = plan_pruning(tiny_model("gpt2"), MagnitudeConfig())
    with pytest.raises(BadInputError, match="not in this model"):
        walk(tiny_model("llama"), plan, make_solver(MagnitudeConfig()), None)


def test_views_read_and_write_whatever_lies_behind() -> None:
    view = next(view for view in find_views(tiny_model("gpt2")) if view.name.endswith("c_fc"))
    assert view.shape == (128, 32) and view.module.weight.shape == (32, 128)
    wanted = torch.randn(128, 32)
    view.write(wanted)
    assert torch.equal(view.read(), wanted) and torch.equal(view.module.weight.detach(), wanted.T)


def test_without_propagation_every_layer_sees_the_dense_model() -> None:
    input_ids = tiny_ids(8, 64)
    whole = tiny_model("llama")
    config = WandaConfig(sparsity=0.6, propagate=False)
    result = prune(whole, config, input_ids=input_ids)
    assert result.forward_passes == pytest.approx(1)
    # A block pruned alone has a dense prefix in any case.
    for block in range(3):
        alone = tiny_model("llama")
        prune(alone, WandaConfig(sparsity=0.6, targets=[f"model.layers.{block}"]), input_ids=input_ids)
        for one, other in zip(
            whole.model.layers[block].parameters(), alone.model.layers[block].parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_statistics_of_the_dense_model_are_gathered_once_for_several_runs(tmp_path: Path) -> None:
    input_ids = tiny_ids(8, 64)
    passes = []
    for sparsity in (0.5, 0.7, 0.7):
        config = SparseGPTConfig(sparsity=sparsity, propagate=False)
        shared, alone = tiny_model("llama"), tiny_model("llama")
        result = prune(shared, config, input_ids=input_ids, statistics_folder=str(tmp_path))
        passes.append(result.forward_passes)
        prune(alone, config, input_ids=input_ids)
        for one, other in zip(shared.state_dict().values(), alone.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert passes == [pytest.approx(1), 0, 0]
    # Other windows, another model, other statistics: nothing of the folder fits.
    for config, ids, seed in (
        (SparseGPTConfig(sparsity=0.5, propagate=False), tiny_ids(8, 64, seed=4), 0),
        (SparseGPTConfig(sparsity=0.5, propagate=False), input_ids, 1),
        (WandaConfig(sparsity=0.5, propagate=False), input_ids, 0),
    ):
        result = prune(tiny_model("llama", seed=seed), config, input_ids=ids, statistics_folder=str(tmp_path))
        assert result.forward_passes == pytest.approx(1)
