"""The experts of a mixture, one at a time: every expert's own tokens, weights and outputs, for any architecture.

transformers keeps the experts of a block as 3-D parameters and computes them by a function that is chosen by name.
Inside `computed_by` that function is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.layers import expert_tensors
from hf_prune.weights import WeightView

_NAME = "hf_prune"
# (the module's own function, hidden states [tokens, width], chosen experts, their weights [tokens, top k]) -> output.
ExpertsFunction = Callable[..., Tensor]
# (expert, parameter, inputs [tokens, in], weight [out, in]) -> outputs [tokens, out], without the bias.
ExpertLinear = Callable[[int, str, Tensor, Tensor], Tensor]


def members_of(views: Iterable[WeightView]) -> dict[nn.Module, dict[tuple[int, str], WeightView]]:
    """The experts' views among `views` by module, and there by expert and parameter."""
    found: dict[nn.Module, dict[tuple[int, str], WeightView]] = {}
    for view in views:
        if view.expert is not None:
            found.setdefault(view.module, {})[view.expert, view.tensor] = view
    return found


@contextmanager
def computed_by(functions: Mapping[nn.Module, ExpertsFunction]) -> Iterator[None]:
    """Inside, these experts modules compute by their function here; not to be nested."""
    if not functions:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    configs: dict[int, Any] = {id(module.config): module.config for module in functions}
    before = {key: config._experts_implementation for key, config in configs.items()}

    def dispatch(module: Any, *args: Tensor) -> Tensor:
        # "eager" is the class's own forward, below the decorator that chooses.
        eager = type(module).forward.__wrapped__
        own = partial(ALL_EXPERTS_FUNCTIONS.get_interface(before[id(module.config)], eager), module)
        return functions[module](own, *args) if module in functions else own(*args)

    ALL_EXPERTS_FUNCTIONS[_NAME] = dispatch
    try:
        for config in configs.values():
            config._experts_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        del ALL_EXPERTS_FUNCTIONS[_NAME]


def run_experts(
    module: Any, linear: ExpertLinear, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What an experts module computes, expert by expert, every matrix product by `linear`; experts without tokens rest.

    Args:
        hidden: [tokens, width].
        top_k_index: int64 [tokens, top k], experts chosen for each token.
        top_k_weights: [tokens, top k], what their outputs are multiplied by.

    Returns:
        [tokens, width], equal to the module's own up to the order of sums.
    """
    first, second = expert_tensors(module)

    def multiply(expert: int, tensor: str, inputs: Tensor) -> Tensor:
        weight = getattr(module, tensor)[expert]
        outputs = linear(expert, tensor, inputs, weight.T if module.is_transposed else weight)
        return outputs + getattr(module, f"{tensor}_bias")[expert] if module.has_bias else outputs

    output = torch.zeros_like(hidden)
    for expert in range(getattr(module, second).shape[0]):
        tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        inside = multiply(expert, first, hidden[tokens])
        inside = module._apply_gate(inside) if module.has_gate else module.act_fn(inside)
        result = multiply(expert, second, inside)
        if getattr(module, "has_post_expert_norm", False):
            result = module.post_expert_norm(result)
        weighted = result * top_k_weights[tokens, places, None]
        output = output.index_add(0, tokens, weighted.to(output.dtype))
    return output
