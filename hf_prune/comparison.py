"""What tickets share: kept weights against chance, signs, and how far the weights have moved.

The measures are those of Vandersmissen & Oramas (2023), https://arxiv.org/abs/2302.11244: the weights that all masks
keep as a share of all and of the first mask's, sign flips, |final - initial|. Chance, the overlap of independent masks
with the same densities in each layer, is ours.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.folder import PLAN_FILE, RECIPE_FILE, REPORT_FILE
from hf_prune.checkpoint.inspect import check_safetensors, local_folder
from hf_prune.checkpoint.load import load_config, skeleton
from hf_prune.checkpoint.source import WeightFiles
from hf_prune.data.builtin import resolve_model
from hf_prune.errors import BadInputError
from hf_prune.plan import Plan, ViewPlan
from hf_prune.recipe import parse_yaml
from hf_prune.training.rounds import WEIGHTS, rounds_place


def compare_tickets(folders: Sequence[str], initial: str | None = None) -> dict[str, Any]:
    """Overlap and movement of pruned models of one architecture, by weight matrix and together.

    Args:
        folders: two or more that hf_prune has written.
        initial: a folder, a .safetensors file or a Hub id of the weights that they all began with; without it, what
            tickets keep of their rounds (`rounds_folder`, else `FOLDER.rounds`), else movement is left out.

    Returns:
        {"tickets": names, "layers": [...], "together": {...}}. Layers hold counts; `flips` are signs that differ over
        the `pairs` of tickets that keep a weight; `moved` and `flipped` are means over each ticket's kept weights of
        |final - initial| and of a changed sign, `displaced` is ||final - initial|| / ||initial|| over them, `deviation`
        the mean of a weight's standard deviation over the ends of all rounds, where these are kept. `together` holds
        shares in [0, 1].

    Raises:
        BadInputError: fewer than two folders, a folder without a plan, tickets of different models.
    """
    if len(folders) < 2:
        raise BadInputError("name two folders or more to compare.")
    plans = [_plan(folder) for folder in folders]
    for folder, plan in zip(folders[1:], plans[1:], strict=True):
        if [(view.name, view.parameter, view.shape) for view in plan.views] != [
            (view.name, view.parameter, view.shape) for view in plans[0].views
        ]:
            raise BadInputError(
                f"{folder}: its pruned matrices are not those of {folders[0]}; compare tickets of one model, with "
                "fused layers whole or in parts in both."
            )
    with ExitStack() as stack:
        tickets = [_by_model_names(stack, folders[0], plans[0], check_safetensors(folder)) for folder in folders]
        starts = [_initial(stack, folder, plan, initial) for folder, plan in zip(folders, plans, strict=True)]
        rounds = [_rounds(stack, folder) for folder in folders]
        found: dict[str, dict[str, Any]] = {}
        for parameter, views in _by_parameter(plans[0]).items():
            # Once for all experts in one parameter, which are put together when they are read.
            weights = [_weight(own, parameter, folder) for own, folder in zip(tickets, folders, strict=True)]
            for folder, weight in zip(folders[1:], weights[1:], strict=True):
                if weight.shape != weights[0].shape:
                    raise BadInputError(
                        f"{folder}: {parameter} is {list(weight.shape)} there and {list(weights[0].shape)} in "
                        f"{folders[0]}; compare tickets of one model."
                    )
            before = [own[parameter] if own is not None and parameter in own else None for own in starts]
            ends = [[own[parameter] for own in each] for each in rounds]
            for view in views:
                found[view.name] = _layer(
                    view.name,
                    [view.own_part(own) for own in weights],
                    [_part(view, own, weights[0]) for own in before],
                    [[view.own_part(own) for own in each] for each in ends],
                )
        layers = [found[view.name] for view in plans[0].views]
    return {"tickets": [Path(folder).name for folder in folders], "layers": layers, "together": _together(layers)}


def _weight(tensors: _Tensors | _Stored, parameter: str, folder: str) -> Tensor:
    if parameter not in tensors:
        raise BadInputError(f"{folder}: its files hold no {parameter}, which its plan names; get the folder again.")
    return tensors[parameter]


class _Tensors(dict[str, Any]):
    """Tensors of open files, read when they are asked for."""

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = super().__getitem__(name).get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Stored:
    """Tensors of a checkpoint by the names that its model knows them by, read when they are asked for."""

    files: WeightFiles

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        return self.files.read({name}.__contains__)[name]


def _by_model_names(stack: ExitStack, folder: str, plan: Plan, files: Sequence[Path]) -> _Tensors | _Stored:
    """Tensors of files by the names that the model in `folder` knows them by; experts are stored under others."""
    tensors = _tensors(stack, files)
    if all(view.parameter in tensors for view in plan.views) or not (Path(folder) / "config.json").is_file():
        return tensors
    arguments = ModelArguments()
    return _Stored(WeightFiles(skeleton(load_config(folder, arguments), arguments).float(), files))


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


def _initial(stack: ExitStack, folder: str, plan: Plan, named: str | None) -> _Tensors | _Stored | None:
    if named is None:
        own = _rounds_folder(folder) / "initial.safetensors"
        return _tensors(stack, [own]) if own.is_file() else None
    place = Path(named).expanduser()
    files = [place]
    if not place.is_file():
        source = resolve_model(named)
        files = check_safetensors(local_folder(source.path, source.revision))
    tensors = _by_model_names(stack, folder, plan, files)
    missing = [view.parameter for view in plan.views if view.parameter not in tensors]
    if missing:
        raise BadInputError(f"initial: {named} has no {missing[0]}; name the weights that the tickets began with.")
    return tensors


def _rounds_folder(folder: str) -> Path:
    """Where a ticket's rounds are, as its recipe says."""
    recipe = Path(folder) / RECIPE_FILE
    values = parse_yaml(_text(recipe), recipe.name) if recipe.is_file() else {}
    named = values.get("rounds_folder")
    place, own = rounds_place(folder, named), Path(folder).resolve()
    output = Path(str(values.get("output_dir"))).parts
    if named and not place.is_dir() and not Path(named).is_absolute() and own.parts[-len(output) :] == output:
        # Of the folder that the training was started in, which need not be today's.
        return Path(*own.parts[: -len(output)], named)
    return place


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise BadInputError(f"{file} cannot be read as text; train again, or get the folder again.") from None


