"""Masks that move while a Trainer trains: weights die, as many grow elsewhere, resumable to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
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

    Dense gradients are looked at before they are masked: those of one step for `growth: gradient`, a running mean of
    all for momentum, which is kept here in float32, as large as the pruned parameters. Every process comes to the same
    masks. A weight that grows begins at zero, and what the optimizer remembers of its place and of those that died is
    forgotten. Masks stand in each of the Trainer's checkpoints.

    Args:
        masks: bool, by the parameters' names; changed in place.
        config: how they move.
        seed: of random growth; each step has random numbers of its own.
        average: keeps the weights' mean, masked as they are.
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
        self._dense: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
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
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                raise BadInputError(f"{name}: masks cannot move in a model that FSDP has sharded; train it without.")
        if state.global_step:
            assert args.output_dir is not None
            self._restore(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.config.growth == "gradient" or self.config.needs_momentum:
            # Before the hooks that mask: they are called in the order they were added in.
            self._hooks = [
                parameter.register_hook(self._watch(name, args, state)) for name, parameter in parameters.items()
            ]
        super().on_train_begin(args, state, control, **kwargs)
        if self.average is not None:
            self.average.attach(model, self.masks)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.config.needs_momentum:
            for name, gradient in self._dense.items():
                distributed.sum_everywhere(gradient)
                mean = self._mean.setdefault(name, torch.zeros_like(gradient))
                mean.mul_(MOMENTUM).add_(gradient)
        if self._is_due(state.global_step, state):
            self._update(kwargs["model"], kwargs["optimizer"], state)
        self._dense.clear()
        if self.average is not None:
            self.average.step()
            # Here and not in on_epoch_end, which a run does not come by that goes on from a checkpoint of this step.
            if state.global_step % self._epoch == 0:
                self.average.end_epoch()
        super().on_step_end(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if distributed.rank():
            return
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = {f"mask.{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"mean.{name}": mean.cpu() for name, mean in self._mean.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": own.cpu() for name, own in self.average.tensors().items()}
        save_file(tensors, folder / TENSORS)
        average = self.average.said() if self.average is not None else None
        said = {"threshold": self.threshold, "updates": self.updates, "average": average}
        write_whole(folder / STATE, json.dumps(said))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.average is not None:
            # The weights that the run hands over.
            self.average.write()
        super().on_train_end(args, state, control, **kwargs)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # Within.

    def _is_due(self, step: int, state: TrainerState) -> bool:
        # Nothing dies behind the last step: what grew would never have been trained.
        return step % (self.config.update_steps or self._epoch) == 0 and step < state.max_steps

    def _watch(self, name: str, args: TrainingArguments, state: TrainerState) -> Callable[[Tensor], None]:
        """Adds up a parameter's dense gradients of the step that is being computed, where they will be looked at."""

        def watch(gradient: Tensor) -> None:
            if self.config.needs_momentum or self._is_due(state.global_step + 1, state):
                own = gradient.detach().float()
                self._dense[name] = self._dense[name] + own if name in self._dense else own.clone()

        return watch

    @torch.no_grad()
    def _update(self, model: nn.Module, optimizer: Optimizer, state: TrainerState) -> None:
        dense = self._mean if self.config.needs_momentum else self._dense
        if dense is self._dense:
            for gradient in dense.values():
                distributed.sum_everywhere(gradient)
        weights = {name: model.get_parameter(name) for name in self.masks}
        if dense:
            # One that no gradient reached grows last.
            dense = {
                name: dense[name].cpu() if name in dense else torch.zeros(own.shape) for name, own in weights.items()
            }
        new, self.threshold = updated_masks(
            {name: weight.detach().cpu() for name, weight in weights.items()},
            self.masks,
            self.config,
            self.config.rate(state.global_step, state.max_steps),
            self.threshold,
            torch.Generator().manual_seed(self.seed * SEED_STRIDE + state.global_step),
            dense or None,
        )
        self.updates += 1
        inner = getattr(optimizer, "optimizer", optimizer)
        for name, weight in weights.items():
            stays = (self.masks[name] & new[name]).to(weight.device)
            for kept in inner.state.get(weight, {}).values():
                if isinstance(kept, Tensor) and kept.shape == weight.shape:
                    kept.mul_(stays)
            if self.average is not None:
                self.average.forget(name, stays)
        self.holder.replace(new)

    def _restore(self, folder: Path) -> None:
        """What `on_save` wrote into a checkpoint."""
        try:
            tensors = load_file(folder / TENSORS)
            said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInputError(
                f"{folder}: the checkpoint lacks its masks ({error}); remove it, and the run begins anew."
            ) from None
        self.threshold, self.updates = said["threshold"], said["updates"]
        for name in self.masks:
            self.masks[name].copy_(tensors[f"mask.{name}"])
        self._mean = {name: tensors[f"mean.{name}"] for name in self.masks if f"mean.{name}" in tensors}
        if self.average is not None:
            own = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
            self.average.restore(own, said["average"])
