"""Experts of mixtures: each is pruned on its own tokens, and a mixture of one expert is the dense model."""

from pathlib import Path

import pytest
import torch
from tiny import MIXTURES, tiny_ids, tiny_model
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AfmoeConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hf_prune.checkpoint.displacement import displacement
from hf_prune.checkpoint.folder import PLAN_FILE, RECIPE_FILE, REPORT_FILE
from hf_prune.checkpoint.inspect import inspect_checkpoint
from hf_prune.checkpoint.verify import verify_folder
from hf_prune.compose import make_config
from hf_prune.engine.capture import BlockRunner, InputObserver
from hf_prune.engine.experts import computed_by, run_experts
from hf_prune.engine.gradients import fisher_factors
from hf_prune.engine.masked import ThresholdedView, thresholded
from hf_prune.engine.statistics import LEAST_TOKENS
from hf_prune.errors import BadInputError
from hf_prune.plan import select_views
from hf_prune.pruning import plan_pruning, prune
from hf_prune.recovery_setup import prepare_recovery
from hf_prune.sensitivity import measure_sensitivity
from hf_prune.training.arguments import make_train_recipe
from hf_prune.training.recovery import RecoveryConfig
from hf_prune.weights import WeightView, find_blocks, find_views

COMMON = {
    "vocab_size": 260,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 256,
}


def gpt_oss() -> PreTrainedModel:
    """Experts stored [in, out], with biases, gate and up rows in turn."""
    torch.manual_seed(0)
    config = GptOssConfig(**COMMON, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 1:
                parameter.normal_(std=0.1)
    return model


def afmoe() -> PreTrainedModel:
    """Routers with their layer inside, a shared expert beside, and a first block without."""
    torch.manual_seed(0)
    config = AfmoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        num_dense_layers=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


MODELS = {**{name: lambda name=name: tiny_model(name) for name in MIXTURES}, "gpt_oss": gpt_oss}


def experts_of(model: nn.Module) -> nn.Module:
    return next(view.module for view in find_views(model) if view.expert is not None)


def routed(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the first experts module is handed: hidden states, chosen experts, their weights."""
    seen: list[tuple[Tensor, ...]] = []
    handle = experts_of(model).register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_expert_by_expert_is_what_the_model_computes(name: str) -> None:
    model, input_ids = MODELS[name](), tiny_ids(2, 24)
    before = model.config._experts_implementation
    linear = lambda expert, tensor, inputs, weight: inputs @ weight.T  # noqa: E731
    functions = {
        view.module: lambda own, *args, module=view.module: run_experts(module, linear, *args)
        for view in find_views(model)
        if view.expert is not None
    }
    with torch.no_grad():
        wanted = model(input_ids).logits
        with computed_by(functions):
            found = model(input_ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert model.config._experts_implementation == before
        assert torch.equal(model(input_ids).logits, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_summed_over_its_own_tokens(name: str) -> None:
    model, input_ids = MODELS[name](), tiny_ids(6, 16)
    views = [view for view in find_views(model) if view.block == 0]
    observer = InputObserver(views, frozenset({"gram"}))
    with BlockRunner(model) as runner, observer.listening():
        for chunk in input_ids.split(2):
            with observer.forward():
                runner.observe(0, chunk, None)
    hidden, chosen, _ = routed(model, input_ids)
    tokens_seen = 0
    for statistics, members in observer.groups:
        statistics.finish(lambda tensor: None)
        view = members[0]
        if view.expert is None:
            continue
        assert members == [view]
        own = hidden[[token for token in range(len(hidden)) if view.expert in chosen[token].tolist()]]
        if view.tensor == "down_proj":
            weight, bias = view.module.gate_up_proj[view.expert], 0.0
            if view.transposed:
                weight, bias = weight.T, view.module.gate_up_proj_bias[view.expert]
            own = view.module._apply_gate(own @ weight.T + bias).detach()
            tokens_seen += len(own)
        assert statistics.count == len(own) >= LEAST_TOKENS, "or this test compares nothing"
        torch.testing.assert_close(statistics.gram, own.double().T @ own.double(), rtol=1e-4, atol=1e-5)
    assert tokens_seen == 2 * input_ids.numel()


def mixture_of_one() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A Qwen3-MoE with a single expert, and the Qwen3 that computes the same."""
    torch.manual_seed(0)
    mixture = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**COMMON, moe_intermediate_size=24, num_experts=1, num_experts_per_tok=1, norm_topk_prob=True)
    ).eval()
    dense = AutoModelForCausalLM.from_config(Qwen3Config(**COMMON, intermediate_size=24)).eval()
    weights = {key: value.clone() for key, value in mixture.state_dict().items() if "mlp" not in key}
    for block in range(2):
        own = f"model.layers.{block}.mlp"
        gate, up = mixture.state_dict()[f"{own}.experts.gate_up_proj"][0].chunk(2)
        weights |= {f"{own}.gate_proj.weight": gate, f"{own}.up_proj.weight": up}
        weights[f"{own}.down_proj.weight"] = mixture.state_dict()[f"{own}.experts.down_proj"][0]
    dense.load_state_dict(weights)
    return mixture, dense


