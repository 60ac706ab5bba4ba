"""What surrounds the training of one block: batches, processes, precision, and masks that hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.engine.stream import Stream
from hf_prune.errors import BadInputError, RunError
from hf_prune.layers import linear_layers
from hf_prune.weights import WeightView


@dataclass(frozen=True)
class TrainedWeight:
    """A pruned layer's float32 parameter, its mask in the parameter's own layout, and how far pruning moved it."""

    parameter: nn.Parameter
    mask: Tensor
    change: float


@dataclass
class BlockTask:
    """A pruned block, ready to be trained.

    The same batches make the same steps whatever the number of processes; each computes those whose windows it holds.

    Attributes:
        weights: of the pruned layers.
        norms: float32 scales and shifts of the norms.
        steps: numbers of the batches of each optimizer step that are this process's to compute.
        held_out: numbers of its batches that are never trained on.
        run: (output of the pruned block, its target) of a batch.
    """

    weights: list[TrainedWeight]
    norms: list[nn.Parameter]
    steps: list[list[int]]
    held_out: list[int]
    run: Callable[[int], tuple[Tensor, Tensor]]

    def outputs(self, batch: int) -> tuple[Tensor, Tensor]:
        """(output of the pruned block, its target), both [sequences, tokens, width]."""
        return self.run(batch)

    def total(self, tensor: Tensor) -> None:
        """Sum over processes, in place."""
        distributed.sum_everywhere(tensor)

    def agree(self, value: float) -> float:
        """The main process's value, everywhere."""
        shared = torch.tensor([value], dtype=torch.float64)
        distributed.send_from(shared, 0)
        return float(shared)


def train_block(
    stream: Stream, index: int, views: Sequence[tuple[WeightView, float]], targets: Sequence[Any], updater: Any
) -> Any:
    """Let `updater` train block `index`; weights that are zero stay zero.

    Args:
        views: the pruned matrices, each with how far pruning moved its weights (`ViewResult.change`).
        targets: for each of the stream's chunks, what the block should put out.

    Raises:
        BadInputError: too few windows to hold some out.
        RunError: the training brought a zero back.
    """
    batches = _batches(stream.window_counts, updater.reconstruct_batch_size)
    held_out = _held_out(len(batches), updater.reconstruct_held_out)
    place = {number: own for own, number in enumerate(stream.numbers)}
    rest = [number for number in range(len(batches)) if number not in held_out]
    windows = max(stop - start for _, start, stop in batches)
    size = ceil(updater.reconstruct_batch_size / windows)
    mine = [batches[number][0] in place for number in range(len(batches))]
    block = stream.runner.blocks[index]
    dtype = next(block.parameters()).dtype

    def run(batch: int) -> tuple[Tensor, Tensor]:
        chunk, start, stop = batches[batch]
        own = place[chunk]
        states = stream.hidden[own]
        half = torch.autocast(stream.runner.device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
        with half:
            output = stream.runner.run(
                index,
                stream.chunks[own][start:stop],
                None if states is None else states[start:stop],
                gradients=torch.is_grad_enabled(),
            )
        return output, targets[own][start:stop].to(stream.runner.device)

    with _trainable(stream.runner.model, block):
        weights = _trained_weights(views)
        linear = {layer for _, layer, _ in linear_layers(block)}
        task = BlockTask(
            weights=list(weights.values()),
            norms=[
                parameter
                for module in block.modules()
                if module not in linear
                for parameter in module.parameters(recurse=False)
                if parameter.ndim == 1
            ],
            steps=[[b for b in rest[first : first + size] if mine[b]] for first in range(0, len(rest), size)],
            held_out=[number for number in held_out if mine[number]],
            run=run,
        )
        for parameter in (*(own.parameter for own in task.weights), *task.norms):
            parameter.requires_grad_(True)
        outcome = updater.update_block(task)
        for view, _ in views:
            if bool((view.stored * ~view.own_part(weights[view.parameter].mask)).any()):
                raise RunError(f"{view.name}: training brought pruned weights back; please report this.")
        for parameter in weights:
            distributed.send_from(parameter.data, 0)
        for parameter in task.norms:
            distributed.send_from(parameter.data, 0)
    return outcome


def _trained_weights(views: Sequence[tuple[WeightView, float]]) -> dict[nn.Parameter, TrainedWeight]:
    """By parameter, which experts share: what is not in a view is masked, and moves are root mean squares of theirs."""
    members: dict[nn.Parameter, list[tuple[WeightView, float]]] = {}
    for view, change in views:
        members.setdefault(view.parameter, []).append((view, change))
    found = {}
    for parameter, own in members.items():
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        for view, _ in own:
            view.own_part(mask).copy_(view.stored != 0)
        moved = sum(change**2 * view.stored.numel() for view, change in own)
        change = own[0][1] if len(own) == 1 else sqrt(moved / sum(view.stored.numel() for view, _ in own))
        found[parameter] = TrainedWeight(parameter, mask, change)
    return found


def _batches(window_counts: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """(chunk, first window, behind the last window) of every batch of at most `size` windows of one chunk."""
    return [
        (chunk, start, min(start + size, count))
        for chunk, count in enumerate(window_counts)
        for start in range(0, count, size)
    ]


def _held_out(batches: int, share: float) -> set[int]:
    """Batches spread evenly over the calibration set, at least one, and at least one left to train on."""
    if batches < 2:
        raise BadInputError(
            "num_calibration_samples: reconstruct: block holds some windows out, and these make one batch only; use "
            "more windows or a smaller reconstruct_batch_size."
        )
    count = min(max(round(batches * share), 1), batches - 1)
    return {(2 * number + 1) * batches // (2 * count) for number in range(count)}


@contextmanager
def _trainable(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """The block in float32, nothing recorded for gradients until asked; everything as it was afterwards."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    dtypes = {parameter: parameter.dtype for parameter in block.parameters()}
    model.requires_grad_(False)
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
