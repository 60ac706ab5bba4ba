"""The units of one block as tensors: which stretches of which weights they are, read and written whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.arguments import UNITS
from hf_prune.errors import BadInputError
from hf_prune.families import Coupling, Family, find_family
from hf_prune.layers import linear_layers
from hf_prune.structure.fusion import Fusion
from hf_prune.weights import WeightView, find_blocks

MLP, ATTENTION, HEADS, DEPTH = UNITS
# Rows that positions turn and that only make sense as a whole head: averages of two heads' queries are neither's.
MATCHING = frozenset({"query", "key", "query_key_value"})


@dataclass(frozen=True)
class Shape:
    """The sizes that a block's units follow from: MLP width, query heads, key-value groups, features a head."""

    width: int
    heads: int
    groups: int
    head_size: int


@dataclass(frozen=True)
class Stretch:
    """`units` times `size` consecutive features of one side of a layer, from `offset` on.

    Attributes:
        view: the layer's weight, [out, in] whatever is stored.
        role: what the features are (gate, query, ...; "input" on a consumer's side).
        rows: they are output features; input features otherwise.
    """

    view: WeightView
    role: str
    rows: bool
    offset: int
    units: int
    size: int

    @property
    def stop(self) -> int:
        """The first feature behind the stretch."""
        return self.offset + self.units * self.size

    def of(self, matrix: Tensor) -> Tensor:
        """What is the stretch's of a matrix [out, in], [units, size, features of the other side]."""
        side = matrix if self.rows else matrix.T
        return side[self.offset : self.stop].reshape(self.units, self.size, -1)

    def read(self) -> Tensor:
        """float32 [units, size, features of the other side]."""
        return self.of(self.view.read())

    def read_bias(self) -> Tensor | None:
        """float32 [units, size], where the features are outputs that have a bias."""
        bias = getattr(self.view.module, "bias", None) if self.rows else None
        if bias is None:
            return None
        return bias.detach().float()[self.offset : self.stop].reshape(self.units, self.size)


@dataclass(frozen=True)
class Group:
    """Interchangeable units of one block: any order of them is the same function.

    Attributes:
        kind: "mlp" (neurons), "attention" (key-value groups), "heads" (query heads of one key-value group).
        gain: float32 [in], what the normalisation in front multiplies the producers' inputs with.
    """

    kind: str
    block: int
    producers: list[Stretch]
    consumer: Stretch
    gain: Tensor = field(repr=False)

    @property
    def units(self) -> int:
        """How many there are."""
        return self.consumer.units

    def parameters_of_a_unit(self) -> int:
        """Weights and biases that go with one unit."""
        weights = sum(
            stretch.size * stretch.view.shape[int(stretch.rows)] for stretch in (*self.producers, self.consumer)
        )
        biases = sum(stretch.size for stretch in self.producers if stretch.read_bias() is not None)
        return weights + biases


