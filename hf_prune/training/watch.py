"""A training that is looked at every epoch: a figure, how far each layer moved, and the end where it is good enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.errors import BadInputError
from hf_prune.training.rounds import Trained
from hf_prune.training.trainer import FinishedBefore


class Watch(TrainerCallback):
    """Looks at a figure every `every` steps, and ends a training that has reached the benchmark.

    What it has seen is in the Trainer's log, and so in its checkpoints. It comes behind callbacks that set weights.

    Args:
        figure: higher is better.
        every: steps from one look to the next.
        benchmark: a training that has reached it ends; None, none does.
        steps: that the training must have, so that what was planned with them holds.
        layers: names of parameters; each look has the norm of what a layer has moved since the look before. The first
            look behind a cut in between has none.
        behind: looks up to this step are those of the training that a checkpoint comes from.

    Raises:
        BadInputError: the training has other steps.
    """

    def __init__(
        self,
        figure: Callable[[nn.Module], float],
        every: int,
        benchmark: float | None,
        steps: int,
        layers: Sequence[str] = (),
        behind: int = 0,
    ) -> None:
        self.figure = figure
        self.every = every
        self.benchmark = benchmark
        self.steps = steps
        self.layers = layers
        self.behind = behind
        self._start = perf_counter()
        self._before: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.max_steps != self.steps:
            raise BadInputError(
                f"max_steps: the training has {state.max_steps} steps and {self.steps} were planned; write max_steps."
            )
        looks = self.seen(state).looks
        self._start = perf_counter() - (looks[-1][2] if looks else 0.0)
        if looks and self._reached(looks[-1][1]):
            raise FinishedBefore
        self._before = {} if state.global_step % self.every else self._weights(kwargs["model"])

    def _reached(self, value: float) -> bool:
        return self.benchmark is not None and value >= self.benchmark

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: model.get_parameter(name).detach().clone() for name in self.layers}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            model = kwargs["model"]
            value, weights = float(self.figure(model)), self._weights(model)
            look: dict[str, Any] = {
                "step": state.global_step,
                "watched": value,
                "seconds": perf_counter() - self._start,
                "moved": {name: float((weights[name] - own).norm()) for name, own in self._before.items()},
            }
            state.log_history.append(look)
            self._before = weights
            if self._reached(value):
                control.should_training_stop = True

    def seen(self, state: TrainerState) -> Trained:
        """The training, with (step, figure, seconds) and the norms of every look."""
        history: list[dict[str, Any]] = state.log_history
        every = [own for own in history if "watched" in own and own["step"] > self.behind]
        looks = [(int(own["step"]), own["watched"], own["seconds"]) for own in every]
        return Trained(int(state.global_step), looks, [own["moved"] for own in every])
