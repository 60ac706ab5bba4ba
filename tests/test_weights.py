"""Weight matrices of fused layers: the rows that are theirs, and the same pruning as of layers of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import matrix_of, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.methods.magnitude import MagnitudeConfig
from hf_prune.plan import Plan, select_views
from hf_prune.pruning import plan_pruning, prune
from hf_prune.training.lora import MaskedLora
from hf_prune.weights import WeightView, find_views


def rows_by_name(model: PreTrainedModel) -> dict[str, tuple[str, list[int]]]:
    """Parameter and rows of the fused matrices of block 0, as the families' own code cuts them."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    hidden = config.hidden_size
    if config.model_type == "gpt2":
        return {
            f"attn.c_attn.{role}": ("attn.c_attn.weight", list(range(at * hidden, (at + 1) * hidden)))
            for at, role in enumerate(("query", "key", "value"))
        }
    if config.model_type == "gpt_neox":
        # [heads, 3 * size] as modeling_gpt_neox views it, in three chunks of each head.
        return {
            f"attention.query_key_value.{role}": (
                "attention.query_key_value.weight",
                [head * 3 * size + at * size + row for head in range(heads) for row in range(size)],
            )
            for at, role in enumerate(("query", "key", "value"))
        }
    keys, width = config.num_key_value_heads * size, config.intermediate_size
    qkv, gate_up = "self_attn.qkv_proj", "mlp.gate_up_proj"
    return {
        f"{qkv}.query": (f"{qkv}.weight", list(range(hidden))),
        f"{qkv}.key": (f"{qkv}.weight", list(range(hidden, hidden + keys))),
        f"{qkv}.value": (f"{qkv}.weight", list(range(hidden + keys, hidden + 2 * keys))),
        f"{gate_up}.gate": (f"{gate_up}.weight", list(range(width))),
        f"{gate_up}.up": (f"{gate_up}.weight", list(range(width, 2 * width))),
    }


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox"])
def test_each_part_of_a_fused_layer_has_its_own_rows(family: str) -> None:
    model = tiny_model(family)
    prefix = (
        "transformer.h.0." if family == "gpt2" else "gpt_neox.layers.0." if family == "gpt_neox" else "model.layers.0."
    )
    views = {view.name: view for view in find_views(model) if view.block == 0}
    expected = rows_by_name(model)
    assert {name.removeprefix(prefix) for name, view in views.items() if view.outputs} == set(expected)
    for name, (parameter, rows) in expected.items():
        view, before = views[prefix + name], model.get_parameter(prefix + parameter).detach().clone()
        whole = before.T if family == "gpt2" else before
        assert view.parameter_name == prefix + parameter and view.shape == (len(rows), whole.shape[1])
        assert torch.equal(view.read(), whole[rows])
        assert torch.equal(view.own_outputs(torch.arange(len(whole))[None, None]), torch.tensor(rows)[None, None])
        new = torch.randn(view.shape)
        with torch.no_grad():
            view.write(new)
        after = model.get_parameter(prefix + parameter).detach()
        after = after.T if family == "gpt2" else after
        others = [row for row in range(len(whole)) if row not in rows]
        assert torch.equal(after[rows], new) and torch.equal(after[others], whole[others])
    whole_views = [view for view in find_views(model, whole=True) if view.block == 0]
    assert sum(view.shape[0] * view.shape[1] for view in whole_views) == sum(
        view.shape[0] * view.shape[1] for view in views.values()
    )


NAMES = {"query": "q", "key": "k", "value": "v", "gate": "gate", "up": "up"}


def unfused(model: PreTrainedModel) -> PreTrainedModel:
    """The Llama that computes what a Phi-3 does."""
    config = model.config
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**{key: getattr(config, key) for key in keys})).eval()
    weights = {}
    for name, weight in model.state_dict().items():
        keys_size = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        if name.endswith("qkv_proj.weight"):
            parts = weight.split([config.hidden_size, keys_size, keys_size])
            weights |= {name.replace("qkv", own): part for own, part in zip("qkv", parts, strict=True)}
        elif name.endswith("gate_up_proj.weight"):
            weights |= {
                name.replace("gate_up", own): part for own, part in zip(("gate", "up"), weight.chunk(2), strict=True)
            }
        else:
            weights[name] = weight
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize(
    "values",
    [
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "wanda", "pattern": "2:4"},
        {"method": "sparsegpt", "sparsity": 0.6, "allocation": "owl"},
        {
            "method": "admm",
            "sparsity": 0.6,
            "iterations": 10,
            "allocation": "fisher",
            "output_importance": "fisher",
            "min_keep_ratio": 0.2,
        },
        {"method": "sparsegpt", "sparsity": 0.5, "reconstruct": "block", "reconstruct_passes": 2},
        {"method": "fcpts", "sparsity": 0.5, "fcpts_steps": 4},
        {"method": "fcpts", "sparsity": 0.5, "fcpts_steps": 4, "train_weights": True},
        {"method": "ria", "pattern": "2:4", "channel_permutation": True},
    ],
    ids=lambda values: "-".join(str(value) for value in values.values()),
)
def test_a_fused_layer_is_pruned_as_its_parts_would_be(values: dict[str, object]) -> None:
    fused = tiny_model("phi3")
    apart = unfused(fused)
    ids = tiny_ids(8, 48)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, apart(ids).logits)
    results = [prune(model, make_config(dict(values)), input_ids=ids) for model in (fused, apart)]
    others = {view.name: view for view in results[1].plan.views}
    for one in results[0].plan.views:
        layer, _, role = one.name.rpartition(".")
        name = one.name if one.outputs is None else f"{layer.rpartition('.')[0]}.{NAMES[role]}_proj"
        other = others.pop(name)
        own, expected = matrix_of(fused.state_dict(), one), matrix_of(apart.state_dict(), other)
        assert one.shape == other.shape and one.density == pytest.approx(other.density, abs=1e-3)
        # Sums in another order may turn a tie.
        assert float(((own != 0) != (expected != 0)).float().mean()) < 0.005, one.name
        assert float((own - expected).norm() / expected.norm()) < 0.02, one.name


