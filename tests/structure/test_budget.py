"""Sizes that a budget asks for: met within one unit, by numbers that a stock config can hold."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reduced import reduced
from tiny import tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.pruning import plan_pruning, prune
from hf_prune.reduction import _padded, search_budget
from hf_prune.structure.budget import budget_candidates, plan_structure
from hf_prune.structure.groups import MLP, block_shape, find_groups


def test_a_kind_with_no_share_of_the_budget_keeps_its_units():
    _, result = reduced("llama", units=["mlp", "attention"], budget=["attention=1", "mlp=0"], fusion="none")
    before, after = (result.plan.structure[when] for when in ("before", "after"))
    assert before["width"] == after["width"] and after["groups"] < before["groups"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_head_counts_that_the_stock_config_refuses_are_refused(family):
    with pytest.raises(BadInputError, match="key-value groups cannot be said in the stock config"):
        reduced(family, units=["attention"])


def eight_groups(neurons=48):
    """A Llama whose hidden size of 32 only 1, 2, 4 and 8 heads divide, which is what its config insists on."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=neurons, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"units": ["attention"], "sparsity": 0.12},
        {"units": ["mlp", "attention"], "sparsity": 0.15, "budget": ["mlp=0.2", "attention=0.8"]},
    ],
)
def test_a_refusal_says_which_head_counts_are_possible(options):
    with pytest.raises(BadInputError, match=r"6 of 8 key-value groups .* it accepts 1, 2, 4: "):
        plan_pruning(eight_groups(), make_config({"method": "intra_fusion", **options}))


@pytest.mark.parametrize(
    ("neurons", "sparsity", "groups", "gone"),
    [
        # A block is 8,768 parameters: 512 a group, 96 a neuron. Equal shares are 7, 6, 4, 3 and 1 groups.
        (48, 0.125, 8, 0.125 * 8768 / 96),
        (48, 0.25, 8, 0.25 * 8768 / 96),
        (48, 0.5, 4, (0.5 * 8768 - 4 * 512) / 96),
        (48, 0.65, 4, (0.65 * 8768 - 4 * 512) / 96),
        (48, 0.875, 1, (0.875 * 8768 - 7 * 512) / 96),
        # Of 6,464; 5 groups are the equal share, and these neurons cannot give all of it.
        (24, 0.4, 4, (0.4 * 6464 - 4 * 512) / 96),
    ],
)
def test_without_a_budget_the_neurons_make_up_for_head_counts_that_are_none(neurons, sparsity, groups, gone, caplog):
    model = eight_groups(neurons)
    config = make_config({"method": "intra_fusion", "sparsity": sparsity, "units": ["mlp", "attention"]})
    after = plan_pruning(model, config).structure["after"]
    assert after["groups"] == after["heads"] == groups
    assert after["width"] == round(neurons - gone)
    equal = 8 - round(8 * sparsity / (1 - 64 / (4160 + 96 * neurons)))
    assert ("cannot say" in caplog.text) == (equal != groups)
    assert equal == groups or f"cannot say {equal} of 8 units of attention a block; {groups} stay" in caplog.text


@given(
    sparsity=st.floats(0.02, 0.55),
    round_to=st.sampled_from([1, 2, 8]),
    units=st.sampled_from(
        [["mlp"], ["mlp", "attention"], ["mlp", "heads"], ["mlp", "depth"], ["mlp", "heads", "depth"]]
    ),
)
@example(sparsity=0.2, round_to=1, units=["mlp", "attention", "depth"])
@settings(max_examples=40)
def test_any_budget_is_met_within_one_unit(sparsity, round_to, units):
    model = tiny_model("llama")
    config = make_config({"method": "intra_fusion", "sparsity": sparsity, "round_to": round_to, "units": units})
    try:
        structure = plan_pruning(model, config).structure
    except BadInputError as error:
        # More was asked of the MLPs than they hold, or less than half a step of all units.
        assert sparsity > 0.4 or "nothing would go" in str(error)
        return
    before, after = structure["before"], structure["after"]
    assert all(0 < after[key] <= before[key] for key in before)
    neuron = find_groups(model, 0, MLP, block_shape(model))[0].parameters_of_a_unit()
    left = structure["blocks"] - structure["blocks_removed"]
    removed = structure["parameters_before"] - structure["parameters_after"]
    off = abs(removed - sparsity * structure["parameters_before"])
    # Whole blocks that overshoot leave the MLPs nothing to make up with.
    slack = structure["parameters_before"] / structure["blocks"] / 2 if after["width"] == before["width"] else 0
    assert off <= left * neuron * round_to / 2 + slack + 1
    assert after["width"] % round_to == 0


