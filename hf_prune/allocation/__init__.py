"""How sparse each layer gets: one rule a file, each a function of shapes, weights or input statistics."""

from __future__ import annotations

from hf_prune.allocation.alpha import AlphaPruning
from hf_prune.allocation.base import Allocation, Uniform
from hf_prune.allocation.erk import ErdosRenyi
from hf_prune.allocation.fcpts import Fcpts
from hf_prune.allocation.fisher import Fisher
from hf_prune.allocation.owl import Owl
from hf_prune.allocation.threshold import Global, LayerwiseL1, LayerwiseL2

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "global": Global,
    "erk": ErdosRenyi,
    "owl": Owl,
    "alpha": AlphaPruning,
    "layerwise_l1": LayerwiseL1,
    "layerwise_l2": LayerwiseL2,
    "fisher": Fisher,
    "fcpts": Fcpts,
}

__all__ = ["ALLOCATIONS", "Allocation"]
