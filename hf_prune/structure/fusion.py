"""Fewer units out of many: what a fusion is, and the transport that finds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NORMALIZATIONS = ("preserve", "code", "target")


@dataclass(frozen=True)
class Fusion:
    """A sparse linear map from n units to m, one scale for what makes the units and one for what consumes them.

    Attributes:
        kept: int64 [m], the unit that each new one took its place.
        target, source: int64 [k], pairs of a new and an old unit.
        produced, consumed: float32 [k], weight of the old unit's rows and of its columns in the new one's.
        marginal_error: of the transport behind it, share of its mass.
    """

    kept: Tensor
    target: Tensor
    source: Tensor
    produced: Tensor
    consumed: Tensor
    marginal_error: float = 0.0

    def produce(self, features: Tensor) -> Tensor:
        """Rows of the new units, [m, ...], from those of the old, [n, ...]."""
        return self._apply(features, self.produced)

    def consume(self, features: Tensor) -> Tensor:
        """Columns of the new units, [m, ...], from those of the old, [n, ...]."""
        return self._apply(features, self.consumed)

    def to(self, device: torch.device) -> Fusion:
        """The same on a device."""
        names = ("kept", "target", "source", "produced", "consumed")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def _apply(self, features: Tensor, weights: Tensor) -> Tensor:
        shape = (-1, *[1] * (features.ndim - 1))
        own = weights.view(shape) * features[self.source]
        new = features.new_zeros(len(self.kept), *features.shape[1:])
        return new.index_add_(0, self.target, own)


def drop(kept: Tensor) -> Fusion:
    """The fusion that keeps some units as they are and drops the others; `kept` is int64 [m], ascending."""
    place, one = torch.arange(len(kept), device=kept.device), torch.ones(len(kept), device=kept.device)
    return Fusion(kept, place, kept, one, one)


def from_transport(transport: Tensor, kept: Tensor, normalization: str) -> Fusion:
    """Turn a transport map into a fusion (Intra-Fusion, algorithm 2 and its prose; see intra-fusion's `normalization`).

    Args:
        transport: [n, m], mass that goes from each old unit to each new one.
        kept: int64 [m].
        normalization: "preserve" averages what makes the units (divides by the target's mass) and sums what consumes
            them (divides by the source's mass), so that merging equal units changes nothing, ours; "code" divides both
            by the source's mass, as the paper's algorithm 2 and the released code do; "target" divides both by the
            target's, as the paper's prose says.
    """
    source, target = transport.nonzero(as_tuple=True)
    mass = transport[source, target]
    by_source = mass / transport.sum(dim=1)[source]
    by_target = mass / transport.sum(dim=0)[target]
    produced = by_source if normalization == "code" else by_target
    consumed = by_target if normalization == "target" else by_source
    return Fusion(kept, target, source, produced.float(), consumed.float())
