"""Which modules of a causal language model are linear layers, which the experts of a mixture, and which their routers.

Experts are known in the layout of transformers (3-D parameters of a module with `use_experts_implementation`) and as a
list of modules with linear layers; those that merely say so by name are found as well, so that none stays dense unseen.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every linear layer below `module`, or itself: (relative name, layer, stored transposed)."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            yield name, layer, False
        elif isinstance(layer, Conv1D):
            yield name, layer, True


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture as 3-D parameters, in the layout of transformers."""
    return isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "has_gate")


def expert_tensors(module: nn.Module) -> tuple[str, str]:
    """Names of an experts module's parameters: what its tokens meet first, and second."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def routers(module: nn.Module) -> set[str]:
    """Relative names of the layers that share out tokens.

    Beside some experts: a layer with one output for each of them or for all, and everything in what is called a router.
    """
    found = set()
    for name, parent in module.named_modules():
        children = dict(parent.named_children())
        counts = {count for own in children.items() if (count := _expert_count(*own)) is not None}
        for child, layer in children.items() if counts else ():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] in {1, *counts}:
                own = [""]
            else:
                inside = list(linear_layers(layer))
                alone = len(inside) == 1 and inside[0][1].get_parameter("weight").shape[0] in counts
                own = [below for below, _, _ in inside] if alone or _says("router", child, layer) else []
            found |= {".".join(filter(None, (name, child, below))) for below in own}
    return found


def unseen_experts(block: nn.Module) -> list[str]:
    """Relative names of experts' weights in a block that lie in no linear layer, nor in the layout of transformers."""
    modules = dict(block.named_modules())
    seen = {layer for _, layer, _ in linear_layers(block)} | {own for own in modules.values() if is_experts(own)}
    shared_out = {modules[name] for name in routers(block)}
    found = []
    for name, parameter in block.named_parameters():
        path = name.split(".")[:-1]
        owners = [(path[depth], modules[".".join(path[: depth + 1])]) for depth in range(len(path))]
        experts = any(_says("expert", *owner) for owner in owners)
        if experts and parameter.ndim > 1 and not {owner for _, owner in owners} & (seen | shared_out):
            found.append(name)
    return found


def _says(word: str, name: str, module: nn.Module) -> bool:
    """Whether a word is in a module's own name or its class's."""
    return word in f"{name} {type(module).__name__}".lower()


def _expert_count(name: str, module: nn.Module) -> int | None:
    """Number of a mixture's experts in a module, 0 where it does not show; None where it holds none."""
    if is_experts(module):
        return module.get_parameter("down_proj").shape[0]
    if not _says("expert", name, module):
        return None
    if isinstance(module, nn.ModuleList):
        return len(module)
    linear = {id(layer.get_parameter("weight")) for _, layer, _ in linear_layers(module)}
    raw = [own for own in module.parameters() if own.ndim > 1 and id(own) not in linear]
    return max((own.shape[0] for own in raw if own.ndim == 3), default=0) if raw else None
