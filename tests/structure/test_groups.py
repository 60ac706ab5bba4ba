"""The description of each family, by what it must preserve: any order of interchangeable units is the same function."""

import pytest
import torch
from tiny import FAMILIES, MORE_FAMILIES, tiny_ids, tiny_model

from hf_prune.errors import BadInputError
from hf_prune.families import find_family
from hf_prune.structure.fusion import Fusion, drop
from hf_prune.structure.groups import ATTENTION, HEADS, MLP, block_shape, find_groups, pad_units, rewrite

EVERY = [*FAMILIES, *MORE_FAMILIES]


def scrambled(family):
    """A tiny model whose norms, biases and weights all differ from their initial values."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def permuted(units, seed):
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    one = torch.ones(units)
    return Fusion(order, torch.arange(units), order, one, one)


@pytest.mark.parametrize("kind", [MLP, ATTENTION, HEADS])
@pytest.mark.parametrize("family", EVERY)
def test_permuting_the_units_leaves_the_logits(family, kind):
    model, ids = scrambled(family), tiny_ids(2, 32)
    with torch.no_grad():
        before = model(ids).logits
        for block in range(3):
            groups = find_groups(model, block, kind, block_shape(model))
            fusions = [permuted(group.units, 10 * block + number) for number, group in enumerate(groups)]
            rewrite(groups, fusions, keep=frozenset())
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_a_wrong_order_would_be_noticed(family):
    """The test above can fail: permuting producers alone changes the logits."""
    model, ids = scrambled(family), tiny_ids(2, 32)
    with torch.no_grad():
        before = model(ids).logits
        group = find_groups(model, 1, MLP, block_shape(model))[0]
        columns = group.consumer.view.read()
        rewrite([group], [permuted(group.units, 3)])
        group.consumer.view.write(columns)
        assert not torch.allclose(before, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("family", EVERY)
def test_dropping_dead_neurons_and_padding_change_nothing(family):
    model, ids = scrambled(family), tiny_ids(2, 32)
    width = block_shape(model).width
    with torch.no_grad():
        group = find_groups(model, 1, MLP, block_shape(model))[0]
        dead = torch.arange(3, 20)
        columns = group.consumer.view.read()
        columns[:, dead] = 0
        group.consumer.view.write(columns)
        before = model(ids).logits
        kept = torch.tensor([unit for unit in range(width) if unit not in dead])
        rewrite([group], [drop(kept)])
        assert group.consumer.view.shape[1] == len(kept)
        assert torch.allclose(before, model(ids).logits, atol=1e-5)
        shape = block_shape(model)
        group = find_groups(model, 1, MLP, type(shape)(len(kept), shape.heads, shape.groups, shape.head_size))[0]
        pad_units(group, width)
        assert group.consumer.view.shape[1] == width
        assert torch.allclose(before, model(ids).logits, atol=1e-5)


def test_units_of_a_group_count_all_their_parameters():
    model = tiny_model("llama")
    shape = block_shape(model)
    block = model.model.layers[0]
    mlp = find_groups(model, 0, MLP, shape)[0]
    assert mlp.parameters_of_a_unit() * mlp.units == sum(p.numel() for p in block.mlp.parameters())
    attention = find_groups(model, 0, ATTENTION, shape)[0]
    assert attention.parameters_of_a_unit() * attention.units == sum(p.numel() for p in block.self_attn.parameters())
    # GPT-2 has biases on the producers' side, which go with the unit, and one on the consumer's, which stays.
    model = tiny_model("gpt2")
    mlp = find_groups(model, 0, MLP, block_shape(model))[0]
    own = sum(p.numel() for p in model.transformer.h[0].mlp.parameters()) - 32
    assert mlp.parameters_of_a_unit() * mlp.units == own


def test_an_undescribed_family_is_refused_with_the_way_out():
    with pytest.raises(BadInputError, match=r"falcon .*families\.py"):
        find_family("falcon")