def as_mixture(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is known of a dense model's matrices under the names of the mixture's; gate and up are one there."""
    found = {name: value for name, value in values.items() if ".mlp." not in name}
    for name, value in values.items():
        block = name.partition(".mlp.")[0]
        if name.endswith("down_proj"):
            found[f"{block}.mlp.experts.0.down_proj"] = value
        if name.endswith("gate_proj"):
            found[f"{block}.mlp.experts.0.gate_up_proj"] = torch.cat([value, values[f"{block}.mlp.up_proj"]])
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {view.name: view.read() for view in find_views(model)}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_mixture_of_one_is_pruned_like_the_dense_model(method: str) -> None:
    """2:4 compares inside rows, whether gate and up are one matrix or two."""
    mixture, dense = mixture_of_one()
    for model in (mixture, dense):
        prune(model, make_config({"method": method, "pattern": "2:4"}), input_ids=tiny_ids(8, 32))
    wanted, found = as_mixture(weights_of(dense)), weights_of(mixture)
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


def test_fisher_factors_of_a_mixture_of_one_are_the_dense_models() -> None:
    mixture, dense = mixture_of_one()
    ids = tiny_ids(4, 24)
    found, wanted = (fisher_factors(model, find_views(model), ids) for model in (mixture, dense))
    outputs = as_mixture({name: own.outputs for name, own in wanted.items()})
    for name, own in found.items():
        torch.testing.assert_close(own.outputs, outputs[name], rtol=1e-3, atol=1e-12)
        same = name.replace("experts.0.gate_up_proj", "gate_proj").replace("experts.0.", "")
        torch.testing.assert_close(own.inputs, wanted[same].inputs, rtol=1e-3, atol=1e-12)


def test_thresholds_mask_a_mixture_of_one_like_the_dense_model() -> None:
    mixture, dense = mixture_of_one()
    ids = tiny_ids(2, 24)
    logits, gradients = [], []
    for model in (mixture, dense):
        views = [view for view in find_views(model) if "down_proj" in view.name]
        thresholds = torch.full((2,), 0.02, requires_grad=True)
        with thresholded([], [ThresholdedView(view, None, 0.01) for view in views], thresholds):
            logits.append(model(ids).logits)
            logits[-1].square().sum().backward()
        gradients.append(thresholds.grad)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(logits[0], mixture(ids).logits, atol=1e-3)


def starved(model: PreTrainedModel) -> None:
    """Nobody chooses the last expert of the first block: the others' logits are above its 0."""
    gate = model.model.layers[0].mlp.gate
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    with torch.no_grad():
        gate.weight.copy_(gate.weight.abs())
        gate.weight[-1] = 0


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named() -> None:
    model = tiny_model("mixtral")
    starved(model)
    views = {view.name: view for view in find_views(model)}
    silent = [f"model.layers.0.mlp.experts.3.{tensor}" for tensor in ("gate_up_proj", "down_proj")]
    dense = {name: views[name].read() for name in silent}
    result = prune(model, make_config({"method": "wanda", "sparsity": 0.5}), input_ids=tiny_ids(8, 32))
    assert [view.name for view in result.views if view.scarce] == silent
    for name in silent:
        half = dense[name].shape[1] // 2
        kept = torch.zeros_like(dense[name], dtype=torch.bool).scatter_(1, dense[name].abs().topk(half).indices, True)
        assert torch.equal(views[name].read(), dense[name] * kept)
    for method in ("sparsegpt", "balanced"):
        model = tiny_model("mixtral")
        starved(model)
        result = prune(model, make_config({"method": method, "sparsity": 0.5}), input_ids=tiny_ids(8, 32))
        assert [view.name for view in result.views if view.scarce] == silent
        assert all(view.error is None for view in result.views if view.scarce)
        # What nothing is known of is neither kept whole nor thrown away.
        densities = [view.density for view in result.plan.views if view.name in silent]
        assert all(0.2 < density < 0.8 for density in densities)


@pytest.mark.parametrize(("tokens", "scarce"), [(1, True), (31, True), (32, False)])
def test_an_expert_with_too_few_tokens_is_pruned_by_magnitude(tokens: int, scarce: bool) -> None:
    model = tiny_model("mixtral")
    starved(model)

    def some_choose_the_last(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # The others' logits are below its 0 there.
        states = args[0].abs()
        states[:, :tokens] *= -1
        return (states,)

    model.model.layers[0].mlp.register_forward_pre_hook(some_choose_the_last)
    name = "model.layers.0.mlp.experts.3.down_proj"
    view = next(view for view in find_views(model) if view.name == name)
    dense = view.read()
    result = prune(model, make_config({"method": "wanda", "sparsity": 0.5}), input_ids=tiny_ids(1, 128))
    assert next(found for found in result.views if found.name == name).scarce == scarce
    half = dense.shape[1] // 2
    kept = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, dense.abs().topk(half).indices, True)
    assert torch.equal(view.read(), dense * kept) == scarce


SAVED = {**MODELS, "afmoe": afmoe}


@pytest.mark.parametrize("name", SAVED)
def test_a_pruned_mixture_is_verified_inspected_and_reloaded_stock(name: str, tmp_path: Path) -> None:
    model = SAVED[name]()
    routers = {key: value.clone() for key, value in model.state_dict().items() if "gate.weight" in key or "rout" in key}
    assert routers
    result = prune(model, make_config({"method": "sparsegpt", "pattern": "2:4"}), input_ids=tiny_ids(6, 32))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in routers.items())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(reloaded(tiny_ids(2, 16)).logits, model(tiny_ids(2, 16)).logits)
    inspection = inspect_checkpoint(tmp_path)
    total = sum(view.numel for view in result.plan.views)
    assert inspection.summary["block_parameters"] == total and inspection.summary["block_nonzeros"] == total // 2
    assert set(inspection.summary["patterns"]) == {"2:4"}
    before = {view.name: view.read() for view in find_views(SAVED[name]())}
    moved = displacement(tmp_path, SAVED[name](), result.plan.views)
    for view in find_views(model)[:-1]:
        kept = view.read() != 0
        distance = (view.read() - before[view.name])[kept].norm() / before[view.name][kept].norm()
        assert moved[view.name]["moved"] == pytest.approx(float(distance), rel=1e-4)


