"""Masks that move while a Trainer trains: weights die, as many grow elsewhere, resumable to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_prune.checkpoint.files import write_whole
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.methods.dynamic_sparse import FIRST_THRESHOLD, DynamicSparseConfig, updated_masks
from hf_prune.training.averaging import WeightAverage
from hf_prune.training.masks import MaskCallback

TENSORS, STATE = "dynamic_masks.safetensors", "dynamic_masks.json"
# Of the running mean of dense gradients, as in SGD with momentum.
MOMENTUM = 0.9
# Keeps the seeds of different runs' steps apart.
SEED_STRIDE = 1_000_003


class DynamicMaskCallback(MaskCallback):
    """Holds masks, and lets some weights die and as many grow every so many steps.

    Dense gradients are looked at before they are masked, and added up over the processes, so that every one of them
    comes to the same masks: those of an update's step for `growth: gradient`, which takes a float32 copy of the pruned
    parameters for that step, and a running mean of all for momentum, which takes another all along. A weight that grows
    begins at zero, and what the optimizer remembers weight by weight of its place and of those that died is forgotten;
    one that dies and grows again in the same step keeps both.
    Masks stand in each of the Trainer's checkpoints, from where a training with the same `output_dir` goes on.

    Args:
        masks: bool, by the parameters' names; changed in place.
        config: how they move.
        seed: of random growth; each step has random numbers of its own.
        average: keeps the weights' mean, masked as they are.

    Raises:
        BadInputError: the training ends before the first update, it scales its gradients (fp16), FSDP has sharded the
            model, the optimizer's state is packed, or a checkpoint lacks its masks.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        config: DynamicSparseConfig,
        seed: int = 0,
        average: WeightAverage | None = None,
    ) -> None:
        super().__init__(masks)
        self.config = config
        self.seed = seed
        self.average = average
        self.threshold = FIRST_THRESHOLD
        self.updates = 0
        self._gradient: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._watching: list[Any] = []
        self._epoch = 1

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks as they are now, by name."""
        return self.holder.masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, batches = kwargs["model"], len(kwargs["train_dataloader"])
        self._epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in self.masks}
        self._check(parameters, args, state)
        if self.config.needs_momentum:
            self._momentum = {name: _zeros(parameter) for name, parameter in parameters.items()}
        if state.global_step:
            self._restore(_checkpoint(args, state))
        if self.config.needs_gradient or self.config.needs_momentum:
            # Before the hooks that mask: they are called in the order they were added in.
            self._watching = [own.register_hook(self._watch(name, state)) for name, own in parameters.items()]
        super().on_train_begin(args, state, control, **kwargs)
        if self.average is not None:
            self.average.attach(model, self.masks)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if self._looks(state.global_step, state):
            self._gather(model)
        if self.config.needs_momentum:
            for name, gradient in self._gradient.items():
                self._momentum[name].mul_(MOMENTUM).add_(gradient)
        # Before masks move: what has just grown is zero. And not in on_epoch_end, which a run does not come by that
        # goes on from a checkpoint of this step.
        if self.average is not None and state.global_step % self._epoch == 0:
            self.average.end_epoch()
        if self._is_due(state.global_step, state):
            self._update(model, kwargs["optimizer"], state)
        self._gradient.clear()
        if self.average is not None:
            self.average.step()
        super().on_step_end(args, state, control, **kwargs)
        self._keep(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_epoch_end(args, state, control, **kwargs)
        self._keep(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.average is not None:
            # The weights that the run hands over.
            self.average.write()
        super().on_train_end(args, state, control, **kwargs)

    def detach(self) -> None:
        super().detach()
        for hook in self._watching:
            hook.remove()
        self._watching = []

    # Within.

    def _check(self, parameters: Mapping[str, nn.Parameter], args: TrainingArguments, state: TrainerState) -> None:
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                raise BadInputError(f"{name}: masks cannot move in a model that FSDP has sharded; train it without.")
        if args.fp16 and (self.config.needs_gradient or self.config.needs_momentum):
            raise BadInputError(
                "fp16: it scales gradients by what overflows, and growth or redistribution looks at them; write "
                "bf16: true."
            )
        if self._interval >= state.max_steps:
            raise BadInputError(
                f"update_steps: the masks would first move behind step {self._interval}, and the training has "
                f"{state.max_steps}; lower it or train longer."
            )

    @property
    def _interval(self) -> int:
        return self.config.update_steps or self._epoch

    def _is_due(self, step: int, state: TrainerState) -> bool:
        # Nothing dies behind the last step: what grew would never have been trained.
        return step % self._interval == 0 and step < state.max_steps

    def _looks(self, step: int, state: TrainerState) -> bool:
        """Whether a step's dense gradients are wanted."""
        return self.config.needs_momentum or (self.config.needs_gradient and self._is_due(step, state))

    def _watch(self, name: str, state: TrainerState) -> Callable[[Tensor], None]:
        """Adds up a parameter's dense gradients of the step that is being computed."""

        def watch(gradient: Tensor) -> None:
            if self._looks(state.global_step + 1, state):
                own = gradient.detach().float()
                self._gradient[name] = self._gradient[name] + own if name in self._gradient else own.clone()

        return watch

    def _gather(self, model: nn.Module) -> None:
        """Sum the step's gradients over the processes; one that none reached is zero, on every process."""
        for name in self.masks:
            if name not in self._gradient:
                self._gradient[name] = _zeros(model.get_parameter(name))
            distributed.sum_everywhere(self._gradient[name])

    @torch.no_grad()
    def _update(self, model: nn.Module, optimizer: Optimizer, state: TrainerState) -> None:
        if all(bool(mask.all()) for mask in self.masks.values()):
            # A dense twin: what dies has no other place to grow in.
            return
        weights = {name: model.get_parameter(name) for name in self.masks}
        new, self.threshold = updated_masks(
            _on_cpu(weights),
            self.masks,
            self.config,
            self.config.rate(state.global_step, state.max_steps),
            self.threshold,
            torch.Generator().manual_seed(self.seed * SEED_STRIDE + state.global_step),
            {"gradient": _on_cpu(self._gradient), "momentum": _on_cpu(self._momentum)},
        )
        self.updates += 1
        for name, weight in weights.items():
            stays = (self.masks[name] & new[name]).to(weight.device)
            # Accelerate wraps the optimizer whose state counts.
            forget(getattr(optimizer, "optimizer", optimizer), weight, stays)
            if self.average is not None:
                self.average.forget(name, stays)
        self.holder.replace(new)

    def _keep(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Write masks into the checkpoint that is about to be written: whole, it has them."""
        if not control.should_save or distributed.rank():
            return
        tensors = {f"mask.{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"momentum.{name}": own for name, own in _on_cpu(self._momentum).items()}
        if self.average is not None:
            tensors |= {f"average.{name}": own for name, own in _on_cpu(self.average.tensors()).items()}
        average = self.average.said() if self.average is not None else None
        folder = _checkpoint(args, state)
        write_whole(
            folder / STATE, json.dumps({"threshold": self.threshold, "updates": self.updates, "average": average})
        )
        save_file(tensors, folder / TENSORS)

    def _restore(self, folder: Path) -> None:
        """What `_keep` wrote into a checkpoint."""
        try:
            tensors = load_file(folder / TENSORS)
            said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise BadInputError(
                f"{folder}: the checkpoint lacks its masks ({error}); remove it, and the run begins anew."
            ) from None
        self.threshold, self.updates = said["threshold"], said["updates"]
        for prefix, kept in (("mask.", self.masks), ("momentum.", self._momentum)):
            for name, own in kept.items():
                own.copy_(tensors[prefix + name])
        if self.average is not None:
            prefix = "average."
            averaged = {name.removeprefix(prefix): own for name, own in tensors.items() if name.startswith(prefix)}
            self.average.restore(averaged, said["average"])


@torch.no_grad()
def forget(optimizer: Optimizer, weight: nn.Parameter, stays: Tensor) -> None:
    """Set what an optimizer remembers of each weight to zero where bool `stays` is False.

    Raises:
        BadInputError: it remembers codes, of which zero is none.
    """
    for kept in optimizer.state.get(weight, {}).values():
        if isinstance(kept, Tensor) and kept.shape == weight.shape:
            if not kept.is_floating_point():
                raise BadInputError(
                    f"optim: {type(optimizer).__name__} packs what it remembers, so that nothing of it can be "
                    "forgotten; choose adamw_torch or sgd."
                )
            kept.mul_(stays)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own.detach().cpu() for name, own in tensors.items()}
