"""How many units of each kind go, so that the removed parameters meet the budget within one unit."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from hf_prune.arguments import StructuredConfig
from hf_prune.errors import BadInputError
from hf_prune.structure.groups import ATTENTION, DEPTH, HEADS, MLP, Shape, block_shape, find_groups
from hf_prune.structure.stock import accepts
from hf_prune.weights import find_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Structure:
    """The sizes before and after.

    Attributes:
        before, after: of a block; with `widths` the after width is that of the widest.
        blocks, blocks_removed: how many there were and how many go.
        parameters_before, parameters_after: of all blocks, as they are stored: padding counted.
        neuron: parameters that go with one MLP neuron.
        widths: MLP width of every block where they differ (`layout: pad`), without the padding.
        searched: shares of the removed parameters, by unit, where `budget: search` has chosen them.
    """

    before: Shape
    after: Shape
    blocks: int
    blocks_removed: int
    parameters_before: int
    parameters_after: int
    neuron: int
    widths: tuple[int, ...] | None = None
    searched: dict[str, float] | None = None

    @property
    def removed(self) -> float:
        """Share of the blocks' parameters that is not stored any more."""
        return 1 - self.parameters_after / self.parameters_before

    @property
    def padded(self) -> float:
        """Share of the blocks' parameters, as they were, that zeros have taken the place of."""
        zeros = sum(self.after.width - width for width in self.widths or ())
        return zeros * self.neuron / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Structure:
        """Read the JSON form."""
        shapes = {key: Shape(**values[key]) for key in ("before", "after")}
        widths = values.get("widths")
        return cls(**{**values, **shapes, "widths": None if widths is None else tuple(widths)})


def plan_structure(model: nn.Module, config: StructuredConfig, shares: dict[str, float] | None = None) -> Structure:
    """The sizes that a config's sparsity asks for; the model may live on the meta device.

    Args:
        shares: of the removed parameters by unit; those of the config, or its default, unless given.

    Raises:
        BadInputError: a layer would be left empty, or the family is not described.
    """
    assert config.sparsity is not None and config.units is not None
    before = block_shape(model)
    blocks = find_blocks(model)[1]
    sizes = _sizes(blocks)
    size, total = sizes[0], sum(sizes)
    unit = _parameters_of_units(model, before, config.units)
    goal = config.sparsity * total
    given = bool(shares or (config.budget and not config.searches_budget))
    shares = shares or _shares(config, before, unit)
    depth = round(shares.get(DEPTH, 0.0) * goal / size)
    if depth >= len(blocks):
        raise BadInputError(f"sparsity: {config.sparsity} by depth leaves no block; lower it or add other units.")
    left, rest = len(blocks) - depth, goal - depth * size
    after = before
    for kind in (ATTENTION, HEADS):
        have = _units_of(before)[kind]
        if not shares.get(kind):
            continue
        if have == 1:
            raise BadInputError(f"units: there is one unit of {kind} a block, which cannot go; choose other units.")
        gone = round(shares[kind] * goal / (left * unit[kind]))
        if shares.get(MLP) and left * gone * unit[kind] > rest:
            # The MLP takes what is too little for one more of these; depth may have taken more than its share.
            gone = max(gone - 1, 0)
        if shares.get(MLP) and not given:
            later = shares.get(HEADS, 0.0) * goal if kind == ATTENTION else 0.0
            most = rest - later - left * unit[MLP] * (before.width - config.round_to)
            gone = _offered(model, before, kind, gone, least=math.ceil(most / (left * unit[kind])))
        if gone >= have:
            raise BadInputError(
                f"sparsity: {config.sparsity} would take all {have} units of {kind}; lower it or give {kind} a smaller "
                "share in budget."
            )
        rest -= left * gone * unit[kind]
        after = _without(after, kind, gone)
    if shares.get(MLP):
        exact = before.width - max(rest, 0) / (left * unit[MLP])
        width = round(exact / config.round_to) * config.round_to
        if width >= before.width:
            # Nothing goes, or the widest multiple below does where the width is none.
            width = before.width if exact > before.width - 0.5 else before.width // config.round_to * config.round_to
        if width < 1 and config.round_to > before.width:
            raise BadInputError(
                f"round_to: the MLPs have {before.width} neurons, fewer than {config.round_to}; lower it."
            )
        if width < 1:
            raise BadInputError(
                f"sparsity: {config.sparsity} would leave the MLPs empty; lower it, or add attention or depth to units."
            )
        after = replace(after, width=width)
    gone = unit[MLP] * (before.width - after.width) + unit[ATTENTION] * (before.groups - after.groups)
    if shares.get(HEADS):
        gone += unit[HEADS] * (before.heads - after.heads) // before.groups
    if config.sparsity > 0 and not gone and not depth:
        least = min((unit[kind] * left for kind in shares if kind != DEPTH), default=size)
        raise BadInputError(
            f"sparsity: {config.sparsity} is less than half a unit of {', '.join(shares)}, nothing would go; the "
            f"smallest step is {least * (config.round_to if shares.get(MLP) else 1) / total:.2g}."
        )
    return Structure(before, after, len(blocks), depth, total, left * (size - gone), unit[MLP])


