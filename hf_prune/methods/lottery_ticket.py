"""Layerwise lottery tickets: which weights a round of iterative pruning keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_prune.errors import BadInputError
from hf_prune.methods.base import MethodInfo

CONTROLS = ("fresh_initialization", "random_mask")
ON_COLLAPSE = ("stop", "record")


@dataclass
class LotteryTicketConfig:
    """On the importance of layerwise measures in the lottery ticket hypothesis (Vandersmissen & Oramas, 2023).

    Train, score every weight against its own layer, drop the lowest of all layers together, rewind the survivors to
    step `rewind_step`, train again (https://arxiv.org/abs/2302.11244). `min_keep_ratio` and `lamp` are our additions.

    Args:
        importance: `magnitude` |w|; within each layer's unpruned weights `l1` |w| / sum |w|, `l2` w^2 / sum w^2,
            `softmax` exp|w| / sum exp|w|, `minmax` (|w| - min) / (max - min); `lamp`, w^2 over the sum of the layer's
            squares that are not smaller (Lee et al., https://arxiv.org/abs/2010.07611). Within a layer all of them keep
            the largest weights; they differ in how much each layer keeps.
        rounds: of pruning, each followed by a training; after r of them (1 - pruning_rate)^r of the weights are left.
        pruning_rate: share of the weights left that each round prunes, over all layers together.
        rewind_step: optimizer step that surviving weights, optimizer and learning rate go back to; 0 is the
            initialisation.
        min_keep_ratio: each layer keeps at least this share of its weights, and one; 0 switches the floor off.
        on_collapse: a layer through whose weights no path from input to output is left ends the run (`stop`) or is
            noted (`record`). Paths are known in the families of families.py and in `nn.Sequential`; any other layer has
            collapsed when it has no weight left.
        controls: what is trained beside the tickets of `control_rounds`: `fresh_initialization`, the ticket's mask on
            other initial weights; `random_mask`, as many weights of each layer chosen by chance, rewound like it.
        control_rounds: rounds that get the controls; the last unless given.
        ignore: layers that are never pruned, by name.
        rounds_folder: where rounds are kept, OUTPUT_DIR.rounds unless given; other measures find the dense round there.
    """

    method: str | None = "lottery_ticket"
    importance: str = "magnitude"
    rounds: int = 5
    pruning_rate: float = 0.2
    rewind_step: int = 0
    min_keep_ratio: float = 0.001
    on_collapse: str = "stop"
    controls: list[str] = field(default_factory=list)
    control_rounds: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    rounds_folder: str | None = None

    info = MethodInfo(
        name="lottery_ticket",
        title="Layerwise lottery ticket",
        summary="trains, prunes the weights that matter least to their layer, rewinds the others, and trains again",
        paper="https://arxiv.org/abs/2302.11244",
        paper_title="Considering Layerwise Importance in the Lottery Ticket Hypothesis",
        citation="""@article{vandersmissen2023considering,
  title={Considering Layerwise Importance in the Lottery Ticket Hypothesis},
  author={Benjamin Vandersmissen and Jos{\\'e} Oramas},
  journal={arXiv preprint arXiv:2302.11244},
  year={2023}
}""",
    )

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("method", [self.method], (self.info.name,)),
            ("importance", [self.importance], tuple(MEASURES)),
            ("on_collapse", [self.on_collapse], ON_COLLAPSE),
            ("controls", self.controls, CONTROLS),
        ):
            for word in value:
                if word not in allowed:
                    raise BadInputError(f"{key}: {word!r} is unknown; choose {', '.join(allowed)}.")
        if self.rounds < 1:
            raise BadInputError(f"rounds: {self.rounds} is too few; use 1 or more.")
        if not 0 < self.pruning_rate < 1:
            raise BadInputError(f"pruning_rate: {self.pruning_rate} is outside (0, 1); 0.2 is the paper's.")
        if self.rewind_step < 0:
            raise BadInputError(f"rewind_step: {self.rewind_step} is before the first step; use 0 or more.")
        if not 0 <= self.min_keep_ratio < 1:
            raise BadInputError(f"min_keep_ratio: {self.min_keep_ratio} is outside [0, 1).")
        if self.min_keep_ratio > self.kept(self.rounds):
            raise BadInputError(
                f"min_keep_ratio: {self.min_keep_ratio} is more than the {self.kept(self.rounds):.4g} that "
                f"{self.rounds} rounds leave; lower it, rounds or pruning_rate."
            )
        for text in self.control_rounds:
            if not text.isdigit() or not 1 <= int(text) <= self.rounds:
                raise BadInputError(f"control_rounds: {text!r} is no round; they are numbered 1 to {self.rounds}.")

    def kept(self, number: int) -> float:
        """Share of the weights that are left after so many rounds."""
        return (1 - self.pruning_rate) ** number

    def wants_controls(self, number: int) -> bool:
        """Whether a round's ticket gets its controls."""
        wanted = [int(text) for text in self.control_rounds] or [self.rounds]
        return bool(self.controls) and number in wanted


def _lamp(magnitudes: Tensor) -> Tensor:
    squares, order = magnitudes.square().sort(stable=True)
    tail = squares.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).index_copy_(0, order, squares / tail.clamp(min=torch.finfo(tail.dtype).tiny))


def _minmax(magnitudes: Tensor) -> Tensor:
    low, high = magnitudes.min(), magnitudes.max()
    # Weights of one size, or a single one: none is more important than another, and all are the layer's largest.
    return (magnitudes - low) / (high - low) if high > low else torch.ones_like(magnitudes)


def _share(values: Tensor) -> Tensor:
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)


MEASURES = {
    "magnitude": lambda magnitudes: magnitudes,
    "l1": _share,
    "l2": lambda magnitudes: _share(magnitudes.square()),
    "softmax": lambda magnitudes: magnitudes.softmax(0),
    "minmax": _minmax,
    "lamp": _lamp,
}


def next_masks(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], importance: str, kept: float, floor: float
) -> tuple[dict[str, Tensor], list[str]]:
    """The masks of the next round, and the layers that keep more than their scores would have kept, by the floor.

    The `round(kept x all)` best scores of all layers together stay, exactly; of equal ones those of the earlier layer.

    Args:
        weights: trained, by name, of any shape.
        masks: bool, of the same names and shapes; only weights inside can stay.
        importance: one of `MEASURES`.
        kept: share of ALL weights that stay.
        floor: each layer keeps at least this share of its weights, and one; no floor where it is 0.

    Raises:
        BadInputError: a weight is NaN.
    """
    alive: dict[str, Tensor] = {}
    scores, by_floor = [], []
    for name, weight in weights.items():
        alive[name] = masks[name].reshape(-1).nonzero().squeeze(1)
        magnitudes = weight.detach().reshape(-1)[alive[name]].abs().double()
        if bool(magnitudes.isnan().any()):
            raise BadInputError(f"{name}: holds NaN, so that its weights have no order; lower learning_rate.")
        own = MEASURES[importance](magnitudes) if len(magnitudes) else magnitudes
        scores.append(own)
        held_back = torch.zeros(len(own), dtype=torch.bool)
        held_back[magnitudes.argsort(descending=True, stable=True)[: _floor_of(masks[name].numel(), floor)]] = True
        by_floor.append(held_back)
    count = round(kept * sum(mask.numel() for mask in masks.values()))
    stays = _largest(scores, by_floor, count)
    without_floor = _largest(scores, [torch.zeros_like(own) for own in by_floor], count) if floor else stays
    result, held = {}, []
    for (name, places), own, free in zip(alive.items(), stays, without_floor, strict=True):
        mask = torch.zeros(masks[name].numel(), dtype=torch.bool)
        mask[places[own]] = True
        result[name] = mask.reshape(masks[name].shape)
        if int(own.sum()) > int(free.sum()):
            held.append(name)
    return result, held


def _largest(scores: list[Tensor], first: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """Where the largest `count` of all scores together are, by list entry; those that are marked as `first` lead."""
    order = torch.cat(scores).argsort(descending=True, stable=True)
    order = order[torch.cat(first)[order].argsort(descending=True, stable=True)]
    stays = torch.zeros(len(order), dtype=torch.bool)
    stays[order[:count]] = True
    return stays.split([len(own) for own in scores])


def _floor_of(numel: int, floor: float) -> int:
    """Weights that the floor keeps of a layer."""
    return max(math.ceil(floor * numel - 1e-9), 1) if floor else 0


def check_floor(sizes: Sequence[int], config: LotteryTicketConfig) -> None:
    """Raise BadInputError where the floors of layers of these sizes come to more than the last round leaves."""
    least = sum(_floor_of(size, config.min_keep_ratio) for size in sizes)
    left = round(config.kept(config.rounds) * sum(sizes))
    if least > left:
        raise BadInputError(
            f"min_keep_ratio: a share of {config.min_keep_ratio}, or one weight, of every layer is {least} in all "
            f"and round {config.rounds} leaves {left}; lower rounds or pruning_rate, or set it to 0."
        )


def random_masks(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks that keep as many weights of each layer, chosen by chance."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, mask in masks.items():
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]] = True
        result[name] = flat.reshape(mask.shape)
    return result
