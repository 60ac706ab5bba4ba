"""Structured pruning end to end on tiny models, its least squares against independent arithmetic."""

import numpy as np
import pytest
import torch
from reduced import reduced
from safetensors.torch import save_file
from tiny import FAMILIES, MORE_FAMILIES, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from hf_prune.compose import make_config, needs_text
from hf_prune.engine.gradients import fisher_factors
from hf_prune.pruning import prune
from hf_prune.reduction import mlp_views
from hf_prune.structure.depth import block_influence
from hf_prune.structure.groups import MLP, block_shape, find_groups

EVERY = [*FAMILIES, *MORE_FAMILIES]


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


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32), ("phi3", torch.float32)],
)
def test_fisher_shares_widths_out_by_what_each_neuron_costs_the_loss(family, dtype):
    """As many neurons stay in a block as it has of the costliest of all (their costs: tests/engine/test_fisher.py)."""
    model, ids = tiny_model(family, dtype), tiny_ids(8, 32)
    views = mlp_views(model, consumers=True)
    for view, scale in zip(views, (0.7, 1.0, 1.5), strict=True):
        view.parameter.data *= scale
    costs = [own.columns.tolist() for own in fisher_factors(model, views, ids, columns=True).values()]
    options = {"layout": "pad", "allocation": "fisher", "sparsity": 0.25, "fusion": "none"}
    result = prune(model, make_config({"method": "intra_fusion", **options}), input_ids=ids)
    widths = result.plan.structure["widths"]
    least = sorted((cost for own in costs for cost in own), reverse=True)[sum(widths) - 1]
    counted = [sum(cost >= least for cost in own) for own in costs]
    assert max(widths) > min(widths)
    assert max(abs(a - b) for a, b in zip(widths, counted, strict=True)) <= 1


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
