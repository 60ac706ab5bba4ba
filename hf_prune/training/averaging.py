"""Averaged SGD for sparse training: the weights' mean since the held-out loss stopped falling, masked as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class WeightAverage:
    """The mean of a model's weights over the steps since averaging began (SNT-ASGD, https://arxiv.org/abs/2101.09048).

    It begins when the held-out loss at an epoch's end is not below the lowest of all epochs but the last `non_monotone`
    (NT-ASGD, Merity et al., https://arxiv.org/abs/1708.02182). A weight that dies leaves the mean at once; one that
    grows enters it as zero, and its mean is over the steps since then.

    Args:
        held_out_loss: nats a token of the module as it is.
        non_monotone: epochs.
    """

    def __init__(self, held_out_loss: Callable[[nn.Module], float], non_monotone: int) -> None:
        self.held_out_loss = held_out_loss
        self.non_monotone = non_monotone
        self.losses: list[float] = []
        # Whether weights are being averaged.
        self.began = False
        self._model: nn.Module | None = None
        self._masks: Mapping[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._steps: dict[str, Tensor] = {}

    def attach(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Average this model, whose masks change in place."""
        self._model, self._masks = model, masks
        for name, parameter in model.named_parameters():
            for kept in (self._means, self._steps):
                if name in kept:
                    kept[name] = kept[name].to(parameter.device)

    @torch.no_grad()
    def step(self) -> None:
        """Behind every step of the optimizer, and every update of the masks."""
        if not self.began:
            return
        assert self._model is not None
        for name, parameter in self._model.named_parameters():
            if name not in self._means:
                self._means[name] = torch.zeros_like(parameter, dtype=torch.float32)
                shape = parameter.shape if name in self._masks else ()
                self._steps[name] = torch.zeros(shape, device=parameter.device)
            steps = self._steps[name].add_(1)
            self._means[name].add_((parameter.detach().float() - self._means[name]) / steps)

    def end_epoch(self) -> None:
        """Look whether averaging begins."""
        if self.began:
            return
        assert self._model is not None
        loss = self.held_out_loss(self._model)
        earlier = self.losses[: -self.non_monotone]
        self.began = bool(earlier) and loss >= min(earlier)
        self.losses.append(loss)

    @torch.no_grad()
    def forget(self, name: str, stays: Tensor) -> None:
        """What a mask drops, and what has just grown, is no part of the mean any more."""
        if name in self._means:
            self._means[name].mul_(stays)
            self._steps[name].mul_(stays)

    @torch.no_grad()
    def write(self) -> None:
        """Put the mean into the model, where there is one."""
        assert self._model is not None
        if not self._means:
            logger.warning("averaging: the held-out loss fell to the end, so that the last weights are handed over.")
        for name, parameter in self._model.named_parameters():
            if name in self._means:
                parameter.copy_(self._means[name])

    # What a checkpoint keeps.

    def tensors(self) -> dict[str, Tensor]:
        """Means and the steps that they are over."""
        means = {f"mean.{name}": own.contiguous() for name, own in self._means.items()}
        return means | {f"steps.{name}": own.contiguous() for name, own in self._steps.items()}

    def said(self) -> dict[str, Any]:
        """What else there is to know."""
        return {"began": self.began, "losses": self.losses}

    def restore(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        """Go on from `tensors` and `said`."""
        self.began, self.losses = said["began"], list(said["losses"])
        for prefix, kept in (("mean.", self._means), ("steps.", self._steps)):
            kept.update({name.removeprefix(prefix): own for name, own in tensors.items() if name.startswith(prefix)})
