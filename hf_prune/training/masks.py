"""Masks that hold while anything trains: through momentum, weight decay, mixed precision, accumulation and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.errors import BadInputError, RunError


class MaskHolder:
    """Keeps masked weights at zero while an optimizer works on the others.

    Gradients are masked before anything sees them, so that clipping and momentum know the survivors alone; weights are
    masked after every step of the optimizer. Parameters that FSDP2 has sharded have no gradient of their own to mask:
    there clipping counts the masked weights too, and zeros hold all the same. That is tested on two processes with
    `fully_shard` and no Trainer: accelerate shards on accelerators alone, and a Trainer on the CPU that is told to use
    FSDP trains with DDP instead, without a word.

    Args:
        masks: bool tensors by the parameters' names, in the parameters' own layout; True stays. Not copied.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        self._held: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Mask `model` now, and after every step of `optimizer`.

        Raises:
            BadInputError: the masks do not fit the model.
        """
        self.detach()
        # A tied weight by any of its names.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        check_fit(parameters, self.masks)
        for name, mask in self.masks.items():
            parameter = parameters[name]
            own = _like(mask, parameter)
            self._held[name] = (parameter, own)
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                self._hooks.append(parameter.register_hook(_masked_by(own)))
        if optimizer is not None:
            # Accelerate wraps the optimizer whose steps count.
            inner = getattr(optimizer, "optimizer", optimizer)
            self._hooks.append(inner.register_step_post_hook(lambda *_: self.apply()))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is masked to zero."""
        for parameter, mask in self._held.values():
            # Not multiplied: AdamW's 1e-8 is zero in fp16, and 0 / 0 of a weight without gradient stays NaN times zero.
            parameter.masked_fill_(~mask, 0)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Hold other masks from now on; the tensors handed over at the beginning change with them."""
        for name, mask in masks.items():
            self.masks[name].copy_(mask)
            self._held[name][1].copy_(mask)
        self.apply()

    @torch.no_grad()
    def check(self) -> None:
        """Raise RunError for the first parameter that has a weight where its mask has none, or one that is NaN."""
        for name, (parameter, mask) in self._held.items():
            check_zeros(name, parameter, mask)

    def detach(self) -> None:
        """Leave model and optimizer alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._held = [], {}


def check_fit(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raise BadInputError for the first mask without a parameter of its name and shape."""
    for name, mask in masks.items():
        if name not in parameters:
            raise BadInputError(f"masks: the model has no parameter {name}; these masks belong to another model.")
        if parameters[name].shape != mask.shape:
            raise BadInputError(
                f"masks: {name} is {list(parameters[name].shape)} and its mask {list(mask.shape)}; these masks belong "
                "to another model."
            )


def check_zeros(name: str, weight: Tensor, mask: Tensor) -> None:
    """Raise RunError where a weight is NaN, or not zero outside its mask, which is on its device."""
    outside = weight.detach().masked_fill(mask, 0)
    if bool(weight.detach().isnan().any()):
        raise RunError(f"{name}: training ended in weights that are no numbers; lower learning_rate.")
    if bool((outside != 0).any()):
        raise RunError(f"{name}: training brought pruned weights back; nothing was saved, please report this.")


def _masked_by(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(~mask, 0)


def _like(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask on the parameter's device, sharded as it is."""
    own = mask.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(own, parameter.device_mesh, parameter.placements)
    return own


@contextmanager
def hold_masks(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> Iterator[MaskHolder]:
    """For loops without a Trainer: inside, what `masks` drop is zero after every step of `optimizer`.

    Raises:
        BadInputError: the masks do not fit the model.
        RunError: a masked weight is not zero at the end, or when the model's `state_dict` is asked for, as to save it.
    """
    holder = MaskHolder(masks)
    holder.attach(model, optimizer)
    saved = model.register_state_dict_pre_hook(lambda *_: holder.check())
    try:
        yield holder
        holder.check()
    finally:
        saved.remove()
        holder.detach()


class MaskCallback(TrainerCallback):
    """Holds masks through a transformers Trainer: its optimizer, its checkpoints, its resuming, its processes.

    Args:
        masks: as for `MaskHolder`.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.holder = MaskHolder(masks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Behind a resumed checkpoint's weights, which may be dense: a rewound ticket begins here."""
        self.holder.attach(kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint is written."""
        if control.should_save:
            self.holder.check()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before a checkpoint is written, with `save_strategy: epoch`."""
        if control.should_save:
            self.holder.check()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.holder.check()
        self.detach()

    def detach(self) -> None:
        """Leave model and optimizer alone from now on."""
        self.holder.detach()


def masks_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Where the named parameters are not zero, for those that hold any zero; True stays."""
    found = {}
    for name in names:
        mask = model.get_parameter(name).detach() != 0
        if not bool(mask.all()):
            found[name] = mask
    return found
