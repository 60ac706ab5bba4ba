"""What becomes of a model whose units go."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_prune.engine.results import BlockOutcome


@dataclass
class ReduceResult:
    """What became of each block.

    Attributes:
        removed_blocks: the numbers of the blocks that went, as they were.
        kept: block (numbered anew) -> kind -> numbers of the units that new ones took the place of; those of "heads"
            are counted through all key-value groups.
        fused: new units that more than one old unit went into, share of all.
        solver: the transport solvers that ran.
        cost: the distances that they went by.
        marginal_error: the largest of `sinkhorn`, share of the mass; see `transport`.
        converged: it was never above the tolerance.
        solver_seconds: spent in choosing, fusing and refitting: importances, costs, transports, least squares.
        forward_passes: over the calibration set.
        reconstruction: outcome of each block's training by its number, where there was one.
        shares: of fused units in each kind of each block.
        earlier_seconds: what sessions before this one took for blocks that count, where the walk was cut.
        saving_seconds: what it took to keep the state between blocks, earlier sessions included.
    """

    removed_blocks: list[int] = field(default_factory=list)
    kept: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    fused: float = 0.0
    solver: list[str] = field(default_factory=list)
    cost: list[str] = field(default_factory=list)
    marginal_error: float = 0.0
    converged: bool = True
    solver_seconds: float = 0.0
    forward_passes: float = 0.0
    reconstruction: dict[int, BlockOutcome] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    earlier_seconds: float = 0.0
    saving_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Become what `to_dict` told of."""
        for name, value in values.items():
            setattr(self, name, value)
        self.kept = {int(index): own for index, own in values["kept"].items()}
        self.reconstruction = {int(index): BlockOutcome(**own) for index, own in values["reconstruction"].items()}
