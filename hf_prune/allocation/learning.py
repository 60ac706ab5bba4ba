"""How far a learning has come: the best state so far, when to stop, and a form that can be written down."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Learning:
    """How far the learning has come, in a form that can be written down.

    With trained weights the best state holds them too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, start: Tensor) -> None:
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.steps = 0
        self.best = math.inf
        self.best_scores = start
        self.best_weights = self._weights()
        self.looks_without_gain = 0

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters[1:]]

    def judge(self, scores: Tensor, loss: float) -> None:
        """Keep the scores (and weights) if the loss is the lowest so far; also False for one that is not a number."""
        self.looks_without_gain += 1
        if loss < self.best:
            self.best, self.best_scores, self.best_weights = loss, scores.clone(), self._weights()
            self.looks_without_gain = 0

    def finish(self) -> None:
        """Put the best weights back."""
        for parameter, value in zip(self.parameters[1:], self.best_weights, strict=True):
            parameter.data.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, as named tensors that share the memory of what goes on changing."""
        tensors = {f"parameter.{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        tensors |= {f"best.{number}": value for number, value in enumerate([self.best_scores, *self.best_weights])}
        for number, own in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": value for key, value in own.items()}
        numbers = torch.tensor([self.steps, self.looks_without_gain, self.best], dtype=torch.float64)
        return {name: value.contiguous() for name, value in {**tensors, "numbers": numbers}.items()}

    @staticmethod
    def steps_of(tensors: Mapping[str, Tensor]) -> int:
        """Steps that were done when `state` was taken."""
        return int(tensors["numbers"][0])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        _, looks, self.best = tensors["numbers"].tolist()
        self.steps, self.looks_without_gain = self.steps_of(tensors), int(looks)
        for number, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{number}"])
        self.best_scores, *self.best_weights = [tensors[f"best.{number}"] for number in range(len(self.parameters))]
        adam = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, place, key = name.split(".")
                adam["state"].setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict(adam)
