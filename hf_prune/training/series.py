"""What is watched of a model while it trains, and what goes when a series goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_prune.structure.groups import block_shape, find_groups
from hf_prune.training.checkpoints import fingerprint
from hf_prune.weights import find_blocks

# 0.1 of 30 is 3, whatever floats say.
ROUNDING = 1e-9


class Series(Protocol):
    """Numbers of a model, one for each series, in an order that stays."""

    def observe(self, model: nn.Module) -> Tensor:
        """float [series]."""
        ...

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """bool masks by the parameters' names, True stays, for bool `keep` [series]."""
        ...

    def label(self, place: int) -> str:
        """What a series is, for people."""
        ...

    def least(self, ratio: float) -> dict[str, tuple[int, int]]:
        """For each parameter, in order: how many series it has, and how many stay so that `ratio` of its weights do."""
        ...

    @property
    def identity(self) -> str:
        """Fingerprint of what is watched."""
        ...


class WeightSeries:
    """The weights of some parameters: every one, or as many of each as `samples` says, chosen by the seed.

    Args:
        names: of the parameters.
        samples: of each parameter; all of it where it has no more, and where None is given.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], samples: int | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shapes = {name: model.get_parameter(name).shape for name in names}
        self.places = {}
        for name, shape in self.shapes.items():
            count = shape.numel()
            self.places[name] = (
                torch.arange(count)
                if samples is None or samples >= count
                else torch.randperm(count, generator=generator)[:samples].sort().values
            )

    def observe(self, model: nn.Module) -> Tensor:
        """The weights themselves, raw."""
        return torch.cat(
            [
                model.get_parameter(name).detach().reshape(-1)[places.to(model.get_parameter(name).device)]
                for name, places in self.places.items()
            ]
        )

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Weights that are not watched stay."""
        masks = {}
        for (name, places), own in zip(self.places.items(), self._split(keep), strict=True):
            mask = torch.ones(self.shapes[name].numel(), dtype=torch.bool)
            mask[places] = own
            masks[name] = mask.reshape(self.shapes[name])
        return masks

    def label(self, place: int) -> str:
        """`layer.weight[3, 7]`."""
        for name, places in self.places.items():
            if place < len(places):
                index = torch.unravel_index(places[place], self.shapes[name])
                return f"{name}[{', '.join(str(int(own)) for own in index)}]"
            place -= len(places)
        raise IndexError(place)

    def least(self, ratio: float) -> dict[str, tuple[int, int]]:
        """Weights that are not watched stay, and count."""
        sizes = {name: (len(places), self.shapes[name].numel()) for name, places in self.places.items()}
        return {
            name: (own, max(math.ceil(ratio * every - ROUNDING) - (every - own), 0))
            for name, (own, every) in sizes.items()
        }

    @property
    def identity(self) -> str:
        """Of names and places."""
        return fingerprint({name: list(shape) for name, shape in self.shapes.items()}, self.places)

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([len(places) for places in self.places.values()])


class UnitSeries:
    """The Euclidean norms of all of a unit's weights, block by block.

    Args:
        model: a causal language model of a described family.
        kinds: `mlp` neurons, key-value groups of `attention`, query `heads` (through all key-value groups).

    Raises:
        BadInputError: the family is not described.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[str]) -> None:
        shape = block_shape(model)
        blocks = len(find_blocks(model)[1])
        self.units = [
            (kind, block, sum(group.units for group in find_groups(model, block, kind, shape)))
            for block in range(blocks)
            for kind in kinds
        ]

    def observe(self, model: nn.Module) -> Tensor:
        """A norm for each unit, float32."""
        shape = block_shape(model)
        norms = []
        for kind, block, _ in self.units:
            # The groups of heads share their layers: each is read once.
            squares: dict[tuple[str, bool], Tensor] = {}
            for group in find_groups(model, block, kind, shape):
                parts = []
                for stretch in (*group.producers, group.consumer):
                    layer = (stretch.view.name, stretch.rows)
                    if layer not in squares:
                        squares[layer] = stretch.view.read().square().sum(dim=int(stretch.rows))
                    own = squares[layer][stretch.offset : stretch.stop]
                    parts.append(own.reshape(stretch.units, stretch.size).sum(dim=1))
                norms.append(torch.stack(parts).sum(dim=0).sqrt())
        return torch.cat(norms)

    def scores(self, values: Tensor) -> dict[str, Tensor]:
        """A number for each unit as a file of importances holds them: `mlp.0`, `attention.0`, ..."""
        parts = values.split([count for _, _, count in self.units])
        return {f"{kind}.{block}": own.clone() for (kind, block, _), own in zip(self.units, parts, strict=True)}

    def kept(self, numbers: Mapping[int, Mapping[str, Sequence[int]]]) -> Tensor:
        """Which units stay, bool [series], by block and kind as in `ReduceResult.kept`; all of kinds not named."""
        parts = []
        for kind, block, count in self.units:
            stays = numbers.get(block, {}).get(kind)
            parts.append(torch.ones(count, dtype=torch.bool))
            if stays is not None:
                parts[-1][:] = False
                parts[-1][list(stays)] = True
        return torch.cat(parts)

    def label(self, place: int) -> str:
        """`mlp 3, unit 7`: kind, block, number."""
        for kind, block, count in self.units:
            if place < count:
                return f"{kind} {block}, unit {place}"
            place -= count
        raise IndexError(place)


class RowSeries:
    """The Euclidean norms of the rows, or with `transposed` names the columns, that make each output of a layer."""

    def __init__(self, model: nn.Module, names: Sequence[str], transposed: frozenset[str] = frozenset()) -> None:
        self.shapes = {name: model.get_parameter(name).shape for name in names}
        self.transposed = transposed

    def observe(self, model: nn.Module) -> Tensor:
        """A norm for each output."""
        return torch.cat(
            [model.get_parameter(name).detach().float().norm(dim=self._inputs(name)) for name in self.shapes]
        )

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Whole rows go."""
        outputs = [shape[1 - self._inputs(name)] for name, shape in self.shapes.items()]
        return {
            name: own.unsqueeze(self._inputs(name)).expand(shape).clone()
            for (name, shape), own in zip(self.shapes.items(), keep.split(outputs), strict=True)
        }

    def label(self, place: int) -> str:
        """`layer.weight, output 3`."""
        for name, shape in self.shapes.items():
            outputs = shape[1 - self._inputs(name)]
            if place < outputs:
                return f"{name}, output {place}"
            place -= outputs
        raise IndexError(place)

    def least(self, ratio: float) -> dict[str, tuple[int, int]]:
        """Of whole rows."""
        outputs = {name: shape[1 - self._inputs(name)] for name, shape in self.shapes.items()}
        return {name: (count, math.ceil(ratio * count - ROUNDING)) for name, count in outputs.items()}

    @property
    def identity(self) -> str:
        """Of names and sizes."""
        return fingerprint([{name: list(own) for name, own in self.shapes.items()}, sorted(self.transposed)], {})

    def _inputs(self, name: str) -> int:
        return 0 if name in self.transposed else 1
