"""Plans: what is chosen, what is left out and why, and that JSON brings them back."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from hf_prune.errors import BadInputError
from hf_prune.methods.magnitude import MagnitudeConfig
from hf_prune.plan import Plan, ViewPlan
from hf_prune.pruning import plan_pruning, prune
from hf_prune.weights import Outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_on_the_meta_device_is_the_plan_of_the_model(family: str) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(FAMILIES[family]())
    config = MagnitudeConfig(sparsity=0.3, ignore=["re:.*layers.0.*"] if family not in ("gpt2",) else None)
    assert plan_pruning(empty, config) == plan_pruning(tiny_model(family), config)


def test_blocks_are_pruned_and_embeddings_and_head_are_not() -> None:
    plan = plan_pruning(tiny_model("qwen3"), MagnitudeConfig())
    assert len(plan.views) == 3 * 7
    assert {skip["name"]: skip["reason"] for skip in plan.skipped} == {
        "model.embed_tokens": "an embedding",
        "lm_head": "the LM head, pruned only when it is a target",
    }


NAMES = st.text(max_size=20)
SHARES = st.floats(0, 1)
VIEWS = st.builds(
    ViewPlan,
    name=NAMES,
    parameter=NAMES,
    block=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 2**20), st.integers(1, 2**20)),
    transposed=st.booleans(),
    density=SHARES,
    pattern=st.sampled_from(["unstructured", "2:4", "1:4"]),
    floor=st.booleans(),
    expert=st.none() | st.integers(0, 511),
    outputs=st.none() | st.builds(Outputs, st.integers(0, 9), st.integers(1, 9), st.integers(1, 3)),
)
PLANS = st.builds(
    Plan,
    base_model=NAMES,
    architecture=NAMES,
    sparsity=SHARES,
    pattern=NAMES,
    allocation=NAMES,
    min_keep_ratio=SHARES,
    views=st.lists(VIEWS, max_size=4),
    skipped=st.lists(st.fixed_dictionaries({"name": NAMES, "reason": NAMES}), max_size=3),
    structure=st.none() | st.dictionaries(NAMES, st.integers() | st.lists(st.integers()), max_size=3),
)


@given(plan=PLANS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_brings_a_plan_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    # Every figure to the last bit, read by anybody's JSON.
    values = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert [view["density"] for view in values["views"]] == [view.density for view in plan.views]


def test_a_saved_plan_is_an_allocation(tmp_path: Path) -> None:
    plan = plan_pruning(tiny_model("llama"), MagnitudeConfig())
    for view in plan.views:
        view.density = 0.25 if "mlp" in view.name else 0.75
    plan.views[0].pattern = "3:4"
    path = tmp_path / "plan.json"
    plan.save(path)
    model = tiny_model("llama")
    result = prune(model, MagnitudeConfig(allocation=str(path)))
    for view in result.plan.views:
        kept = int((model.state_dict()[view.parameter] != 0).sum())
        assert kept == round((0.25 if "mlp" in view.name else 0.75) * view.numel)
    groups = (model.model.layers[0].self_attn.q_proj.weight != 0).view(32, 8, 4).sum(-1)
    assert torch.equal(groups, torch.full((32, 8), 3))
    assert result.plan.pattern == "mixed"
    with pytest.raises(BadInputError, match="pattern: 2:4 contradicts the plan"):
        plan_pruning(model, MagnitudeConfig(allocation=str(path), pattern="2:4"))
    with pytest.raises(BadInputError, match="contradicts the plan"):
        plan_pruning(model, MagnitudeConfig(allocation=str(path), sparsity=0.9))
    with pytest.raises(BadInputError, match="plan this model anew"):
        plan_pruning(tiny_model("gpt2"), MagnitudeConfig(allocation=str(path)))


def test_the_floor_raises_densities_and_says_where(tmp_path: Path) -> None:
    plan = plan_pruning(tiny_model("llama"), MagnitudeConfig())
    for view in plan.views:
        view.density = 0.05 if "down" in view.name else 0.5
    plan.save(tmp_path / "plan.json")
    held = plan_pruning(
        tiny_model("llama"), MagnitudeConfig(allocation=str(tmp_path / "plan.json"), min_keep_ratio=0.1)
    )
    assert [view.name for view in held.views if view.floor] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert all(view.density == 0.1 for view in held.views if view.floor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["nothing_proj"]}, "'nothing_proj' matches no linear layer"),
        ({"ignore": ["nothing_proj"]}, "ignore: 'nothing_proj'"),
        ({"ignore": ["re:.*"]}, "nothing is left to prune"),
        ({"targets": ["embed_tokens"]}, "names an embedding"),
        ({"pattern": "2:5"}, "32 inputs, which do not divide into groups of 5"),
        ({"pattern": "1:4", "min_keep_ratio": 0.2, "allocation": "missing.json"}, "cannot be read"),
        ({"allocation": "magic"}, "allocation: 'magic' is unknown"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        plan_pruning(tiny_model("llama"), MagnitudeConfig(**changes))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"format": "hf_prune_plan", "version": 99}'])
def test_a_broken_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"plan\.json"):
        Plan.load(path)


def test_a_plan_with_unknown_entries_is_refused(tmp_path: Path) -> None:
    values = plan_pruning(tiny_model("llama"), MagnitudeConfig()).to_dict()
    values["views"][0]["colour"] = "red"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(BadInputError, match="unknown entries"):
        Plan.load(path)


def test_experts_are_planned_one_by_one_and_routers_left_out() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        plan = plan_pruning(AutoModelForCausalLM.from_config(config), MagnitudeConfig())
    experts = [view for view in plan.views if view.expert is not None]
    assert [(view.name, view.parameter, view.shape) for view in experts] == [
        (f"model.layers.0.mlp.experts.{expert}.{tensor}", f"model.layers.0.mlp.experts.{tensor}", shape)
        for expert in range(2)
        for tensor, shape in (("gate_up_proj", (96, 32)), ("down_proj", (32, 48)))
    ]
    assert {"name": "model.layers.0.mlp.gate", "reason": "a router, which is never pruned"} in plan.skipped
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_model_without_a_stack_of_blocks_is_refused() -> None:
    with pytest.raises(BadInputError, match="no ModuleList of linear layers"):
        plan_pruning(nn.Sequential(nn.Linear(4, 4)), MagnitudeConfig())
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(BadInputError, match="several stacks of blocks"):
        plan_pruning(two, MagnitudeConfig())