@given(
    densities=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    sparsity=st.floats(0.02, 0.5),
    round_to=st.sampled_from([1, 5, 8]),
)
@settings(max_examples=60)
def test_padded_widths_add_up_to_the_budget(densities, sparsity, round_to):
    model = tiny_model("llama")
    options = {"layout": "pad", "allocation": "erk", "sparsity": sparsity, "round_to": round_to}
    config = make_config({"method": "intra_fusion", **options})
    try:
        uniform = plan_structure(model, config)
    except BadInputError:
        return
    structure = _padded(uniform, densities, round_to)
    assert all(1 <= width <= 48 and width % round_to == 0 for width in structure.widths)
    assert sum(structure.widths) == min(uniform.after.width * 3 // round_to, 3 * (48 // round_to)) * round_to
    # What is stored is as wide as the widest; zeros fill it up.
    assert structure.parameters_after == uniform.parameters_before - 3 * 96 * (48 - max(structure.widths))
    assert structure.padded == pytest.approx(
        96 * sum(max(structure.widths) - width for width in structure.widths) / uniform.parameters_before
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_padded_widths_follow_a_saved_plan(family, tmp_path):
    """As those that `hf-prune sensitivity` suggests, or somebody has edited; of a fused layer part by part."""
    plan = plan_pruning(tiny_model(family), make_config({"method": "magnitude", "sparsity": 0.5}))
    for view in plan.views:
        view.density = (0.3, 0.6, 0.9)[view.block]
    plan.save(tmp_path / "plan.json")
    options = {"layout": "pad", "allocation": str(tmp_path / "plan.json"), "sparsity": 0.25, "fusion": "none"}
    _, result = reduced(family, **options)
    widths = result.plan.structure["widths"]
    uniform = plan_structure(tiny_model(family), make_config({"method": "intra_fusion", "sparsity": 0.25}))
    assert sum(widths) == 3 * uniform.after.width
    assert widths[0] < widths[1] < widths[2] and abs(widths[1] - 2 * widths[0]) <= 1


def test_a_plan_of_widths_gives_the_same_widths_again(tmp_path):
    """Even where the widest block has kept all that it had."""
    options = {"layout": "pad", "sparsity": 0.25, "fusion": "none"}
    model = tiny_model("llama")
    for block, scale in enumerate((0.1, 0.5, 1000.0)):
        for weight in model.model.layers[block].mlp.parameters():
            weight.data *= scale
    plan = plan_pruning(model, make_config({"method": "intra_fusion", **options, "allocation": "global"}))
    assert max(plan.structure["widths"]) == 48
    plan.save(tmp_path / "plan.json")
    own = {**options, "allocation": str(tmp_path / "plan.json")}
    _, result = reduced("llama", **own)
    assert list(result.plan.structure["widths"]) == list(plan.structure["widths"])
    with pytest.raises(
        BadInputError, match=r"plan\.json is of 3 blocks with 48 neurons, and this model has 3 with 128"
    ):
        plan_pruning(tiny_model("gpt2"), make_config({"method": "intra_fusion", **own}))
    with pytest.raises(BadInputError, match=r"plan\.json plans a narrower model, no zeros"):
        plan_pruning(model, make_config({"method": "magnitude", "allocation": own["allocation"]}))
    plan_pruning(model, make_config({"method": "intra_fusion", "sparsity": 0.25})).save(tmp_path / "plan.json")
    with pytest.raises(BadInputError, match=r"plan\.json gives every block the same width"):
        plan_pruning(model, make_config({"method": "intra_fusion", **own}))


def test_the_searched_budget_is_the_cheapest_of_those_tried():
    """Blocks 0 and 1 live by their attention: only taking neurons costs nothing, which is not the default split."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj.weight.data.zero_()
        block.self_attn.o_proj.weight.data *= 20
    config = make_config(
        {
            "method": "intra_fusion",
            "units": ["mlp", "attention"],
            "budget": ["search"],
            "sparsity": 0.4,
            "fusion": "none",
        }
    )
    ids = tiny_ids(8, 32)
    assert search_budget(model, config, ids) == {"attention": 0.0, "mlp": 1.0}
    plain = make_config({"method": "intra_fusion", "units": ["mlp", "attention"], "sparsity": 0.4, "fusion": "none"})
    assert plan_pruning(model, plain).structure["after"]["groups"] == 1
    result = prune(model, config, input_ids=ids)
    assert result.plan.structure["after"]["groups"] == 2
    assert result.plan.structure["searched"] == {"attention": 0.0, "mlp": 1.0}
    three = make_config({"method": "intra_fusion", "units": ["mlp", "attention", "depth"], "budget": ["search"]})
    tried = {(own["attention"], own["depth"]) for own in budget_candidates(three)}
    quarters = (0.0, 0.25, 0.5, 0.75)
    assert tried == {(a, d) for a in quarters for d in quarters if a + d <= 0.75}
    assert all(sum(own.values()) == 1 for own in budget_candidates(three))