def budget_of_units(model: nn.Module, units: Sequence[str], share: float) -> tuple[float, list[str]]:
    """`sparsity` and `budget` of a config that removes a share of the units, where a share of the parameters is meant.

    Every block loses the same number of a kind, and every key-value group of its heads: the nearest to the share.

    Args:
        model: may live on the meta device.
        units: kinds of units without `depth`.

    Raises:
        BadInputError: the nearest number is none, or the family is not described.
    """
    shape, sizes = block_shape(model), _sizes(find_blocks(model)[1])
    unit, have = _parameters_of_units(model, shape, units), _units_of(shape)
    gone = {kind: round(share * have[kind]) * unit[kind] for kind in units}
    for kind in units:
        if round(share * have[kind]) >= have[kind]:
            raise BadInputError(f"sparsity: {share} would take all {have[kind]} units of {kind}; lower it.")
    removed = sum(gone.values())
    if not removed:
        raise BadInputError(
            f"sparsity: {share} of the units of {', '.join(units)} is less than half a unit, nothing would go; the "
            f"smallest step is {1 / max(have[kind] for kind in units):.2g}."
        )
    return len(sizes) * removed / sum(sizes), [f"{kind}={own / removed!r}" for kind, own in gone.items()]


def _without(shape: Shape, kind: str, gone: int) -> Shape:
    """A block's sizes without some of its key-value groups, or of every group's query heads."""
    share = shape.heads // shape.groups
    if kind == ATTENTION:
        return replace(shape, groups=shape.groups - gone, heads=share * (shape.groups - gone))
    return replace(shape, heads=shape.groups * (share - gone))


def _offered(model: nn.Module, shape: Shape, kind: str, wanted: int, least: int) -> int:
    """How many units of attention or heads go where nobody has said how the budget is split.

    As many as wanted where the stock config can say that, otherwise the next fewer, which leaves the MLPs to give the
    rest; more only where the MLPs have not got it. A model that can lose none at all is left to `check_stock`.

    Args:
        least: how many must go so that the MLPs can give the rest.
    """
    have = _units_of(shape)[kind]
    if wanted == 0 or (wanted < have and accepts(model, _without(shape, kind, wanted))):
        return wanted
    able = [gone for gone in range(1, have) if accepts(model, _without(shape, kind, gone))]
    if not able:
        return wanted
    gone = min([0, *able], key=lambda own: (own < least, own > wanted, abs(own - wanted)))
    logger.warning(
        "budget: the stock config cannot say %d of %d units of %s a block; %d stay, and the MLPs make up for it.",
        have - wanted, have, kind, have - gone,
    )  # fmt: skip
    return gone


def _units_of(shape: Shape) -> dict[str, int]:
    """How many units of each kind can go one by one from a block."""
    return {MLP: shape.width, ATTENTION: shape.groups, HEADS: shape.heads // shape.groups}


def _parameters_of_units(model: nn.Module, shape: Shape, units: Sequence[str]) -> dict[str, int]:
    """Kind -> what goes with one unit of a block; of heads, with one of every key-value group."""
    groups = {kind: find_groups(model, 0, kind, shape) for kind in {MLP, ATTENTION, *units} - {DEPTH}}
    return {kind: sum(group.parameters_of_a_unit() for group in own) for kind, own in groups.items()}


def _sizes(blocks: nn.ModuleList) -> list[int]:
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]


def _shares(config: StructuredConfig, shape: Shape, unit: dict[str, int]) -> dict[str, float]:
    """Unit -> its share of the parameters that are removed."""
    assert config.units is not None
    if config.budget and not config.searches_budget:
        return _given(config)
    depth = 1 / len(config.units) if DEPTH in config.units else 0.0
    weights = {kind: unit[kind] * _units_of(shape)[kind] for kind in config.units if kind != DEPTH}
    shares = {kind: (1 - depth) * weight / sum(weights.values()) for kind, weight in weights.items()}
    return {**shares, DEPTH: depth} if depth else shares


def _given(config: StructuredConfig) -> dict[str, float]:
    """The `budget` of a config, [mlp=0.8, depth=0.2], checked."""
    shares: dict[str, float] = {}
    for entry in config.budget or []:
        name, _, value = str(entry).partition("=")
        try:
            shares[name.strip()] = float(value)
        except ValueError:
            raise BadInputError(f"budget: {entry!r} is no share; write [mlp=0.8, depth=0.2], or search.") from None
    if set(shares) != set(config.units or []):
        raise BadInputError(f"budget: it names {', '.join(shares)}, and units are {', '.join(config.units or [])}.")
    if any(not share >= 0 for share in shares.values()) or not abs(sum(shares.values()) - 1) <= 1e-6:
        raise BadInputError(f"budget: the shares add up to {sum(shares.values()):g}; they must make 1.")
    return shares


def budget_candidates(config: StructuredConfig) -> list[dict[str, float]]:
    """All for the MLPs first, then up to three quarters of the budget for the coarse units, in quarters."""
    coarse = [unit for unit in config.units or [] if unit != MLP]
    parts = itertools.product((0.0, 0.25, 0.5, 0.75), repeat=len(coarse))
    return [{**dict(zip(coarse, own, strict=True)), MLP: 1 - sum(own)} for own in parts if sum(own) < 1]
