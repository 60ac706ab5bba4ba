"""How far a learning has come: the best state so far, when to stop, and a form that can be written down."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Learning:
    """How far the learning has come, in a form that can be written down.

    The first parameter of the optimizer holds the scores, the others are trained weights, if any. The best state is
    that of the weights and of the sparsities, float64 [layers].
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.steps = 0
        self.best = math.inf
        self.best_sparsities = torch.zeros(0)
        self.best_weights = self._weights()
        self.looks_without_gain = 0

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters[1:]]

    def judge(self, loss: float, sparsities: Tensor) -> None:
        """Keep sparsities and weights if the loss is the lowest so far; one that is not a number never is."""
        self.looks_without_gain += 1
        if loss < self.best or not len(self.best_sparsities):
            self.best = math.inf if math.isnan(loss) else loss
            self.best_sparsities, self.best_weights = sparsities, self._weights()
            self.looks_without_gain = 0

    def is_stuck(self, patience: int) -> bool:
        """Whether so many looks in turn brought nothing."""
        return self.looks_without_gain >= patience

    def finish(self) -> None:
        """Put the best weights back."""
        for parameter, value in zip(self.parameters[1:], self.best_weights, strict=True):
            parameter.data.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, as named tensors that share the memory of what goes on changing."""
        tensors = {f"parameter.{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        tensors |= {f"best.{number}": value for number, value in enumerate([self.best_sparsities, *self.best_weights])}
        for number, own in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": value for key, value in own.items()}
        tensors["numbers"] = torch.tensor([self.steps, self.looks_without_gain, self.best], dtype=torch.float64)
        return {name: value.contiguous() for name, value in tensors.items()}

    @staticmethod
    def is_over(tensors: Mapping[str, Tensor], steps: int, patience: int) -> bool:
        """Whether nothing was left to do when `state` was taken."""
        done, looks, _ = tensors["numbers"].tolist()
        return done >= steps or looks >= patience

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        steps, looks, self.best = tensors["numbers"].tolist()
        self.steps, self.looks_without_gain = int(steps), int(looks)
        for number, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{number}"])
        self.best_sparsities, *self.best_weights = (tensors[f"best.{number}"] for number in range(len(self.parameters)))
        adam = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, place, key = name.split(".")
                adam["state"].setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict(adam)
