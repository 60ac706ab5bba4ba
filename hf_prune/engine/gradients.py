"""Gradients of the language modelling loss on the calibration text, for first-order importances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.progress import progress
from hf_prune.weights import find_blocks, find_views


def loss_gradients(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Parameter name -> gradient of the summed window losses, float32 in the parameter's layout, on the CPU.

    The loss of a window is the mean cross-entropy of its next tokens. Blocks' weights only; the model is left as it is.

    Args:
        input_ids: int64 [samples, tokens], the same on every process; each takes its share.
    """
    last = len(find_blocks(model)[1])
    wanted = {view.parameter_name: view.parameter for view in find_views(model) if view.block < last}
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    own = input_ids[distributed.rank() :: distributed.world_size()]
    training = model.training
    model.eval()
    try:
        model.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        for window in progress(own, "gradients", total=len(own)):
            ids = window[None].to(device)
            with torch.enable_grad():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = {}
        for name, parameter in wanted.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total = gradient.float().cpu()
            distributed.sum_everywhere(total)
            gradients[name] = total
        return gradients
    finally:
        model.train(training)
        for parameter, was in asked:
            parameter.grad = None
            parameter.requires_grad_(was)
