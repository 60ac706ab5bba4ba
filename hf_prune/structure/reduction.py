"""What a structured method decides in one group: which units stay, and how the others are fused into them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_prune.errors import BadInputError
from hf_prune.structure.fusion import Fusion, drop, from_transport
from hf_prune.structure.groups import Group
from hf_prune.structure.importance import IMPORTANCES, Evidence, importance, is_file, least_output_error, most_important
from hf_prune.structure.refit import damped
from hf_prune.structure.transport import (
    activation_cost,
    centroids,
    cost_norm,
    features,
    solver_for,
    transport,
    weight_cost,
)

FUSIONS = ("none", "ot", "ot+refit", "refit")


@dataclass(frozen=True)
class Reducer:
    """Intra-Fusion's steps with their options; see `IntraFusionConfig`, which fills and documents them."""

    fusion: str
    importance: str
    fusion_target: str
    fusion_cost: str
    source_mass: str
    target_mass: str
    normalization: str
    fusion_solver: str
    damping: float
    seed: int

    #: Units of these kinds are too few, or too coarse, for a transport to say anything: they are dropped.
    indivisible: ClassVar[frozenset[str]] = frozenset({"heads", "depth"})

    @property
    def transports(self) -> bool:
        """Whether units that can be are fused."""
        return self.fusion in ("ot", "ot+refit")

    def fuses(self, units: Iterable[str]) -> bool:
        """Whether any of these kinds of units is fused."""
        return self.transports and bool(set(units) - self.indivisible)

    @property
    def refits(self) -> bool:
        """Whether the consumer is fitted to the dense outputs."""
        return self.fusion in ("refit", "ot+refit")

    @property
    def statistics(self) -> frozenset[str]:
        """What must be known of the consumer's inputs."""
        needed = frozenset() if is_file(self.importance) else IMPORTANCES[self.importance]
        if self.refits or (self.transports and self.fusion_cost == "activations"):
            needed |= {"gram"}
        return needed

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss must be differentiated once on the calibration text."""
        return self.importance == "taylor"

    def reduce(self, group: Group, count: int, evidence: Evidence) -> Fusion:
        """The fusion of a group's units into `count`."""
        statistics = evidence.statistics
        gram = statistics.gram if statistics is not None else None
        if self.importance == "output":
            assert gram is not None
            kept, scores = least_output_error(group, damped(gram, self.damping), count), None
        else:
            scores = importance(self.importance, group, evidence)
            kept = most_important(scores, count)
        if not self.transports or group.kind in self.indivisible or count == group.units:
            return drop(kept)
        every = features(group) if self.fusion_cost == "weights" or self.fusion_target == "kmeans" else None
        if self.fusion_cost == "activations":
            assert gram is not None
            cost = activation_cost(group, gram, kept)
        else:
            assert every is not None
            target = every[kept] if self.fusion_target == "top" else centroids(every, kept, count, self.seed)
            cost = weight_cost(every, target)
        if scores is not None and "importance" in (self.source_mass, self.target_mass) and float(scores.max()) <= 0:
            raise BadInputError(
                f"importance: no unit of {group.kind} in block {group.block} has a score above 0, and masses are in "
                "proportion to them; give others, or set both masses to uniform."
            )
        ones = torch.ones(group.units, device=cost.device)
        mass = scores.to(cost.device).clamp(min=1e-6 * float(scores.max())) if scores is not None else ones
        solver = self.solver(group.units)
        if solver == "nearest" and self.fusion_target == "top":
            # What stays goes to itself, though another that stays be just as near.
            cost[kept.to(cost.device), torch.arange(count, device=cost.device)] = -1
        moved, error = transport(
            cost,
            mass if self.source_mass == "importance" else ones,
            (mass if self.target_mass == "importance" else ones)[kept],
            solver,
        )
        return replace(from_transport(moved, kept.to(cost.device), self.normalization), marginal_error=error)

    def solver(self, units: int) -> str:
        """Which transport solver runs for a group of so many units."""
        return solver_for(self.fusion_solver, units)

    def cost(self, units: int, device: torch.device) -> str:
        """Which distances a transport of so many units goes by."""
        return "activations" if self.fusion_cost == "activations" else f"weights, L{cost_norm(units, device)}"


def consumer_columns(group: Group, kept: Tensor) -> Tensor:
    """The input features of the consumer that the kept units are, int64, ascending."""
    size = group.consumer.size
    return (group.consumer.offset + kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
