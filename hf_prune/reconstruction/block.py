"""`reconstruct: block`: train each pruned block to do what the dense block did, before the walk goes on.

The target is the output of the DENSE block on the inputs that the PRUNED blocks before it hand over. Surviving weights
and norms move, masks hold, and the best state on held-out windows is kept, so that a block never ends worse than it
began. Block by block, without labels: Transformer Matching in 3BASiL, local reconstruction in arXiv 2510.14444.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_prune.engine.block_training import BlockTask
from hf_prune.engine.results import BlockOutcome
from hf_prune.errors import BadInputError

TARGETS = ("block", "model")


@dataclass(frozen=True)
class BlockReconstruction:
    """Settings of the training.

    Args:
        reconstruct_passes: passes over the calibration windows; 0.5 trains on half of them.
        reconstruct_seconds: budget of each block; unlimited unless given.
        reconstruct_learning_rate: Adam's, with a cosine to zero over the passes, as a share of how far pruning moved
            the weights: times each matrix's root mean square and the square root of its relative output error, for a
            norm those of the norm and of the block (our extension: a matrix that is nearly right takes small steps).
        reconstruct_batch_size: windows a step (rounded up to whole forwards).
        reconstruct_held_out: share of the calibration windows that is never trained on and decides what is kept.
        reconstruct_target: `block`, the dense block on the pruned blocks' outputs; `model`, the dense model's own
            hidden states, which takes one more forward pass (our extension).
    """

    reconstruct_passes: float = 8
    reconstruct_seconds: float | None = None
    reconstruct_learning_rate: float = 0.03
    reconstruct_batch_size: int = 2
    reconstruct_held_out: float = 0.125
    reconstruct_target: str = "block"

    summary: ClassVar[str] = "short training of each pruned block towards its dense outputs; masks hold"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2510.14444"

    def __post_init__(self) -> None:
        if self.reconstruct_passes <= 0:
            raise BadInputError(f"reconstruct_passes: {self.reconstruct_passes} must be above 0; 8 is usual.")
        if self.reconstruct_seconds is not None and self.reconstruct_seconds <= 0:
            raise BadInputError(
                f"reconstruct_seconds: {self.reconstruct_seconds} must be above 0; leave it out for no limit."
            )
        if self.reconstruct_learning_rate <= 0:
            raise BadInputError(f"reconstruct_learning_rate: {self.reconstruct_learning_rate} must be above 0.")
        if self.reconstruct_batch_size < 1:
            raise BadInputError(f"reconstruct_batch_size: {self.reconstruct_batch_size} is too few; use 1 or more.")
        if not 0 < self.reconstruct_held_out < 1:
            raise BadInputError(f"reconstruct_held_out: {self.reconstruct_held_out} is outside (0, 1).")
        if self.reconstruct_target not in TARGETS:
            raise BadInputError(f"reconstruct_target: {self.reconstruct_target!r} is not one of {', '.join(TARGETS)}.")

    def update_block(self, task: BlockTask) -> BlockOutcome:
        """Train in place; the block's parameters are float32 while this runs."""
        start = perf_counter()
        trained = [*(own.parameter for own in task.weights), *task.norms]
        before = best = held_out_loss(task)
        changes = [own.change for own in task.weights]
        # A loss that is not a number leaves the norms where they are, and everything in the end.
        felt = math.sqrt(before) if math.isfinite(before) else 0.0
        # Zeros say nothing about their size; Gemma's norms, which add one, begin with them.
        changes += [felt * (float(norm.detach().square().mean().sqrt()) or 1.0) for norm in task.norms]
        optimizer = torch.optim.Adam(
            [
                {"params": [parameter], "lr": self.reconstruct_learning_rate * change}
                for parameter, change in zip(trained, changes, strict=True)
            ]
        )
        per_pass = max(len(task.steps), 1)
        total = max(round(self.reconstruct_passes * per_pass), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
        kept = [parameter.detach().clone() for parameter in trained]
        done = 0
        for batches in islice(cycle(task.steps), total):
            self._step(task, batches, trained, optimizer)
            schedule.step()
            done += 1
            if done % per_pass and done < total:
                continue
            now = held_out_loss(task)
            # Also False for a loss that is not a number.
            if now < best:
                best = now
                kept = [parameter.detach().clone() for parameter in trained]
            spent = task.agree(perf_counter() - start)
            if self.reconstruct_seconds is not None and spent * (1 + per_pass / done) > self.reconstruct_seconds:
                break
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        return BlockOutcome(before, best, done / per_pass, perf_counter() - start)

    def _step(self, task: BlockTask, batches: Sequence[int], trained: Sequence[nn.Parameter], optimizer: Any) -> None:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        with torch.enable_grad():
            for batch in batches:
                output, target = task.outputs(batch)
                loss(output, target).sum().backward()
        for parameter in trained:
            assert parameter.grad is not None
            task.total(parameter.grad)
        for own in task.weights:
            assert own.parameter.grad is not None
            own.parameter.grad *= own.mask  # Adam moves nothing whose gradients are all zero
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance of each token's output to its target: float32 [sequences, tokens]."""
    return (output.float() - target.float()).square().sum(dim=-1)


def held_out_loss(task: BlockTask) -> float:
    """Squared error over the held-out windows as a share of the targets' squared norm."""
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in task.held_out:
            output, target = task.outputs(batch)
            sums += torch.stack([loss(output, target).sum(), target.float().square().sum()]).cpu().double()
    task.total(sums)
    return float(sums[0] / sums[1].clamp(min=torch.finfo(torch.float64).tiny))