def _rounds(stack: ExitStack, folder: str) -> list[_Tensors]:
    """The weights at the end of the dense training and of each of a ticket's rounds, as far as they are kept."""
    report = Path(folder) / REPORT_FILE
    try:
        said = json.loads(_text(report)) if report.is_file() else {}
    except ValueError:
        raise BadInputError(f"{report} is damaged; train again, or get the folder again.") from None
    place = _rounds_folder(folder)
    tickets = [own for own in said.get("tickets") or [] if own.get("kind") == "ticket"]
    files = [
        (place / str(said.get("rounds")) if own["number"] else place) / f"round-{own['number']:02d}" / WEIGHTS
        for own in tickets
    ]
    return [_tensors(stack, [file]) for file in files] if files and all(file.is_file() for file in files) else []


def _by_parameter(plan: Plan) -> dict[str, list[ViewPlan]]:
    found: dict[str, list[ViewPlan]] = {}
    for view in plan.views:
        found.setdefault(view.parameter, []).append(view)
    return found


def _part(view: ViewPlan, found: Tensor | None, like: Tensor) -> Tensor | None:
    # One of another shape is refused where it is compared.
    return view.own_part(found) if found is not None and found.shape == like.shape else found


def _layer(
    name: str, weights: Sequence[Tensor], initial: Sequence[Tensor | None], rounds: Sequence[Sequence[Tensor]]
) -> dict[str, Any]:
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
        moved, flipped, displaced = zip(*map(_movement, weights, initial, masks), strict=True)
        entry |= {"moved": list(moved), "flipped": list(flipped), "displaced": list(displaced)}
    if all(rounds):
        entry["deviation"] = [_deviation(own, mask) for own, mask in zip(rounds, masks, strict=True)]
    return entry


def _deviation(rounds: Sequence[Tensor], mask: Tensor) -> float:
    """Mean over the kept weights of the standard deviation (of the population) over rounds; 0 where none is kept."""
    kept = torch.stack([own[mask] for own in rounds]).double()
    return float(kept.std(dim=0, correction=0).mean()) if bool(mask.any()) else 0.0


def _movement(weight: Tensor, initial: Tensor | None, mask: Tensor) -> tuple[float, float, float | None]:
    """Over the kept weights: means of |final - initial| and of a changed sign, and ||final - initial|| / ||initial||.

    Zeros where none is kept; no third where the kept ones began with zeros.
    """
    assert initial is not None
    if initial.shape != weight.shape:
        raise BadInputError(
            f"initial: a weight is {list(initial.shape)} there and {list(weight.shape)} in the ticket; name "
            "the weights that the tickets began with."
        )
    if not bool(mask.any()):
        return 0.0, 0.0, 0.0
    before = initial[mask].double()
    change, norm = weight[mask].double() - before, float(before.norm())
    flipped = float((weight.sign() != initial.sign())[mask].double().mean())
    return float(change.abs().mean()), flipped, float(change.norm()) / norm if norm else None


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
    for key in ("moved", "flipped", "deviation"):
        if all(key in layer for layer in layers):
            entry[key] = [
                sum(layer[key][place] * layer["kept"][place] for layer in layers) / count if count else None
                for place, count in enumerate(kept)
            ]
    return entry