def chosen(model: PreTrainedModel, **keys: list[str]) -> list[WeightView]:
    return [view for view in select_views(model, keys.get("targets"), keys.get("ignore"))[0] if view.block == 0]


def test_patterns_name_a_fused_layer_or_its_parts() -> None:
    model = tiny_model("phi3")
    assert len(chosen(model)) == 7
    assert [view.name.rsplit(".", 2)[1:] for view in chosen(model, targets=["qkv_proj"])] == [
        ["qkv_proj", "query"], ["qkv_proj", "key"], ["qkv_proj", "value"]
    ]  # fmt: skip
    assert [view.name.rsplit(".", 1)[1] for view in chosen(model, targets=["qkv_proj.value", "re:.*up"])] == [
        "value",
        "up",
    ]
    assert len(chosen(model, ignore=["gate_up_proj"])) == 5 and len(chosen(model, ignore=["query", "up"])) == 5
    with pytest.raises(BadInputError, match="targets: 'q_proj' matches no linear layer of the model; it has"):
        chosen(model, targets=["q_proj"])


def test_a_part_that_is_ignored_stays_to_the_bit_while_others_are_trained() -> None:
    model = tiny_model("phi3")
    before = model.model.layers[0].self_attn.qkv_proj.weight.detach().clone()
    values = {"method": "fcpts", "sparsity": 0.5, "fcpts_steps": 4, "train_weights": True, "ignore": ["qkv_proj.query"]}
    prune(model, make_config(values), input_ids=tiny_ids(8, 48))
    after = model.model.layers[0].self_attn.qkv_proj.weight.detach()
    assert torch.equal(after[:32], before[:32]) and bool((after[32:] == 0).any())


def test_a_plan_keeps_which_part_it_means() -> None:
    plan = plan_pruning(tiny_model("gpt_neox"), MagnitudeConfig(sparsity=0.5))
    assert Plan.from_dict(plan.to_dict()) == plan
    own = next(view for view in plan.views if view.name == "gpt_neox.layers.1.attention.query_key_value.key")
    assert own.outputs is not None and (own.outputs.repeats, own.outputs.offset) == (4, own.outputs.size)


def test_a_plan_of_whole_layers_gives_each_part_the_layers_share(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    plan = plan_pruning(model, MagnitudeConfig(sparsity=0.5))
    layers = {view.layer: view for view in find_views(model, whole=True) if view.block < 3}
    merged = {view.parameter: view for view in plan.views}
    plan.views = [
        replace(
            merged[view.parameter_name],
            name=name,
            shape=view.shape,
            outputs=None,
            density=0.25 if "qkv" in name else 0.5,
        )
        for name, view in layers.items()
    ]
    plan.save(tmp_path / "plan.json")
    result = prune(model, MagnitudeConfig(allocation=str(tmp_path / "plan.json")))
    assert {view.density for view in result.plan.views if "qkv" in view.name} == {0.25}
    assert {view.density for view in result.plan.views if "qkv" not in view.name} == {0.5}


def test_adapters_leave_a_part_alone_that_was_not_pruned() -> None:
    model = tiny_model("phi3")
    before = model.model.layers[0].self_attn.qkv_proj.weight.detach().clone()
    views = [view for view in find_views(model) if view.name.endswith(("qkv_proj.key", "qkv_proj.value"))]
    adapters = MaskedLora(model, views, {}, rank=2, alpha=4)
    with torch.no_grad():
        for name, parameter in adapters.model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
    adapters.merge()
    after = model.model.layers[0].self_attn.qkv_proj.weight.detach()
    assert torch.equal(after[:32], before[:32]) and bool((after[32:] != before[32:]).all())
