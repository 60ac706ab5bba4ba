"""How much each unit of a group matters: by its weights, by gradients, or by what its consumer is handed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.structure.groups import MATCHING, Group, Stretch
from hf_prune.structure.refit import factor

# What each needs to know of the consumer's inputs.
IMPORTANCES: dict[str, frozenset[str]] = {
    "l1": frozenset(),
    "product": frozenset(),
    "random": frozenset(),
    "taylor": frozenset(),
    "activation": frozenset({"sum_of_squares"}),
    "wanda": frozenset({"sum_of_squares"}),
    "variance": frozenset({"sum", "sum_of_squares"}),
    "output": frozenset({"gram"}),
}
# Share of the units that goes in one step of `output`: the ranking inside a step does not see the step's own removals.
_STEP = 0.01


@dataclass(frozen=True)
class Evidence:
    """What a unit's importance may rest on.

    Attributes:
        statistics: of the consumer's inputs, where the importance declares any.
        gradients: parameter name -> float32 gradient of the loss summed over calibration windows, stored layout.
        seed: of `random`.
        scores: of a file, float [units] by `mlp.0`, `attention.0`, `heads.0`, ...: the kind of unit and its block.
    """

    statistics: Statistics | None = None
    gradients: dict[str, Tensor] | None = None
    seed: int = 0
    scores: dict[str, Tensor] | None = None


def is_file(name: str) -> bool:
    """Whether an importance is a file of scores."""
    return name.endswith(".safetensors")


def read_scores(path: str) -> dict[str, Tensor]:
    """The scores that a file holds for each kind of unit and block.

    Raises:
        BadInputError: it is missing or damaged, or holds something else than rows of finite numbers.
    """
    try:
        scores = load_file(scores_file(path))
    except (OSError, SafetensorError) as error:
        raise BadInputError(f"importance: {path} cannot be read ({str(error).rstrip('.')}).") from None
    for key, own in scores.items():
        if own.ndim != 1 or not bool(own.isfinite().all()):
            raise BadInputError(
                f"importance: {Path(path).name} holds {list(own.shape)} numbers for {key}, or not finite ones; "
                "give a finite score for each unit."
            )
    return scores


def scores_file(path: str) -> Path:
    """Where a file of scores is."""
    return Path(path).expanduser()


def importance(name: str, group: Group, evidence: Evidence) -> Tensor:
    """Importance of each unit, float32 [units]; higher is kept.

    - l1: the published default, of all of a unit's weights, the gains of the normalisation in front folded in (the
      paper folds BatchNorm first).
    - product: norms of a unit's rows and columns in each layer, multiplied; ours, data-free. Scaling a unit's rows up
      and its columns down is the same function and changes a sum of norms; a gated neuron hands on a product.
    - random: a permutation; the paper's other end.
    - taylor: sum of |w * gradient| over all of a unit's weights (LLM-Pruner, element-wise first order).
    - activation: root of the unit's summed squared activations.
    - wanda: L2 norm of a unit's columns times that of its activation (Wanda's score, squared and summed over columns).
    - variance: variance of the activation times the squared column norm (FLAP's fluctuation).
    - a path: what a file says.

    Raises:
        BadInputError: a file has no such scores, or for another number of units.
    """
    if is_file(name):
        return _from_file(name, group, evidence.scores or {})
    if name == "l1":
        return l1(
            [*(own.read() * group.gain.to(own.view.parameter.device) for own in group.producers), group.consumer.read()]
        )
    if name == "product":
        return _product(group)
    if name == "random":
        generator = torch.Generator().manual_seed(evidence.seed * 100_003 + group.block)
        return torch.randperm(group.units, generator=generator).float()
    if name == "taylor":
        assert evidence.gradients is not None
        every = (*group.producers, group.consumer)
        return torch.stack([_taylor(stretch, evidence.gradients) for stretch in every]).sum(dim=0)
    statistics = evidence.statistics
    assert statistics is not None and statistics.sum_of_squares is not None
    squares = _by_unit(group.consumer, statistics.sum_of_squares)
    columns = group.consumer.read().square().sum(dim=2)
    if name == "activation":
        return squares.sum(dim=1).sqrt().float()
    if name == "wanda":
        return (squares * columns).sum(dim=1).sqrt().float()
    assert name == "variance" and statistics.variance is not None
    return (_by_unit(group.consumer, statistics.variance) * columns).sum(dim=1).float()


def check_scores(name: str, groups: Iterable[Group], scores: dict[str, Tensor]) -> None:
    """Raise BadInputError for the first of some groups for whose units the file of this name has no scores."""
    for group in groups:
        _from_file(name, group, scores)


def _from_file(name: str, group: Group, scores: dict[str, Tensor]) -> Tensor:
    key, consumer = f"{group.kind}.{group.block}", group.consumer
    # Heads are counted through all key-value groups, of which each is a group of its own.
    every, first = consumer.view.shape[1] // consumer.size, consumer.offset // consumer.size
    if key not in scores or len(scores[key]) != every:
        there = f"{len(scores[key])} scores" if key in scores else "no scores"
        raise BadInputError(f"importance: {Path(name).name} has {there} for {key}, whose units are {every}.")
    return scores[key][first : first + group.units].float()


def _product(group: Group) -> Tensor:
    """Queries and keys only choose where a head looks: their scale is not its output's."""
    scale = group.consumer.read().flatten(1).norm(dim=1)
    for stretch in group.producers:
        if stretch.role not in MATCHING:
            scale = scale * (stretch.read() * group.gain.to(scale.device)).flatten(1).norm(dim=1)
    return scale


def l1(sides: Sequence[Tensor]) -> Tensor:
    """Sum of |w| over a unit's rows or columns in each layer, mean over layers, over the mean: float32 [units].

    Args:
        sides: each [units, size, other]: a layer's rows, or columns, by unit.
    """
    mean = torch.stack([side.abs().sum(dim=(1, 2)) for side in sides]).mean(dim=0)
    return mean / mean.mean()


def most_important(scores: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: the units of the highest score, the earlier one where scores tie."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def least_output_error(group: Group, gram: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: units whose columns, refitted, lose the least of the consumer's output.

    Backward elimination: the unit whose removal costs least once the others have made up for it goes first, then the
    inverse Hessian and the weights are brought up to date (Optimal Brain Surgeon for units, as in ZipLM, Kurtic et al.,
    2023). Hundredths of the units go together, where the paper removes one at a time.

    Args:
        gram: [in, in] of the consumer's inputs, damped, in the dtype to compute in.
    """
    size, start = group.consumer.size, group.consumer.offset
    stop = group.consumer.stop
    inverse = torch.cholesky_inverse(factor(gram))
    weight = group.consumer.view.read().to(inverse)
    alive = torch.ones(group.units, dtype=torch.bool, device=gram.device)
    step = max(int(_STEP * group.units), 1)
    while int(alive.sum()) > count:
        units = alive.nonzero().flatten()
        cost = _removal_cost(weight[:, start:stop], inverse[start:stop, start:stop], size)
        gone = units[cost[units].argsort(stable=True)[: min(step, len(units) - count)]]
        columns = (start + gone[:, None] * size + torch.arange(size, device=gone.device)).flatten()
        rows = inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], rows)
        weight -= weight[:, columns] @ solved
        inverse -= rows.T @ solved
        # Zero to rounding; exactly, so that no later step divides by what is left.
        inverse[columns, :], inverse[:, columns] = 0, 0
        inverse[columns, columns] = 1
        weight[:, columns] = 0
        alive[gone] = False
    return alive.nonzero().flatten()


def _removal_cost(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Rise of the squared output error when a unit's columns go: trace of W_S (H^-1_SS)^-1 W_S^T, [units]."""
    if size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    blocks = torch.stack([inverse[at : at + size, at : at + size] for at in range(0, inverse.shape[0], size)])
    columns = weight.T.reshape(-1, size, weight.shape[0])
    return (columns * torch.linalg.solve(blocks, columns)).sum(dim=(1, 2))


def _by_unit(consumer: Stretch, values: Tensor) -> Tensor:
    """Values of the consumer's inputs, [in], as [units, size]."""
    return values[consumer.offset : consumer.stop].reshape(consumer.units, consumer.size)


def _taylor(stretch: Stretch, gradients: dict[str, Tensor]) -> Tensor:
    gradient = gradients[stretch.view.parameter_name]
    stored = gradient.T if stretch.view.transposed else gradient
    side = stored if stretch.rows else stored.T
    own = side[stretch.offset : stretch.stop].reshape(stretch.units, stretch.size, -1)
    return (stretch.read() * own.to(stretch.view.parameter.device).float()).abs().sum(dim=(1, 2))
