"""Intra-Fusion's transport between all units and those that stay: features, cost, masses, exact or bounded solvers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_prune.errors import BadInputError, RunError
from hf_prune.structure.groups import Group

COSTS = ("weights", "activations")
MASSES = ("uniform", "importance")
SOLVERS = ("auto", "emd", "sinkhorn", "nearest")
TARGETS = ("top", "kmeans")
# Exact transport takes cubic time: 4,096 units take POT about a minute, 14,000 would take the better part of an hour.
MOST_EXACT = 4096
# Steps of `emd` at most; 4,096 units take some 100,000.
_ITERATIONS = 10_000_000
# Entropy of `sinkhorn`, as a share of the mean cost.
_ENTROPY = 0.05
# Rounds of `sinkhorn`, and the share of the mass that may then be in the wrong place.
MOST_ROUNDS, TOLERANCE = 1000, 1e-3
# Targets that a unit of `sinkhorn` goes to at most.
_SPREAD = 8


def features(group: Group) -> Tensor:
    """The units of a language model's block by their weights, float32 [units, features].

    Producers' inputs are scaled by the gain of the normalisation in front, so that features of all layers compare.
    """
    rows = [stretch.read() * group.gain.to(stretch.view.parameter.device) for stretch in group.producers]
    return unit_features([*rows, group.consumer.read()])


def unit_features(sides: Sequence[Tensor]) -> Tensor:
    """A unit's weights in one row, of length one: float32 [units, features] (the paper's section 3, step 3).

    Args:
        sides: each [units, size, other]: a layer's rows, or columns, by unit.
    """
    return torch.nn.functional.normalize(torch.cat([side.flatten(1) for side in sides], dim=1), dim=1)


def weight_cost(every: Tensor, target: Tensor) -> Tensor:
    """Distances between features, float32 [n, m], in the norm of `cost_norm`."""
    return torch.cdist(every, target, p=cost_norm(len(every), every.device))


def cost_norm(units: int, device: torch.device) -> int:
    """The norm of `weights` costs: L1 as published, L2 (Euclidean) where that would take hours.

    A matrix product gives the latter; the former costs n x m x features absolute differences, about 4 s on a core for
    1,536 neurons of three 576-wide layers and an hour for a block of an 8B model. GPUs take either.
    """
    return 1 if units <= MOST_EXACT or device.type == "cuda" else 2


def activation_cost(group: Group, gram: Tensor, kept: Tensor) -> Tensor:
    """Distances between what units put out on the calibration text, each of length one: float32 [n, m]. Ours.

    A unit is a direction in the space of tokens; of units with several features the mean cosine counts.
    """
    start, stop, size = group.consumer.offset, group.consumer.stop, group.consumer.size
    own = gram[start:stop, start:stop]
    scale = own.diagonal().clamp(min=torch.finfo(own.dtype).tiny).rsqrt()
    cosine = own * scale * scale[:, None]
    if size > 1:
        blocks = cosine.reshape(group.units, size, group.units, size)
        cosine = blocks.diagonal(dim1=1, dim2=3).mean(dim=2)
    return (2 - 2 * cosine[:, kept]).clamp(min=0).sqrt().float()


def centroids(every: Tensor, kept: Tensor, count: int, seed: int) -> Tensor:
    """k-means centres as the target's features, [m, features], started from the kept units (an option of the paper)."""
    from scipy.cluster.vq import kmeans2

    centres, _ = kmeans2(every.double().cpu().numpy(), every[kept].double().cpu().numpy(), minit="matrix", rng=seed)
    return torch.from_numpy(centres).to(every)


def solver_for(name: str, units: int) -> str:
    """What `auto` stands for."""
    if name != "auto":
        return name
    return "emd" if units <= MOST_EXACT else "nearest"


def transport(cost: Tensor, source: Tensor, target: Tensor, solver: str) -> tuple[Tensor, float]:
    """Mass that goes from each unit to each target, [n, m], on the cost's device; the marginal error of `sinkhorn`.

    The latter is the share of the mass that comes from or goes to the wrong place when the solver ends, before what it
    spread is gathered; 0.0 for the others, which end with the masses that they were given.

    Args:
        cost: [n, m].
        source, target: [n] and [m], positive; each is scaled to one.
        solver: "emd", POT's exact network simplex; "sinkhorn", POT's, with a little entropy; "nearest", the closed form
            where the target's mass is free: every unit goes to the nearest target.

    Raises:
        BadInputError: POT is not installed.
        RunError: emd did not come to its optimum.
    """
    source, target = source / source.sum(), target / target.sum()
    if solver == "nearest":
        plan = torch.zeros_like(cost)
        plan[torch.arange(len(cost), device=cost.device), cost.argmin(dim=1)] = source.to(cost)
        return plan, 0.0
    check_installed()
    import ot

    if solver == "emd":
        own = (source.double().cpu().numpy(), target.double().cpu().numpy(), cost.double().cpu().numpy())
        plan, log = ot.emd(*(part / part.sum() for part in own[:2]), own[2], numItermax=_ITERATIONS, log=True)
        if log["warning"]:
            raise RunError(
                f"fusion_solver: emd of {cost.shape[0]} units to {cost.shape[1]} ended before its optimum "
                f"({' '.join(str(log['warning']).split())}); take sinkhorn or nearest."
            )
        return torch.from_numpy(plan).to(cost), 0.0
    source, target = source.to(cost), target.to(cost)
    entropy = _ENTROPY * float(cost.mean())
    # POT's own warning says neither where nor how much; its threshold is out of float32's reach.
    plan = ot.bregman.sinkhorn_log(source, target, cost, entropy, numItermax=MOST_ROUNDS, stopThr=1e-7, warn=False)
    error = max(float((plan.sum(dim=1) - source).abs().sum()), float((plan.sum(dim=0) - target).abs().sum())) / 2
    # Entropy spreads every unit over all targets: the most of it stays, so that a unit costs a few rows and no matrix.
    most, where = plan.topk(min(_SPREAD, plan.shape[1]), dim=1)
    most *= plan.sum(dim=1, keepdim=True) / most.sum(dim=1, keepdim=True)
    return torch.zeros_like(plan).scatter_(1, where, most), error


def check_installed() -> None:
    """Raise BadInputError, with the command, where POT is missing."""
    if find_spec("ot") is None:
        raise BadInputError("fusion: optimal transport needs POT; run `pip install hf_prune[fusion]`.")
