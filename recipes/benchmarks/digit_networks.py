"""Two small networks that read handwritten digits, and what Intra-Fusion does to them: fewer units, or one of two."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_prune.structure.fusion import Fusion, drop, from_transport
from hf_prune.structure.importance import l1, most_important
from hf_prune.structure.transport import transport, unit_features, weight_cost

HELD_OUT, BATCH, EDGE, CLASSES = 450, 64, 8, 10


@dataclass(frozen=True)
class Digits:
    """Some of scikit-learn's 8 x 8 digits: images, float32 [digits, 1, 8, 8] from 0 to 1, labels, int64 [digits]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice) -> Digits:
        return Digits(self.images[which], self.labels[which])


def load(seed: int) -> tuple[Digits, Digits]:
    """(training, held-out) digits, shuffled."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    every = Digits(images[order], torch.tensor(digits.target)[order])
    return every[HELD_OUT:], every[:HELD_OUT]


def mlp(width: int = 256) -> nn.Sequential:
    """Three hidden layers."""
    sizes = [EDGE * EDGE, width, width, width]
    hidden = [part for size in pairwise(sizes) for part in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES))


def vgg() -> nn.Sequential:
    """Four convolutions, each with BatchNorm, and a pooling after every second."""

    def convolution(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *convolution(1, 32), *convolution(32, 32), nn.MaxPool2d(2),
        *convolution(32, 64), *convolution(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4, CLASSES),
    )  # fmt: skip


def train(
    network: nn.Sequential,
    digits: Digits,
    steps: int,
    rate: float,
    seed: int,
    look: Callable[[int], None] | None = None,
    every: int = 10,
) -> float:
    """Train in place with a rate that falls to nothing; the seconds it took.

    Args:
        look: called with the number of steps done, before the first and after every `every`; its time does not count.
    """
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    seconds, order = 0.0, torch.empty(0, dtype=torch.int64)
    for step in range(steps + 1):
        if look is not None and step % every == 0:
            network.eval()
            look(step)
            network.train()
        if step == steps:
            break
        start = time.perf_counter()
        if len(order) < BATCH:
            order = torch.randperm(len(digits), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        nn.functional.cross_entropy(network(digits.images[batch]), digits.labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - start
    network.eval()
    return seconds


@torch.no_grad()
def accuracy(network: nn.Sequential, digits: Digits) -> float:
    """Share of digits said right, in %."""
    return 100 * float((network(digits.images).argmax(dim=1) == digits.labels).double().mean())


def fold(network: nn.Sequential) -> nn.Sequential:
    """The network with each BatchNorm folded into the convolution before it: w * gamma / sqrt(var), bias likewise."""
    parts: list[nn.Module] = []
    for part in copy.deepcopy(network).eval():
        if isinstance(part, nn.BatchNorm2d):
            parts[-1] = nn.utils.fuse_conv_bn_eval(parts[-1], part)
        else:
            parts.append(part)
    return nn.Sequential(*parts)


def layers(network: nn.Sequential) -> list[nn.Module]:
    """The layers with weights. Group k is made by layer k's outputs and consumed by the inputs of the one behind it."""
    return [part for part in network if isinstance(part, nn.Linear | nn.Conv2d)]


def sides(network: nn.Sequential, group: int) -> list[Tensor]:
    """A group's weights by unit, [units, 1, weights]: of the layer that makes the units and the one that consumes them.

    A linear layer behind a flattened image reads a unit once for each of its pixels.
    """
    producer, consumer = layers(network)[group : group + 2]
    units = producer.weight.shape[0]
    return [side.detach().reshape(units, 1, -1) for side in (producer.weight, consumer.weight.transpose(0, 1))]


def rewrite(network: nn.Sequential, group: int, fusion: Fusion) -> nn.Sequential:
    """A copy whose group has the fusion's new units."""
    new = copy.deepcopy(network)
    producer, consumer = layers(new)[group : group + 2]
    weight, (_, columns) = consumer.weight, sides(new, group)
    producer.weight = nn.Parameter(fusion.produce(producer.weight.detach()))
    producer.bias = nn.Parameter(fusion.produce(producer.bias.detach()))
    consumed = fusion.consume(columns).reshape(-1, weight.shape[0], *weight.shape[2:])
    consumer.weight = nn.Parameter(consumed.transpose(0, 1).contiguous())
    return new


def intra_fusion(
    network: nn.Sequential, group: int, count: int, normalization: str, solver: str = "emd"
) -> nn.Sequential:
    """A copy whose group has `count` units, as published but for what is named.

    Args:
        network: without BatchNorm.
        normalization: of the fusion; "" drops the other units.
    """
    own = sides(network, group)
    kept = most_important(l1(own), count)
    if not normalization:
        return rewrite(network, group, drop(kept))
    every = unit_features(own)
    plan, _ = transport(weight_cost(every, every[kept]), torch.ones(len(every)), torch.ones(count), solver)
    return rewrite(network, group, from_transport(plan, kept, normalization))


def prune_everywhere(network: nn.Sequential, removed: float, normalization: str) -> nn.Sequential:
    """A copy with that share of every group's units removed, the groups in order."""
    for group in range(len(layers(network)) - 1):
        units = layers(network)[group].weight.shape[0]
        network = intra_fusion(network, group, units - round(removed * units), normalization)
    return network


def fuse_networks(one: nn.Sequential, other: nn.Sequential, images: Tensor) -> nn.Sequential:
    """The mean of two networks of equal sizes, once the other's units stand in the order of the one's.

    Layer by layer, by exact transport of activations on the images (OTFusion, Singh and Jaggi, 2020). Between equally
    many units of equal mass it is a permutation.
    """
    for group in range(len(layers(one)) - 1):
        activations = [_outputs(network, group, images) for network in (other, one)]
        units = len(activations[0])
        plan, _ = transport(torch.cdist(*activations), torch.ones(units), torch.ones(units), "emd")
        other = rewrite(other, group, from_transport(plan, torch.arange(units), "preserve"))
    mean = copy.deepcopy(one)
    for own, its in zip(mean.parameters(), other.parameters(), strict=True):
        own.data = (own.data + its.data) / 2
    return mean


@torch.no_grad()
def _outputs(network: nn.Sequential, group: int, images: Tensor) -> Tensor:
    """What a group's units put out before ReLU, [units, values]."""
    last = layers(network)[group]
    for part in network:
        images = part(images)
        if part is last:
            break
    return images.transpose(0, 1).flatten(1)
