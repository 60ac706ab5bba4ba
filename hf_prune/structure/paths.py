"""Which layers still carry anything from input to output under masks: paths through kept weights, not their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.families import FAMILIES, PER_HEAD
from hf_prune.structure.groups import ATTENTION, MLP, Group, Stretch, block_shape, find_groups
from hf_prune.weights import find_blocks

# Families that tell places apart before their blocks alone.
_WITHOUT_ROTARY = ("gpt2", "opt")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What hands every feature on by itself; behind anything else a sequence begins anew.
_BY_FEATURE = (
    nn.Identity, nn.Flatten, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


def collapsed_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Layers through whose kept weights no path from input to output leads, in the masks' order.

    How much is known of a layer's neighbours decides what counts as a path:

    - in a decoder block of a described family (families.py), through its MLP: a row of every layer that makes a neuron
      and its column in the one that takes it; through its attention: a value's row and a column of one of its heads,
      and for queries and keys a head that has some of both. The residual stream around them carries everything.
      Queries meet keys by whole heads, since rotary positions mix their features. A row without weights but with a
      bias is a constant: it carries nothing, and multiplies what the other factor carries; but a key that is the same
      at every place, as without rotary positions, chooses none.
    - in an `nn.Sequential`: through its consecutive linear and convolutional layers;
    - anywhere else: a layer that has a weight left has a path.

    Args:
        masks: bool by the parameters' names, in the parameters' own layout; True stays. Parameters without one are
            whole.
    """
    carries = {**_in_sequences(model, masks), **_in_blocks(model, masks)}
    return [name for name, mask in masks.items() if not carries.get(name, bool(mask.any()))]


def _kept(masks: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """The mask of a parameter, in its layout."""
    return masks[name].cpu() if name in masks else torch.ones(parameter.shape, dtype=torch.bool)


def _in_sequences(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, bool]:
    found = {}
    for chain in _chains(model):
        # bool [out, in]; of a convolution whether any place of its kernel stays.
        links = {
            name: _kept(masks, name, weight).reshape(*weight.shape[:2], -1).any(2) for name, weight in chain.items()
        }
        fed: dict[str, Tensor] = {}
        reached = torch.ones(1, dtype=torch.bool)
        for name, link in links.items():
            # Of a flattened convolution several features come from each output.
            fed[name] = reached.repeat_interleave(link.shape[1] // len(reached))
            reached = (link & fed[name]).any(1)
        needed = torch.ones_like(reached)
        for name, link in reversed(links.items()):
            needed = needed.reshape(len(link), -1).any(1)
            found[name] = bool((link & fed[name] & needed[:, None]).any())
            needed = (link & needed[:, None]).any(0)
    return found


def _chains(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Weights by name of layers each of which takes the outputs of the one before it."""
    inside: set[str] = set()
    for prefix, module in model.named_modules():
        if prefix in inside or not _is_sequence(module):
            continue
        chain: dict[str, Tensor] = {}
        for name, leaf in _leaves(prefix, module):
            inside.add(name)
            if isinstance(leaf, _BY_FEATURE) or _is_sequence(leaf):
                continue
            weight = leaf.weight if isinstance(leaf, _LAYERS) and getattr(leaf, "groups", 1) == 1 else None
            weight = None if weight is not None and any(weight is own for own in chain.values()) else weight
            before = next(reversed(chain.values()), None)
            if before is not None and (weight is None or weight.shape[1] % len(before)):
                yield chain
                chain = {}
            if weight is not None:
                chain[f"{name}.weight"] = weight
        if chain:
            yield chain


def _is_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _leaves(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a sequence calls, in turn, and the sequences in it."""
    # Not named_children, which leaves out what is there for the second time.
    for name, own in module._modules.items():
        if own is None:
            continue
        full = f"{prefix}.{name}" if prefix else name
        yield full, own
        if _is_sequence(own):
            yield from _leaves(full, own)


def _in_blocks(model: Any, masks: Mapping[str, Tensor]) -> dict[str, bool]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "model_type", None) not in FAMILIES:
        return {}
    shape, found = block_shape(model), {}
    rotary = config.model_type not in _WITHOUT_ROTARY
    for block in range(len(find_blocks(model)[1])):
        for kind, carried_by in ((MLP, _by_neurons), (ATTENTION, _by_heads)):
            group = find_groups(model, block, kind, shape)[0]
            live, factor = _rows(group, masks)
            if not rotary and "key" in live:
                factor["key"] = live["key"]
            matrix = _matrix(group.consumer, masks)
            roles = carried_by(live, factor, matrix.any(2), shape.heads // shape.groups)
            found[group.consumer.view.parameter_name] = roles["input"]
            for stretch in group.producers:
                own = ("query", "key", "value") if stretch.role == PER_HEAD else (stretch.role,)
                name = stretch.view.parameter_name
                # A fused layer has a path where one of its parts has.
                found[name] = found.get(name, False) or any(roles[role] for role in own)
    return found


def _matrix(stretch: Stretch, masks: Mapping[str, Tensor]) -> Tensor:
    """What stays of a stretch, bool [units, size, features of the other side]."""
    view = stretch.view
    mask = _kept(masks, view.parameter_name, view.parameter)
    return stretch.of(mask.T if view.transposed else mask)


def _rows(group: Group, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """bool [units, size] by role: outputs that have a weight, and those that have one or a bias."""
    live: dict[str, Tensor] = {}
    factor: dict[str, Tensor] = {}
    for stretch in group.producers:
        rows, bias = _matrix(stretch, masks).any(2), stretch.read_bias()
        both = rows if bias is None else rows | (bias.cpu() != 0)
        roles = ("query", "key", "value") if stretch.role == PER_HEAD else (stretch.role,)
        live |= dict(zip(roles, rows.chunk(len(roles), 1), strict=True))
        factor |= dict(zip(roles, both.chunk(len(roles), 1), strict=True))
    return live, factor


def _by_neurons(live: dict[str, Tensor], factor: dict[str, Tensor], columns: Tensor, _: int) -> dict[str, bool]:
    """Whether each role, and the consumer, lies on a path through some neuron."""
    carried = torch.stack([*factor.values(), columns]).all(0) & torch.stack(list(live.values())).any(0)
    return {role: bool((rows & carried).any()) for role, rows in [*live.items(), ("input", columns)]}


def _by_heads(live: dict[str, Tensor], factor: dict[str, Tensor], columns: Tensor, share: int) -> dict[str, bool]:
    """The same through some head; `share` query heads have one key and value."""
    carried = live["value"][:, None] & columns.unflatten(1, (share, -1))
    heads = carried.any(2)

    def of_heads(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return rows["query"].unflatten(1, (share, -1)).any(2), rows["key"].any(1)[:, None]

    (query, key), (query_factor, key_factor) = of_heads(live), of_heads(factor)
    return {
        "query": bool((query & key_factor & heads).any()),
        "key": bool((query_factor & key & heads).any()),
        "value": bool(heads.any()),
        "input": bool(heads.any()),
    }
