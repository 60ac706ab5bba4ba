"""Dynamic sparse training: which weights die, which layers get what was freed, and where new ones grow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_prune.errors import BadInputError, RunError
from hf_prune.methods.base import MethodInfo

INITIALIZATIONS = ("uniform", "er")
DEATHS = ("magnitude", "set", "threshold", "global_magnitude")
REDISTRIBUTIONS = ("none", "magnitude", "nonzeros", "momentum")
GROWTHS = ("random", "gradient", "momentum")
# `threshold` begins here, and moves by so much where it drops more or fewer than wanted (the authors' code).
FIRST_THRESHOLD, THRESHOLD_STEP, TOLERANCE = 1e-3, 0.2, 0.02


@dataclass
class DynamicSparseConfig:
    """Sparse from the first step on: a number of weights that never changes, in places that do.

    Every `update_steps` steps some weights die and as many grow, from zero. The parts are those that Lyapunov-spectrum
    hyperpruning searches, on recurrent networks after Selfish-RNN (Liu et al., https://arxiv.org/abs/2101.09048): of
    SET (Mocanu et al., https://arxiv.org/abs/1707.04780), SNFS (Dettmers & Zettlemoyer,
    https://arxiv.org/abs/1907.04840) and RigL (Evci et al., https://arxiv.org/abs/1911.11134).

    Args:
        sparsity: share of the pruned parameters that is zero, from the first step to the last, to the weight.
        initialization: `uniform`, every layer as dense as the others; `er`, in proportion to (in + out) / (in x out),
            at most 1. Places are drawn by chance.
        death: `magnitude`, the smallest weights of each layer; `set`, half of them the smallest positive, half the
            largest negative; `threshold`, all below one that moves until as many die as are wanted;
            `global_magnitude`, the smallest of all layers together (exactly so many: the authors' code comes close).
        death_rate: share of the weights that die in the first update; a cosine brings it to zero with the training.
        redistribution: how the freed number is shared out over layers: `none`, each gets its own back; in proportion
            to the mean |w| that is left (`magnitude`), to the number left (`nonzeros`), to the mean |momentum| of what
            is left (`momentum`). What a full layer cannot take goes to the others.
        growth: `random`; `gradient`, where the dense gradient is largest; `momentum`, where a running mean of it is,
            which takes a copy of the pruned parameters.
        update_steps: optimizer steps from one update to the next; an epoch unless given.
        averaging: the weights' mean since held-out loss stopped falling (SNT-ASGD), masked as they are.
        non_monotone: epochs without a lower held-out loss after which the averaging begins (5 in the authors' code).
        train_dense: a dense twin is trained the same way, to compare with.
        ignore: layers that are never pruned, by name.
        rounds_folder: where trainings are kept, OUTPUT_DIR.rounds unless given.
    """

    method: str | None = "dynamic_sparse"
    sparsity: float = 0.67
    initialization: str = "er"
    death: str = "magnitude"
    death_rate: float = 0.5
    redistribution: str = "none"
    growth: str = "random"
    update_steps: int | None = None
    averaging: bool = False
    non_monotone: int = 5
    train_dense: bool = False
    ignore: list[str] = field(default_factory=list)
    rounds_folder: str | None = None

    info = MethodInfo(
        name="dynamic_sparse",
        title="Dynamic sparse training",
        summary="trains a fixed number of weights whose places move: the least die, others grow from zero",
        paper="https://arxiv.org/abs/2101.09048",
        paper_title="Selfish Sparse RNN Training",
        citation="""@inproceedings{liu2021selfish,
  title={Selfish Sparse {RNN} Training},
  author={Shiwei Liu and Decebal Constantin Mocanu and Yulong Pei and Mykola Pechenizkiy},
  booktitle={International Conference on Machine Learning},
  year={2021}
}""",
    )

    def __post_init__(self) -> None:
        for key, allowed in (
            ("method", (self.info.name,)),
            ("initialization", INITIALIZATIONS),
            ("death", DEATHS),
            ("redistribution", REDISTRIBUTIONS),
            ("growth", GROWTHS),
        ):
            if getattr(self, key) not in allowed:
                raise BadInputError(f"{key}: {getattr(self, key)!r} is unknown; choose {', '.join(allowed)}.")
        for key in ("sparsity", "death_rate"):
            if not 0 < getattr(self, key) < 1:
                raise BadInputError(f"{key}: {getattr(self, key)} is outside (0, 1).")
        for key in ("update_steps", "non_monotone"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise BadInputError(f"{key}: {value} is too few; use 1 or more.")

    @property
    def needs_gradient(self) -> bool:
        """Whether the dense gradient of an update's step is looked at."""
        return self.growth == "gradient"

    @property
    def needs_momentum(self) -> bool:
        """Whether a running mean of dense gradients is kept."""
        return "momentum" in (self.growth, self.redistribution)

    def rate(self, step: int, steps: int) -> float:
        """Share of the weights that die behind a step of so many: a cosine from `death_rate` to zero."""
        return self.death_rate * (1 + math.cos(math.pi * step / steps)) / 2


def initial_masks(
    shapes: Mapping[str, Sequence[int]], sparsity: float, initialization: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random masks with `round((1 - sparsity) x all)` weights together, bool of the shapes given."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round((1 - sparsity) * sum(sizes.values()))
    # A layer's share of all weights: its size, or its (in + out), as density x size is.
    wanted = {
        name: float(size if initialization == "uniform" else size * sum(shapes[name]) / math.prod(shapes[name]))
        for name, size in sizes.items()
    }
    counts = share_out(total, wanted, sizes)
    masks = {}
    for name, shape in shapes.items():
        mask = torch.zeros(sizes[name], dtype=torch.bool)
        mask[torch.randperm(sizes[name], generator=generator)[: counts[name]]] = True
        masks[name] = mask.reshape(*shape)
    return masks


def share_out(total: int, wanted: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers in proportion to `wanted` that add up to `total`, none above its room.

    What a full one cannot take goes to the others in their proportion; where no proportion is left, to those with room
    in order. Largest remainders round.
    """
    given = dict.fromkeys(wanted, 0)
    left = min(total, sum(room.values()))
    while left:
        free = {name: wanted[name] for name in wanted if given[name] < room[name]}
        together = sum(free.values())
        if not together:
            free = dict.fromkeys(free, 1.0)
            together = float(len(free))
        exact = {name: left * (own / together) for name, own in free.items()}
        whole = {name: min(int(own), room[name] - given[name]) for name, own in exact.items()}
        over = left - sum(whole.values())
        full = any(whole[name] < int(own) for name, own in exact.items())
        if not full:
            for name in sorted(free, key=lambda name: int(exact[name]) - exact[name]):
                more = min(over, 1, room[name] - given[name] - whole[name])
                whole[name] += more
                over -= more
        for name, own in whole.items():
            given[name] += own
        left = over
    return given


def dying(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], death: str, rate: float, threshold: float
) -> tuple[dict[str, Tensor], float]:
    """Places of the weights that die, bool inside the masks, and the threshold of the next update."""
    alive = {name: int(mask.sum()) for name, mask in masks.items()}
    sizes = {name: weight.detach().abs() for name, weight in weights.items()}
    if death == "threshold":
        die = {name: masks[name] & (sizes[name] <= threshold) for name in masks}
        gone, expected = sum(int(own.sum()) for own in die.values()), rate * sum(alive.values())
        if gone < (1 - TOLERANCE) * expected:
            threshold *= 1 + THRESHOLD_STEP
        elif gone > (1 + TOLERANCE) * expected:
            threshold *= 1 - THRESHOLD_STEP
        return die, threshold
    if death == "global_magnitude":
        together = torch.cat([sizes[name].masked_fill(~masks[name], math.inf).flatten() for name in masks])
        flat = _chosen(-together, math.ceil(rate * sum(alive.values())))
        parts = flat.split([mask.numel() for mask in masks.values()])
        return {name: own.reshape(masks[name].shape) for name, own in zip(masks, parts, strict=True)}, threshold
    die = {}
    for name, mask in masks.items():
        count = math.ceil(rate * alive[name])
        if death == "magnitude":
            die[name] = _smallest(sizes[name], mask, count)
            continue
        positive, negative = mask & (weights[name] > 0), mask & (weights[name] < 0)
        below = min(count // 2, int(negative.sum()))
        above = min(count - below, int(positive.sum()))
        die[name] = _smallest(sizes[name], positive, above) | _smallest(sizes[name], negative, below)
        # Zeros, and what one sign has too few of.
        die[name] |= _smallest(sizes[name], mask & ~die[name], count - int(die[name].sum()))
    return die, threshold


def updated_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    config: DynamicSparseConfig,
    rate: float,
    threshold: float,
    generator: torch.Generator,
    dense: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], float]:
    """The next masks, with as many weights as these, and the threshold of the next update.

    Args:
        weights: by name, of any shape; zero outside the masks.
        masks: bool, of the same names and shapes, on the CPU.
        rate: share of the weights that die.
        dense: `gradient` and `momentum` of all places, masked or not, as far as growth and redistribution ask.

    Raises:
        RunError: a weight, gradient or momentum is not finite, so that nothing can be in proportion to it.
    """
    for kind, values in (("weights", weights), *dense.items()):
        for name, own in values.items():
            if not bool(torch.isfinite(own).all()):
                raise RunError(f"{name}: its {kind} are not finite where masks are to move; lower learning_rate.")
    die, threshold = dying(weights, masks, config.death, rate, threshold)
    left = {name: masks[name] & ~die[name] for name in masks}
    freed = {name: int(own.sum()) for name, own in die.items()}
    room = {name: own.numel() - int(own.sum()) for name, own in left.items()}
    if config.redistribution == "none":
        grow = freed
    else:
        grow = share_out(sum(freed.values()), _claims(weights, left, config.redistribution, dense), room)
    new = {}
    for name, own in left.items():
        if config.growth == "random":
            scores = torch.rand(own.shape, generator=generator)
        else:
            scores = dense[config.growth][name].abs().float()
        new[name] = own | _chosen(scores.masked_fill(own, -math.inf), grow[name])
    return new, threshold


def _claims(
    weights: Mapping[str, Tensor],
    left: Mapping[str, Tensor],
    redistribution: str,
    dense: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, float]:
    """What each layer's part of the freed weights is in proportion to."""
    if redistribution == "nonzeros":
        return {name: float(own.sum()) for name, own in left.items()}
    values = weights if redistribution == "magnitude" else dense["momentum"]
    return {name: float(values[name][own].abs().double().mean()) if own.any() else 0.0 for name, own in left.items()}


def _smallest(sizes: Tensor, inside: Tensor, count: int) -> Tensor:
    """Where the `count` smallest inside are, bool."""
    return _chosen(-sizes.masked_fill(~inside, math.inf), count)


def _chosen(scores: Tensor, count: int) -> Tensor:
    """Where the largest `count` scores are, of equal ones the first, bool."""
    places = torch.zeros(scores.numel(), dtype=torch.bool)
    places[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return places.reshape(scores.shape)
