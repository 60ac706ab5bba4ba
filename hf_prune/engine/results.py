"""What becomes of a model in a walk: by weight matrix, and in all."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ViewResult:
    """What became of one weight matrix.

    Attributes:
        kept: weights that are not zero afterwards, counted in the model's dtype.
        zeros_before: weights that were zero before.
        error: relative output error ||(W' - W) X||^2 / ||W X||^2 on the calibration inputs; None without a Gram matrix,
            and where the block was trained afterwards.
        change: how far a weight was moved, root mean square, as the output felt it: sqrt(error) times the weights' own
            root mean square; without a Gram matrix that of W' - W.
        scarce: an expert that saw too few calibration tokens: its weights were compared by magnitude.
    """

    name: str
    kept: int
    zeros_before: int
    error: float | None = None
    change: float = 0.0
    scarce: bool = False


@dataclass
class BlockOutcome:
    """Held-out loss before and after a block's training, as a share of the target's own size, and the passes that were
    trained.
    """

    before: float
    after: float
    passes: float
    seconds: float


@dataclass
class WalkResult:
    """Results by view, in the plan's order, and the forward passes over the calibration set that they took.

    Attributes:
        reconstruction: outcome of each block's training by the block's index.
        earlier_seconds: what sessions before this one took for blocks that count, where the walk was cut.
        saving_seconds: what it took to keep the state between blocks, earlier sessions included.
    """

    views: list[ViewResult] = field(default_factory=list)
    forward_passes: float = 0.0
    reconstruction: dict[int, BlockOutcome] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    saving_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Become what `to_dict` told of."""
        self.views = [ViewResult(**view) for view in values["views"]]
        self.reconstruction = {int(index): BlockOutcome(**own) for index, own in values["reconstruction"].items()}
        for name in ("forward_passes", "earlier_seconds", "saving_seconds"):
            setattr(self, name, values[name])
