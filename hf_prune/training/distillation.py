"""A Trainer whose loss is the distance to another model's next-token distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

# The logits of a batch are there twice; only this many positions at a time are copied to float32.
POSITIONS_PER_CHUNK = 256


class DistillationTrainer(Trainer):
    """Kullback-Leibler divergence from `teacher` to the model, a token, at a temperature (Hinton et al., 2015).

    https://arxiv.org/abs/1503.02531. Labels are not looked at.

    Args:
        teacher: gives logits over the same vocabulary; it is moved to the model's device and never trained.
        temperature: both distributions are softened by it; the loss is multiplied by its square.
    """

    def __init__(self, *args: Any, teacher: nn.Module, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.temperature = temperature
        # The loss is a mean over a batch's tokens: the Trainer is to average it over accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        given = {key: value for key, value in inputs.items() if key != "labels"}
        # In mixed precision where the model is: accelerate wraps its forward alone.
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**given, use_cache=False).logits
        outputs = model(**given, use_cache=False)
        loss = divergence(outputs.logits, wanted, self.temperature)
        return (loss, outputs) if return_outputs else loss


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 times the mean over positions of KL(teacher || model).

    Args:
        logits, teacher: [sequences, positions, vocabulary].
    """
    rows = logits.flatten(0, 1).split(POSITIONS_PER_CHUNK)
    targets = teacher.flatten(0, 1).split(POSITIONS_PER_CHUNK)
    total = torch.zeros((), device=logits.device)
    for row, target in zip(rows, targets, strict=True):
        total = total + functional.kl_div(
            functional.log_softmax(row.float() / temperature, dim=-1),
            functional.log_softmax(target.float() / temperature, dim=-1),
            reduction="sum",
            log_target=True,
        )
    return temperature**2 * total / (logits.shape[0] * logits.shape[1])