def block_shape(model: nn.Module) -> Shape:
    """The sizes of a model's blocks, from its config and, where that leaves them open, its first block's layers."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    family = find_family(config.model_type)
    layers = _layers(model, 0)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_size = layers[family.attention.consumer].shape[1] // heads
    return Shape(layers[family.mlp.consumer].shape[1], heads, groups, head_size)


def find_groups(model: nn.Module, block: int, kind: str, shape: Shape) -> list[Group]:
    """The groups of one kind in one block: one, or with "heads" one for each key-value group.

    Args:
        shape: of this block as it is now.

    Raises:
        BadInputError: the family is not described.
    """
    family = find_family(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]
    layers = _layers(model, block)
    coupling = family.mlp if kind == MLP else family.attention
    gain = _gain(find_blocks(model)[1][block], coupling, family, layers)
    share = shape.heads // shape.groups
    sizes = {
        "gate": 1,
        "up": 1,
        "query": share * shape.head_size,
        "key": shape.head_size,
        "value": shape.head_size,
        "query_key_value": 3 * shape.head_size,
    }
    units = shape.width if kind == MLP else shape.groups
    producers = []
    for name, roles in coupling.producers.items():
        offset = 0
        for role in roles:
            producers.append(Stretch(layers[name], role, True, offset, units, sizes[role]))
            offset += units * sizes[role]
    inner = 1 if kind == MLP else share * shape.head_size
    consumer = Stretch(layers[coupling.consumer], "input", False, 0, units, inner)
    if kind != HEADS:
        return [Group(kind, block, producers, consumer, gain)]
    queries = [stretch for stretch in producers if stretch.role == "query"]
    return [
        Group(
            kind,
            block,
            [_heads_of(stretch, number, share, shape.head_size) for stretch in queries],
            _heads_of(consumer, number, share, shape.head_size),
            gain,
        )
        for number in range(shape.groups)
    ]


def rewrite(groups: Sequence[Group], fusions: Sequence[Fusion], keep: frozenset[str] = MATCHING) -> None:
    """Make the groups' layers smaller in place; `groups` are all of one kind in one block.

    Args:
        keep: roles that take the kept unit's own features instead of the fused ones.
    """
    pieces: dict[tuple[str, bool], list[tuple[Stretch, Fusion]]] = {}
    for group, fusion in zip(groups, fusions, strict=True):
        for stretch in (*group.producers, group.consumer):
            pieces.setdefault((stretch.view.name, stretch.rows), []).append((stretch, fusion))
    for (_, rows), parts in pieces.items():
        view = parts[0][0].view
        parts.sort(key=lambda part: part[0].offset)
        weight, bias = view.read(), getattr(view.module, "bias", None)
        side = weight if rows else weight.T
        new_side, new_bias, done = [], [], 0
        for stretch, fusion in parts:
            new_side += [side[done : stretch.offset], _fused(stretch.read(), stretch, fusion, keep).flatten(0, 1)]
            old = stretch.read_bias()
            if old is not None and bias is not None:
                new_bias += [bias[done : stretch.offset].float(), _fused(old, stretch, fusion, keep).flatten()]
            done = stretch.stop
        new = torch.cat([*new_side, side[done:]])
        set_weight(view, new if rows else new.T)
        if new_bias and bias is not None:
            own = torch.cat([*new_bias, bias[done:].float()]).to(bias.dtype)
            view.module.bias = nn.Parameter(own, requires_grad=bias.requires_grad)


def pad_units(group: Group, units: int) -> None:
    """Add units of zeros behind a group's own, up to `units`: the function stays."""
    own = torch.arange(group.units, device=group.consumer.view.parameter.device)
    one = torch.ones(group.units, device=own.device)
    behind = torch.zeros(units, dtype=torch.int64, device=own.device)
    rewrite([group], [Fusion(behind, own, own, one, one)], keep=frozenset())


def set_weight(view: WeightView, weight: Tensor) -> None:
    """Give a layer a weight [out, in] of another shape, in the layer's dtype and layout."""
    old = view.parameter
    stored = (weight.T if view.transposed else weight).to(old.dtype).contiguous()
    module: Any = view.module
    module.weight = nn.Parameter(stored, requires_grad=old.requires_grad)
    if view.transposed:
        module.nx, module.nf = stored.shape
    else:
        module.out_features, module.in_features = stored.shape


def _fused(features: Tensor, stretch: Stretch, fusion: Fusion, keep: frozenset[str]) -> Tensor:
    if not stretch.rows:
        return fusion.consume(features)
    return features[fusion.kept] if stretch.role in keep else fusion.produce(features)


def _heads_of(stretch: Stretch, number: int, share: int, head_size: int) -> Stretch:
    """The query heads of one key-value group."""
    return Stretch(
        stretch.view, stretch.role, stretch.rows, stretch.offset + number * share * head_size, share, head_size
    )


def _layers(model: nn.Module, block: int) -> dict[str, WeightView]:
    """The linear layers of one block by their name inside it.

    Raises:
        BadInputError: a layer that the family's description names is not there.
    """
    prefix, blocks = find_blocks(model)
    layers = {
        name: WeightView(f"{prefix}.{block}.{name}", block, layer, transposed)
        for name, layer, transposed in linear_layers(blocks[block])
    }
    model_type = model.config.get_text_config().model_type  # type: ignore[union-attr, operator]
    family = find_family(model_type)
    for coupling in (family.mlp, family.attention):
        for name in (*coupling.producers, coupling.consumer):
            if name not in layers:
                raise BadInputError(
                    f"model_name_or_path: {prefix}.{block} has no layer {name}, which a {model_type} should have by "
                    "hf_prune/families.py; describe this model there."
                )
    return layers


def _gain(block: nn.Module, coupling: Coupling, family: Family, layers: dict[str, WeightView]) -> Tensor:
    """The normalisation's gain; ones where it has none."""
    norm = block.get_submodule(coupling.norm)
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(block, "do_layer_norm_before", True) is False:
        # OPT-350m normalises behind.
        return torch.ones(layers[next(iter(coupling.producers))].shape[1])
    return weight.detach().float() + family.gain_offset
