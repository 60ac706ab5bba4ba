"""Gradients of the language modelling loss on the calibration text, for first-order importances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.errors import RunError
from hf_prune.progress import progress
from hf_prune.weights import find_blocks, find_views


def loss_gradients(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Parameter name -> gradient of the summed window losses, float32 in the parameter's layout, on the CPU.

    The loss of a window is the mean cross-entropy of its next tokens. Blocks' weights only; the model is left as it is.

    Args:
        input_ids: int64 [samples, tokens], the same on every process; each takes its share.

    Raises:
        RunError: a gradient is not finite.
    """
    last = len(find_blocks(model)[1])
    wanted = {view.parameter_name: view.parameter for view in find_views(model) if view.block < last}
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # A window's gradient in the model's dtype; the sum over windows would lose what is small in it.
    totals = {name: torch.zeros(parameter.shape, dtype=torch.float32) for name, parameter in wanted.items()}
    device = next(model.parameters()).device
    own = input_ids[distributed.rank() :: distributed.world_size()]
    training = model.training
    model.eval()
    try:
        model.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        for window in progress(own, "gradients", total=len(own)):
            ids = window[None].to(device)
            with torch.enable_grad():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for name, parameter in wanted.items():
                if parameter.grad is not None:
                    totals[name] += parameter.grad.float().cpu()
                    parameter.grad = None
    finally:
        model.train(training)
        for parameter, was in asked:
            parameter.grad = None
            parameter.requires_grad_(was)
    for name, total in totals.items():
        distributed.sum_everywhere(total)
        if not bool(torch.isfinite(total).all()):
            raise RunError(f"{name}: its gradients hold NaN or Inf; use dtype bfloat16 or float32.")
    return totals
