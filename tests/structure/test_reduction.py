"""Structured pruning end to end on tiny models, its least squares and its rankings against independent arithmetic."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import FAMILIES, MORE_FAMILIES, byte_tokenizer, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_prune.cli import main
from hf_prune.compose import make_config, needs_text
from hf_prune.errors import BadInputError, RunError
from hf_prune.estimate import estimate_reduction
from hf_prune.pruning import plan_pruning, prune
from hf_prune.reduction import _padded, search_budget
from hf_prune.report import findings
from hf_prune.structure import reduction, transport
from hf_prune.structure.budget import budget_candidates, plan_structure
from hf_prune.structure.depth import block_influence
from hf_prune.structure.groups import MLP, block_shape, find_groups

EVERY = [*FAMILIES, *MORE_FAMILIES]


def reduced(family, ids=None, **options):
    model = tiny_model(family)
    config = make_config({"method": "intra_fusion", "sparsity": 0.25, **options})
    return model, prune(model, config, input_ids=tiny_ids(8, 32) if ids is None else ids)


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "ot"},
        {"fusion": "ot+refit", "importance": "wanda", "fusion_cost": "activations"},
        {"fusion": "refit", "importance": "output", "units": ["mlp", "depth"], "sparsity": 0.5},
    ],
    ids=lambda options: options["fusion"],
)
@pytest.mark.parametrize("family", EVERY)
def test_the_result_is_a_stock_model_of_the_planned_size(family, options, tmp_path):
    before = sum(p.numel() for p in tiny_model(family).parameters())
    model, result = reduced(family, **options)
    structure = result.plan.structure
    removed = before - sum(p.numel() for p in model.parameters())
    assert removed == structure["parameters_before"] - structure["parameters_after"]
    # Within one neuron of every block that is left.
    neuron = find_groups(model, 0, MLP, block_shape(model))[0].parameters_of_a_unit()
    goal = options.get("sparsity", 0.25) * structure["parameters_before"]
    assert abs(removed - goal) <= neuron * len({view.block for view in result.plan.views}) / 2 + 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tiny_ids(2, 16, seed=5)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    # The cache's way through the blocks is another than a whole forward's.
    generated = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False)
    plain = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, plain)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("unit", ["attention", "heads"])
def test_attention_becomes_smaller_where_the_stock_config_can_say_so(family, unit, tmp_path):
    model, result = reduced(family, units=["mlp", unit], sparsity=0.35, fusion="refit", importance="output")
    after = result.plan.structure["after"]
    assert (after["heads"], after["groups"]) == ((2, 1) if unit == "attention" else (2, 2))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        ids = tiny_ids(2, 16)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    # Fewer heads and groups in the cache as well.
    generated = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, loaded.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=False))


def test_a_kind_with_no_share_of_the_budget_keeps_its_units():
    _, result = reduced("llama", units=["mlp", "attention"], budget=["attention=1", "mlp=0"], fusion="none")
    before, after = (result.plan.structure[when] for when in ("before", "after"))
    assert before["width"] == after["width"] and after["groups"] < before["groups"]


def test_equal_neurons_merge_into_one_that_does_the_same(tmp_path):
    """Of a gated MLP: rows that make the two are averaged, what consumes them is summed."""
    model = tiny_model("llama")
    blocks = range(len(model.model.layers))
    width = model.config.intermediate_size
    with torch.no_grad():
        for block in model.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[width // 2 :] = layer.weight[: width // 2]
            block.mlp.down_proj.weight[:, width // 2 :] = block.mlp.down_proj.weight[:, : width // 2]
        ids = tiny_ids(2, 16)
        before = model(ids).logits
        parameters = sum(own.numel() for own in model.model.layers[0].parameters())
        share = 3 * model.config.hidden_size * (width // 2) / parameters
        # Of every pair the first one stays.
        scores = torch.arange(width, 0, -1).float()
        save_file({f"mlp.{block}": scores.clone() for block in blocks}, tmp_path / "scores.safetensors")
        own = {"sparsity": share, "importance": str(tmp_path / "scores.safetensors")}
        prune(model, make_config({"method": "intra_fusion", **own}), input_ids=None)
        assert model.config.intermediate_size == width // 2
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


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


def test_padded_widths_follow_a_saved_plan(tmp_path):
    """As those that `hf-prune sensitivity` suggests, or somebody has edited."""
    plan = plan_pruning(tiny_model("llama"), make_config({"method": "magnitude", "sparsity": 0.5}))
    for view in plan.views:
        view.density = (0.3, 0.6, 0.9)[view.block]
    plan.save(tmp_path / "plan.json")
    options = {"layout": "pad", "allocation": str(tmp_path / "plan.json"), "sparsity": 0.25, "fusion": "none"}
    _, result = reduced("llama", **options)
    widths = result.plan.structure["widths"]
    uniform = plan_structure(tiny_model("llama"), make_config({"method": "intra_fusion", "sparsity": 0.25}))
    assert sum(widths) == 3 * uniform.after.width
    assert widths[0] < widths[1] < widths[2] and abs(widths[1] - 2 * widths[0]) <= 1


def test_block_influence_is_one_minus_the_cosine_of_hidden_states():
    model, ids = tiny_model("llama"), tiny_ids(4, 32)
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    expected = [float((1 - torch.cosine_similarity(a, b, dim=-1)).mean()) for a, b in seen]
    assert np.allclose(block_influence(model, ids).numpy(), expected, atol=1e-5)


def test_depth_alone_leaves_the_other_blocks_as_they_were():
    dense = tiny_model("gemma3")
    model, result = reduced("gemma3", units=["depth"], sparsity=1 / 3, fusion="none")
    (gone,) = result.reduction.removed_blocks
    kept = [block for block in range(3) if block != gone]
    assert model.config.num_hidden_layers == 2
    assert model.config.layer_types == [dense.config.layer_types[block] for block in kept]
    for new, old in enumerate(kept):
        for name, weight in dense.model.layers[old].state_dict().items():
            assert torch.equal(model.model.layers[new].state_dict()[name], weight)


def test_padding_gives_blocks_their_own_widths_and_a_stock_shape(tmp_path):
    model = tiny_model("llama")
    for block, scale in enumerate((0.1, 1.0, 3.0)):
        model.model.layers[block].mlp.down_proj.weight.data *= scale
        model.model.layers[block].mlp.up_proj.weight.data *= scale
    options = {"layout": "pad", "allocation": "global", "sparsity": 0.25, "fusion": "none"}
    result = prune(model, make_config({"method": "intra_fusion", **options}))
    widths = result.plan.structure["widths"]
    assert widths[0] < widths[1] <= widths[2]
    assert sum(widths) == 3 * 28  # what shrinking all alike would leave
    stored = sum(p.numel() for block in model.model.layers for p in block.parameters())
    assert result.plan.structure["parameters_after"] == stored
    for block, width in enumerate(widths):
        columns = model.model.layers[block].mlp.down_proj.weight
        assert columns.shape[1] == max(widths) == model.config.intermediate_size
        assert int((columns != 0).any(dim=0).sum()) == width
    model.save_pretrained(tmp_path)
    ids = tiny_ids(1, 16)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("target", ["block", "model"])
def test_training_the_smaller_blocks_never_ends_worse(target):
    options = {"reconstruct": "block", "reconstruct_passes": 4, "reconstruct_target": target, "fusion": "none"}
    ids = tiny_ids(16, 32)
    _, result = reduced("llama", ids, units=["mlp", "attention"], sparsity=0.35, **options)
    losses = [(outcome.before, outcome.after) for outcome in result.reconstruction.values()]
    assert len(losses) == 3 and all(after <= before for before, after in losses)
    if target == "block":
        assert sum(after < before for before, after in losses) >= 2


def test_an_allocation_that_looks_at_text_can_share_widths_out():
    config = make_config({"method": "intra_fusion", "layout": "pad", "allocation": "owl", "sparsity": 0.25})
    assert needs_text(config)
    result = prune(tiny_model("llama"), config, input_ids=tiny_ids(8, 32))
    assert sum(result.plan.structure["widths"]) == 3 * 28


def test_refitting_lowers_the_output_error_of_the_first_block():
    """The closed form is never worse than dropping on the text that it was fitted to."""
    ids = tiny_ids(16, 32)
    dense = tiny_model("llama")
    errors = {}
    for fusion in ("none", "refit", "ot", "ot+refit"):
        model, _ = reduced("llama", ids, fusion=fusion, importance="output", damping=1e-4)
        with torch.no_grad():
            outputs = [m.model(ids, output_hidden_states=True).hidden_states[1] for m in (dense, model)]
        errors[fusion] = float((outputs[0] - outputs[1]).square().sum())
    assert errors["refit"] < 0.95 * errors["none"]
    assert errors["ot+refit"] < 0.95 * errors["ot"]


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


def test_a_block_that_does_nothing_has_no_influence_even_behind_positions():
    model, ids = tiny_model("gpt2"), tiny_ids(4, 16)
    first = model.transformer.h[0]
    for layer in (first.attn.c_proj, first.mlp.c_proj):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    influence = block_influence(model, ids)
    assert abs(float(influence[0])) < 1e-5 and float(influence[1:].min()) > 1e-3


def test_removing_blocks_leaves_lists_that_are_not_theirs():
    model = tiny_model("qwen3")
    model.config.eos_token_id = [1, 2, 3]
    prune(
        model, make_config({"method": "intra_fusion", "units": ["depth"], "sparsity": 0.33}), input_ids=tiny_ids(4, 16)
    )
    assert model.config.eos_token_id == [1, 2, 3] and len(model.config.layer_types) == 2


def test_gradients_that_overflow_are_said():
    from hf_prune.engine.gradients import loss_gradients

    model = tiny_model("llama")
    model.model.norm.weight.data *= float("inf")
    with pytest.raises(RunError, match="gradients hold NaN or Inf"):
        loss_gradients(model, tiny_ids(2, 16))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.7}, "would leave the MLPs empty"),
        ({"units": ["attention"], "sparsity": 0.9}, "would take all 2 units of attention"),
        ({"units": ["attention", "heads"]}, "choose one of the two"),
        ({"units": ["neurons"]}, "is unknown"),
        ({"units": ["mlp", "depth"], "budget": ["mlp=0.7", "depth=0.7"]}, "must make 1"),
        ({"units": ["mlp"], "budget": ["depth=1"]}, "it names depth"),
        ({"pattern": "2:4", "sparsity": 0.5}, "removes whole units"),
        ({"allocation": "erk"}, "layout to pad"),
        ({"fusion": "melt"}, "fusion: 'melt' is unknown"),
        ({"units": ["depth"], "sparsity": 0.1}, "nothing would go"),
        ({"layout": "pad", "allocation": "plan.json"}, "plan.json"),
        ({"budget": ["search"]}, "name both in units"),
        ({"budget": ["mlp=nan"]}, "must make 1"),
        ({"propagate": False}, "removes whole units"),
        ({"reconstruct": "linear"}, "set fusion to refit"),
        ({"importance": "output", "source_mass": "importance"}, "gives no masses"),
        ({"fusion_target": "kmeans", "fusion_cost": "activations"}, "centres of weights"),
    ],
)
def test_bad_input_is_one_sentence(options, words):
    with pytest.raises(BadInputError, match=words):
        reduced("llama", **options)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (None, "scores.safetensors cannot be read"),
        (torch.ones(48, 2), r"holds \[48, 2\] numbers for mlp.0"),
        (torch.full((48,), float("nan")), "or not finite ones"),
    ],
)
def test_scores_that_are_none_are_refused_before_anything_is_loaded(scores, words, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    if scores is not None:
        save_file({"mlp.0": scores}, tmp_path / "scores.safetensors")
    command = ["plan", "--model_name_or_path", str(tmp_path / "model"), "--method", "intra_fusion", "--fusion", "none"]
    assert main([*command, "--importance", str(tmp_path / "scores.safetensors")]) == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("options", "name", "fuses"),
    [
        ({"units": ["depth"]}, "structured-depth", False),
        ({"units": ["heads"]}, "structured-product", False),
        ({"units": ["mlp", "depth"]}, "intra_fusion", True),
        ({"units": ["attention"], "fusion": "none"}, "structured-product", False),
    ],
)
def test_a_run_is_named_after_what_it_does(options, name, fuses):
    config = make_config({"method": "intra_fusion", "importance": "product", **options})
    said = config.describe_run()
    assert said.name == name and ("optimal transport" in said.summary) == fuses
    assert config.make_reducer().fuses(config.units) == fuses


def test_a_transport_that_is_less_than_was_asked_for_is_said_with_its_numbers(monkeypatch, caplog):
    """Too many units for L1 distances, and too few rounds of sinkhorn."""
    _, plain = reduced("llama", fusion="ot")
    assert plain.reduction.cost == ["weights, L1"] and plain.reduction.converged and not caplog.messages
    monkeypatch.setattr(transport, "MOST_EXACT", 40)
    monkeypatch.setattr(transport, "_ROUNDS", 1)
    seen = []

    def see(cost, source, target, solver):
        plan, error = own(cost, source, target, solver)
        seen.append((cost, error))
        return plan, error

    own = transport.transport
    monkeypatch.setattr(reduction, "transport", see)
    model = tiny_model("llama")
    group = find_groups(model, 0, MLP, block_shape(model))[0]
    rows = [[*(part.read()[unit].flatten() for part in (*group.producers, group.consumer))] for unit in range(48)]
    rows = torch.stack([torch.cat(row) / torch.cat(row).norm() for row in rows])
    config = make_config({"method": "intra_fusion", "sparsity": 0.25, "fusion_solver": "sinkhorn"})
    result = prune(model, config, input_ids=None).reduction
    kept = torch.tensor(result.kept[0]["mlp"])
    assert torch.allclose(seen[0][0], (rows[:, None] - rows[kept]).square().sum(2).sqrt(), atol=2e-3)
    # One round from zero potentials, in the plain domain: the columns' masses are met, then the rows'.
    cost = seen[0][0].double()
    kernel = (-cost / (0.05 * cost.mean())).exp()
    kernel = kernel / kernel.sum(dim=0) / len(kept)
    kernel = kernel / kernel.sum(dim=1, keepdim=True) / 48
    assert seen[0][1] == pytest.approx(float((kernel.sum(dim=0) - 1 / len(kept)).abs().sum()) / 2, rel=1e-3)
    worst = max(error for _, error in seen)
    assert result.marginal_error == worst > 1e-3 and not result.converged
    assert result.cost == ["weights, L2"] and result.solver == ["sinkhorn"]
    assert "between 48 units would take hours here; L2 is taken" in caplog.messages[0]
    assert f"not converge in block 0, {seen[0][1]:.2g} of the mass" in caplog.messages[1]
    told = findings.fused({"structure": result.to_dict()})
    assert "L2, as there were too many" in told and f"{100 * worst:.2f} % of the mass is in the wrong place" in told


@pytest.mark.filterwarnings("ignore:numItermax")
def test_an_exact_transport_that_is_cut_short_is_no_result(monkeypatch):
    monkeypatch.setattr(transport, "_ITERATIONS", 1)
    with pytest.raises(RunError, match=r"fusion_solver: emd of 48 units to \d+ ended before its optimum"):
        reduced("llama", fusion="ot")


@pytest.mark.parametrize(("most", "asked"), [(2, True), (1, False)])
def test_exact_transport_of_any_kind_of_unit_is_known_to_need_a_library_beforehand(most, asked, monkeypatch):
    """Of two key-value groups, where 48 neurons are too many for it."""
    looked = []
    monkeypatch.setattr("hf_prune.reduction.check_installed", lambda: looked.append(True))
    monkeypatch.setattr(transport, "MOST_EXACT", most)
    config = make_config({"method": "intra_fusion", "sparsity": 0.4, "units": ["mlp", "attention"]})
    plan_pruning(tiny_model("llama"), config)
    assert bool(looked) is asked


def test_a_transport_is_foreseen_to_take_about_what_it_took(monkeypatch):
    """The shape of SmolLM2-135M at 20 %: 48 s were measured on two idle cores, 94 are the parts' sum on one."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=128))
    config = make_config({"method": "intra_fusion", "sparsity": 0.2})
    plan = plan_pruning(model, config)
    for threads, seconds in ((2, 48), (1, 94)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        foreseen = estimate_reduction(model, plan, config, 0, 128, "float32", torch.device("cpu"))
        assert 0.6 * seconds < foreseen.seconds < 2 * seconds


def test_earning_back_is_counted_in_decoded_tokens():
    report = {
        "structure": {"solver_seconds": 30.0},
        "efficiency": {"dense": {"decode_tokens_per_second": 20}, "pruned": {"decode_tokens_per_second": 25}},
    }
    # 50 ms a token before, 40 ms after.
    assert findings.earned_back(report).endswith("took 30 s, which 3,000 decoded tokens earn back")
    report["efficiency"]["pruned"]["decode_tokens_per_second"] = 19
    assert findings.earned_back(report).endswith("took 30 s")
    assert findings.earned_back({}) == ""


def test_refitting_takes_time_that_is_counted():
    _, result = reduced("llama", fusion="refit", importance="wanda")
    assert result.reduction.solver_seconds > 0


def test_blocks_that_share_weights_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BadInputError, match="shares its weight"):
        prune(model, make_config({"method": "intra_fusion"}))


