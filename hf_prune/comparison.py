"""What tickets share: kept weights against chance, signs, and how far the weights have moved.

The measures are those of Vandersmissen & Oramas (2023), https://arxiv.org/abs/2302.11244: the weights that all masks
keep as a share of all and of the first mask's, sign flips, |final - initial|. Chance, the overlap of independent masks
with the same densities in each layer, is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hf_prune.checkpoint.folder import PLAN_FILE
from hf_prune.checkpoint.inspect import check_safetensors
from hf_prune.data.builtin import resolve_model
from hf_prune.errors import BadInputError
from hf_prune.plan import Plan


def compare_tickets(folders: Sequence[str], initial: str | None = None) -> dict[str, Any]:
    """Overlap and movement of pruned models of one architecture, by weight matrix and together.

    Args:
        folders: two or more that hf_prune has written.
        initial: a folder or .safetensors file of the weights that they all began with; without it, what tickets keep
            beside them (`FOLDER.rounds/initial.safetensors`), else movement is left out.

    Returns:
        {"tickets": names, "layers": [...], "together": {...}}. Layers hold counts; `flips` are signs that differ over
        the `pairs` of tickets that keep a weight; `moved` and `flipped` are means over each ticket's kept weights of
        |final - initial| and of a changed sign. `together` holds shares in [0, 1].

    Raises:
        BadInputError: fewer than two folders, a folder without a plan, tickets of different models.
    """
    if len(folders) < 2:
        raise BadInputError("name two folders or more to compare.")
    plans = [_plan(folder) for folder in folders]
    for folder, plan in zip(folders[1:], plans[1:], strict=True):
        if [(view.parameter, view.shape) for view in plan.views] != [
            (view.parameter, view.shape) for view in plans[0].views
        ]:
            raise BadInputError(
                f"{folder}: its pruned matrices are not those of {folders[0]}; compare tickets of one model."
            )
    with ExitStack() as stack:
        tickets = [_tensors(stack, check_safetensors(folder)) for folder in folders]
        starts = [_initial(stack, folder, initial) for folder in folders]
        layers = [
            _layer(view.name, [own[view.parameter] for own in tickets], [_find(own, view.parameter) for own in starts])
            for view in plans[0].views
        ]
    return {"tickets": [Path(folder).name for folder in folders], "layers": layers, "together": _together(layers)}


class _Tensors(dict[str, Any]):
    """Tensors of open files, read when they are asked for."""

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = super().__getitem__(name).get_tensor(name)
        return tensor


def _plan(folder: str) -> Plan:
    file = Path(folder) / PLAN_FILE
    if not file.is_file():
        raise BadInputError(f"{folder}: there is no {PLAN_FILE}; name folders that hf_prune has written.")
    return Plan.load(file)


def _tensors(stack: ExitStack, files: Sequence[Path]) -> _Tensors:
    found = _Tensors()
    for path in files:
        file = stack.enter_context(safe_open(path, framework="pt"))
        found.update(dict.fromkeys(file.keys(), file))
    return found


def _initial(stack: ExitStack, folder: str, named: str | None) -> _Tensors | None:
    own = Path(f"{Path(folder).expanduser().absolute()}.rounds") / "initial.safetensors"
    if named is None:
        return _tensors(stack, [own]) if own.is_file() else None
    place = Path(named).expanduser()
    if place.is_file():
        return _tensors(stack, [place])
    return _tensors(stack, check_safetensors(resolve_model(named).path))


def _find(tensors: _Tensors | None, name: str) -> Tensor | None:
    return tensors[name] if tensors is not None and name in tensors else None


def _layer(name: str, weights: Sequence[Tensor], initial: Sequence[Tensor | None]) -> dict[str, Any]:
    """Counts of one weight matrix."""
    masks = [weight != 0 for weight in weights]
    shared = masks[0].clone()
    for mask in masks[1:]:
        shared &= mask
    kept = [int(mask.sum()) for mask in masks]
    numel = masks[0].numel()
    pairs, flips = 0, 0
    for one, other in itertools.combinations(range(len(weights)), 2):
        both = masks[one] & masks[other]
        pairs += int(both.sum())
        flips += int((weights[one].sign() != weights[other].sign())[both].sum())
    entry = {
        "layer": name,
        "weights": numel,
        "kept": kept,
        "shared": int(shared.sum()),
        "chance": numel * math.prod(count / numel for count in kept),
        "pairs": pairs,
        "flips": flips,
    }
    if all(start is not None for start in initial):
        moved, flipped = zip(*map(_movement, weights, initial, masks), strict=True)
        entry |= {"moved": list(moved), "flipped": list(flipped)}
    return entry


def _movement(weight: Tensor, initial: Tensor | None, mask: Tensor) -> tuple[float, float]:
    """Means over the kept weights of |final - initial| and of a changed sign; zeros where none is kept."""
    assert initial is not None
    if not bool(mask.any()):
        return 0.0, 0.0
    moved = (weight - initial)[mask].abs().double().mean()
    return float(moved), float((weight.sign() != initial.sign())[mask].double().mean())


def _together(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares over all layers."""
    total = {key: sum(layer[key] for layer in layers) for key in ("weights", "shared", "chance", "pairs", "flips")}
    kept = [sum(counts) for counts in zip(*(layer["kept"] for layer in layers), strict=True)]
    entry: dict[str, Any] = {
        "density": [count / total["weights"] for count in kept],
        "shared_of_all": total["shared"] / total["weights"],
        "shared_of_first": total["shared"] / kept[0] if kept[0] else None,
        "chance_of_all": total["chance"] / total["weights"],
        "times_chance": total["shared"] / total["chance"] if total["chance"] else None,
        "flips": total["flips"] / total["pairs"] if total["pairs"] else None,
    }
    if all("moved" in layer for layer in layers):
        for key in ("moved", "flipped"):
            entry[key] = [
                sum(layer[key][place] * layer["kept"][place] for layer in layers) / count if count else None
                for place, count in enumerate(kept)
            ]
    return entry