@pytest.mark.slow
def test_one_weight_too_many_in_one_expert_is_found_by_the_verification(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    result = prune(model, make_config({"method": "magnitude", "sparsity": 0.5}))
    model.save_pretrained(tmp_path)
    kept = {view.name: view.kept for view in result.views}
    views = [{**vars(view), "kept": kept[view.name]} for view in result.plan.views]
    views[-1]["kept"] -= 1
    (wrong,) = [row for row in verify_folder(tmp_path, model, views) if not row["passed"]]
    assert "experts.3.down_proj" in views[-1]["name"] and views[-1]["name"] in wrong["detail"]


def test_training_a_block_moves_chosen_experts_alone() -> None:
    model, untouched = tiny_model("mixtral"), tiny_model("mixtral")
    ignored = "re:.*experts\\.[01]\\..*"
    values = {"method": "wanda", "sparsity": 0.5, "ignore": [ignored], "reconstruct": "block", "reconstruct_passes": 2}
    result = prune(model, make_config(values), input_ids=tiny_ids(8, 32))
    pruned_only = tiny_model("mixtral")
    solved = {key: value for key, value in values.items() if "reconstruct" not in key}
    prune(pruned_only, make_config(solved), input_ids=tiny_ids(8, 32))
    assert all(outcome.after < outcome.before for outcome in result.reconstruction.values())

    def first(model: nn.Module) -> list[WeightView]:
        return [view for view in find_views(model) if view.block == 0 and view.expert is not None]

    for view, before, pruned in zip(first(model), first(untouched), first(pruned_only), strict=True):
        if view.expert in (0, 1):
            assert torch.equal(view.read(), before.read())
        else:
            assert torch.equal(view.read() == 0, pruned.read() == 0) and not torch.equal(view.read(), pruned.read())


def test_routers_are_left_out_and_what_cannot_train_experts_says_so() -> None:
    model = tiny_model("qwen3_moe")
    views, skipped = select_views(model, None, None)
    assert sum(view.expert is not None for view in views) == 2 * 4 * 2
    reasons = {own["name"]: own["reason"] for own in skipped}
    assert reasons["model.layers.0.mlp.gate"] == "a router, which is never pruned"
    only = plan_pruning(model, make_config({"method": "magnitude", "targets": ["model.layers.2.mlp.experts.1"]}))
    assert [view.expert for view in only.views] == [1, 1]
    config = make_config({"method": "fcpts", "train_weights": True, "sparsity": 0.5})
    with pytest.raises(BadInputError, match="train_weights: experts of a mixture"):
        prune(model, config, input_ids=tiny_ids(4, 16))


SIZES = {**COMMON, "intermediate_size": 48, "moe_intermediate_size": 24}
# What is called a router or gate in each family's own code, inside a block.
NESTED_ROUTERS: dict[str, tuple[dict[str, object], set[str]]] = {
    "afmoe": ({"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 0}, {"mlp.router.gate"}),
    "gemma4_text": ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, {"router.proj"}),
    "hunyuan_v1_moe": ({"num_experts": 4, "moe_topk": 2}, {"mlp.gate.wg"}),
    # As many experts as their shared one has rows.
    "qwen3_next": (
        {"num_experts": 24, "shared_expert_intermediate_size": 24},
        {"mlp.gate", "mlp.shared_expert_gate"},
    ),
    "zaya": ({"num_experts": 4}, {f"mlp.gate.{name}" for name in
                                  ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")}),
}  # fmt: skip
UNKNOWN_EXPERTS: dict[str, tuple[dict[str, object], set[str]]] = {
    "dbrx": (
        {"n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"moe_num_experts": 4}},
        {"ffn.router.layer"},
    ),
    "jetmoe": ({"num_local_experts": 4}, {"mlp.router.layer", "self_attention.experts.router.layer"}),
    "llama4_text": ({"num_local_experts": 4, "interleave_moe_layer_step": 1}, {"feed_forward.router"}),
    "longcat_flash": ({"num_hidden_layers": 4, "zero_expert_num": 3}, {"mlp.router.classifier"}),
}


def planned_family(name: str, values: dict[str, object], **keys: list[str]) -> tuple[set[str], dict[str, str]]:
    """Layers of the second block that a plan prunes, and what it leaves out there with the reason."""
    sizes = {} if name == "dbrx" else SIZES
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**sizes, **values}))
    views, skipped = select_views(model, keys.get("targets"), None)
    prefix = f"{find_blocks(model)[0]}.1."
    return (
        {view.layer.removeprefix(prefix) for view in views if view.block == 1},
        {own["name"].removeprefix(prefix): own["reason"] for own in skipped},
    )


@pytest.mark.parametrize("name", NESTED_ROUTERS)
def test_routers_are_left_out_wherever_a_family_keeps_them(name: str) -> None:
    values, routers = NESTED_ROUTERS[name]
    pruned, left = planned_family(name, values)
    assert {own for own, reason in left.items() if "router" in reason and ".layers.0." not in own} == routers
    assert not pruned & routers and any("experts" in own for own in pruned)
    assert any("o_proj" in own or "out_proj" in own for own in pruned)


@pytest.mark.parametrize("name", UNKNOWN_EXPERTS)
def test_experts_in_an_unknown_layout_are_refused_unless_they_are_not_meant(name: str) -> None:
    values, routers = UNKNOWN_EXPERTS[name]
    with pytest.raises(BadInputError, match=r"keeps experts in a layout that .* \(\d+ weights, first"):
        planned_family(name, values)
    pruned, left = planned_family(name, values, targets=["re:.*\\.1\\..*"])
    assert pruned and not pruned & routers and routers <= {own for own in left if "router" in left[own]}


def test_structured_pruning_and_lora_refuse_mixtures(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(BadInputError, match="of a mixtral block belong together is not described"):
        prune(model, make_config({"method": "intra_fusion", "sparsity": 0.2}), input_ids=tiny_ids(2, 16))
    result = prune(model, make_config({"method": "magnitude", "sparsity": 0.5}))
    result.plan.save(tmp_path / PLAN_FILE)
    (tmp_path / REPORT_FILE).write_text("{}")
    (tmp_path / RECIPE_FILE).write_text("method: magnitude\n")
    values = {"recovery": "lora", "output_dir": str(tmp_path / "out"), "eval_dataset_name": "text.txt"}
    with pytest.raises(BadInputError, match="lora has no adapters for the experts"):
        prepare_recovery(str(tmp_path), make_train_recipe(values, RecoveryConfig))
    assert not (tmp_path / "out").exists()


def test_sensitivity_takes_the_experts_of_all_blocks_as_one_kind_and_leaves_the_model_dense() -> None:
    model, untouched = tiny_model("mixtral"), tiny_model("mixtral").state_dict()
    ids = tiny_ids(4, 16)

    def nll(label: str) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(input_ids=own[None], labels=own[None]).loss.double() for own in ids])

    config = make_config({"method": "magnitude", "sparsity": 0.5})
    measured = measure_sensitivity(model, config, nll, by="kind")
    zeros = {part.part: part.weights for part in measured.parts}
    assert zeros["mlp.experts.*.gate_up_proj"] == 3 * 4 * 96 * 32 // 2
    assert zeros["mlp.experts.*.down_proj"] == 3 * 4 * 32 * 48 // 2
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