def test_a_data_free_recipe_runs_without_text_and_a_second_pruning_is_refused(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    recipe = {"model_name_or_path": str(model), "method": "intra_fusion", "sparsity": 0.2, "eval_efficiency": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "output_dir": str(tmp_path / "out")}))
    assert main(["plan", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert "Neurons an MLP" in capsys.readouterr().out
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml")]) == 0
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert all(row["passed"] for row in report["verification"])
    assert report["structure"]["solver"] == ["emd"] and report["calibration"] is None
    capsys.readouterr()
    command = ["inspect", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png")]
    assert main(command) == 0
    inspected = " ".join(capsys.readouterr().out.split())
    assert "Neurons an MLP 48 32" in inspected and "Together: " in inspected
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} dogs\n" for number in range(900)))
    score = [f"--eval_dataset_name={text}", "--eval_seq_length=32", "--eval_max_windows=2", "--eval_efficiency=false"]
    assert main(["evaluate", str(tmp_path / "out"), *score]) == 0
    assert "Neurons an MLP 48 32" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 of 48 neurons an MLP" in card and "zeros" not in card.split("## Citation")[0].lower()
    capsys.readouterr()
    again = [f"--model_name_or_path={tmp_path / 'out'}", f"--output_dir={tmp_path / 'twice'}"]
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml"), *again]) == 2
    assert "has been pruned before" in capsys.readouterr().err
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml"), "--fusion", "refit", again[1]]) == 2
    assert "needs calibration text" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
