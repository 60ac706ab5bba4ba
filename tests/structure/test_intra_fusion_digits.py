"""Intra-Fusion on small networks that read digits: what the benchmark's arithmetic must keep, and what it shows."""

from statistics import mean

import pytest
import torch
from digit_networks import (
    HELD_OUT,
    accuracy,
    fold,
    fuse_networks,
    intra_fusion,
    layers,
    load,
    mlp,
    prune_everywhere,
    rewrite,
    sides,
    train,
    vgg,
)
from torch import nn

from hf_prune.structure.fusion import Fusion, drop

SEEDS = (0, 1, 2)


def uneven(make, seed=0):
    """A network, not trained, whose BatchNorms are no identity."""
    torch.manual_seed(seed)
    network = make()
    for part in network:
        if isinstance(part, nn.BatchNorm2d):
            for own in (part.weight, part.bias, part.running_mean, part.running_var):
                own.data = torch.rand_like(own) + 0.5
    return network.eval()


@pytest.fixture(scope="module")
def images():
    return load(0)[1].images[:50]


def test_digits_are_split_into_two_parts():
    training, held_out = load(0)
    assert len(held_out) == HELD_OUT and len(training) + len(held_out) == 1797
    assert held_out.images.shape == (HELD_OUT, 1, 8, 8)
    assert float(held_out.images.min()) == 0 and float(held_out.images.max()) == 1


@torch.no_grad()
def test_folding_batch_norm_keeps_the_function(images):
    network = uneven(vgg)
    folded = fold(network)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded)
    assert torch.allclose(folded(images), network(images), atol=1e-5)
    convolution, norm = network[0], network[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(folded[0].weight, convolution.weight * scale[:, None, None, None])
    assert torch.allclose(folded[0].bias, norm.bias - norm.running_mean * scale)


@torch.no_grad()
@pytest.mark.parametrize("make", [mlp, vgg])
def test_permuting_any_group_and_dropping_its_dead_units_keeps_the_function(make, images):
    network = fold(uneven(make))
    before = network(images)
    for group in range(len(layers(network)) - 1):
        units = sides(network, group)[0].shape[0]
        order = torch.randperm(units, generator=torch.Generator().manual_seed(group))
        one = torch.ones(units)
        network = rewrite(network, group, Fusion(order, torch.arange(units), order, one, one))
        assert torch.allclose(network(images), before, atol=1e-4)
        alive = torch.arange(0, units, 2)
        producer = layers(network)[group]
        producer.weight[1::2], producer.bias[1::2] = 0, 0
        before = network(images)
        network = rewrite(network, group, drop(alive))
        assert sides(network, group)[0].shape[0] == len(alive)
        assert torch.allclose(network(images), before, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [mlp, vgg])
def test_fusing_with_a_permuted_copy_is_the_network_itself(make, images):
    network = fold(uneven(make))
    other = network
    for group in range(len(layers(network)) - 1):
        units = sides(network, group)[0].shape[0]
        order, one = torch.randperm(units, generator=torch.Generator().manual_seed(group)), torch.ones(units)
        other = rewrite(other, group, Fusion(order, torch.arange(units), order, one, one))
    fused = fuse_networks(network, other, images)
    for own, its in zip(network.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(own, its, atol=1e-6)


def test_pruning_everywhere_leaves_the_planned_widths():
    pruned = prune_everywhere(fold(uneven(vgg)), 0.6, "preserve")
    assert [layer.weight.shape[0] for layer in layers(pruned)] == [13, 13, 26, 26, 10]


@pytest.mark.slow
def test_fusing_beats_dropping_in_a_late_convolution_with_batch_norm():
    """The paper's claim of convolutions, at four fifths; the benchmark finds 16 points over five networks."""
    gains = []
    for seed in SEEDS[:2]:
        training, held_out = load(seed)
        torch.manual_seed(seed)
        network = vgg()
        train(network, training, 600, 0.05, seed)
        network = fold(network)
        dropped, fused = (accuracy(intra_fusion(network, 3, 13, rule), held_out) for rule in ("", "preserve"))
        assert fused > 90
        gains.append(fused - dropped)
    assert mean(gains) > 4


def test_fusing_beats_dropping_where_nine_tenths_of_a_layer_go():
    """The paper's claim, in the mean over networks; the benchmark finds 18 and 13 points over five of them."""
    dropped, fused, dense = {0: [], 1: []}, {0: [], 1: []}, []
    for seed in SEEDS:
        training, held_out = load(seed)
        torch.manual_seed(seed)
        network = mlp()
        train(network, training, 600, 0.05, seed)
        dense.append(accuracy(network, held_out))
        for group in (0, 1):
            dropped[group].append(accuracy(intra_fusion(network, group, 26, ""), held_out))
            fused[group].append(accuracy(intra_fusion(network, group, 26, "preserve"), held_out))
    assert mean(dense) > 90
    for group in (0, 1):
        assert mean(fused[group]) > mean(dropped[group]) + 5
        assert mean(fused[group]) > mean(dense) - 10
