"""A whole model under one threshold a layer: masked forwards, and gradients that reach the thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_prune.engine.capture import patched
from hf_prune.engine.experts import computed_by, members_of, run_experts
from hf_prune.weights import WeightView


class ThresholdedWeight(torch.autograd.Function):
    """W where |W| * scale * other > t, zero elsewhere; the step's derivative is replaced by that of a ramp around it.

    Either scale is None or float32 that broadcasts over W. With q = |W| * scale * other the mask's stand-in is
    clamp((q - t) / (2 window) + 1/2, 0, 1), whose derivative by t is -1 / (2 window) where |q - t| < window: FCPTS's
    clipped straight-through estimator is the case window = 1. The weights' own gradient is that of the masked product.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor | None, other: Tensor | None, threshold: Tensor, window: float
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, other, threshold)
        ctx.window = window
        return weight * (_scores(weight, scale, other) > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        weight, scale, other, threshold = ctx.saved_tensors
        distance = _scores(weight, scale, other).sub_(threshold)
        by_weight = by_threshold = None
        if ctx.needs_input_grad[3]:
            near = distance.abs() < ctx.window
            by_threshold = -(gradients[0] * weight).mul_(near).sum(dtype=torch.float32) / (2 * ctx.window)
        if ctx.needs_input_grad[0]:
            by_weight = gradients[0] * (distance > 0)
        return by_weight, None, None, by_threshold, None


def _scores(weight: Tensor, *scales: Tensor | None) -> Tensor:
    scores = weight.abs().float()
    for scale in scales:
        if scale is not None:
            scores = scores * scale
    return scores


@dataclass(frozen=True)
class ThresholdedView:
    """A weight matrix, what its scores are multiplied by, and its window.

    Attributes:
        scale: float32 [in], or None.
        window: half-width around its threshold in which weights count.
        row_scale: float32 [out], or None.
    """

    view: WeightView
    scale: Tensor | None
    window: float
    row_scale: Tensor | None = None

    def masked(self, threshold: Tensor) -> Tensor:
        """The weight under `threshold`, a 0-dimensional tensor, in the layer's own layout."""
        columns, rows = self.scale, self.row_scale
        if self.view.transposed:
            columns = None if columns is None else columns[:, None]
        elif rows is not None:
            rows = rows[:, None]
        weight = self.view.own_part(self.view.parameter)
        masked: Tensor = ThresholdedWeight.apply(weight, columns, rows, threshold, self.window)
        return masked


@contextmanager
def thresholded(
    blocks: Iterable[nn.Module], views: Sequence[ThresholdedView], thresholds: Tensor, *, recompute: bool = False
) -> Iterator[None]:
    """Forwards inside use masked weights; nothing of the model is changed.

    Args:
        thresholds: float32 [views].
        recompute: keep only the blocks' inputs for the backward pass and compute the rest again.
    """
    with ExitStack() as stack:
        numbers: dict[str, int] = {}
        layers: dict[nn.Module, list[tuple[int, ThresholdedView]]] = {}
        for number, own in enumerate(views):
            numbers[own.view.name] = number
            if own.view.expert is None:
                layers.setdefault(own.view.module, []).append((number, own))
        for module, members in layers.items():
            stack.enter_context(patched(module, _masked_forward(module, members, thresholds)))
        experts = members_of(own.view for own in views)
        stack.enter_context(
            computed_by(
                {
                    module: _masked_experts(
                        module, {key: numbers[view.name] for key, view in members.items()}, views, thresholds
                    )
                    for module, members in experts.items()
                }
            )
        )
        if recompute:
            for block in blocks:
                stack.enter_context(patched(block, recomputed(block.forward)))
        yield


def _masked_forward(
    module: nn.Module, members: Sequence[tuple[int, ThresholdedView]], thresholds: Tensor
) -> Callable[[Tensor], Tensor]:
    """Of a linear layer whose weight is that of one view, or of some views for its parts; other parts stay."""

    def forward(inputs: Tensor) -> Tensor:
        number, first = members[0]
        if first.view.outputs is None:
            weight = first.masked(thresholds[number])
        else:
            weight = first.view.parameter.detach().clone()
            for number, own in members:
                own.view.own_part(weight).copy_(own.masked(thresholds[number]))
        bias = getattr(module, "bias", None)
        return functional.linear(inputs, weight.T if first.view.transposed else weight, bias)

    return forward


def _masked_experts(
    module: nn.Module, numbers: dict[tuple[int, str], int], views: Sequence[ThresholdedView], thresholds: Tensor
) -> Callable[..., Tensor]:
    def linear(expert: int, tensor: str, inputs: Tensor, weight: Tensor) -> Tensor:
        number = numbers.get((expert, tensor))
        if number is not None:
            masked = views[number].masked(thresholds[number])
            weight = masked.T if views[number].view.transposed else masked
        return functional.linear(inputs, weight)

    return lambda _, *args: run_experts(module, linear, *args)


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that keeps its inputs alone for the backward pass and computes the rest again."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
