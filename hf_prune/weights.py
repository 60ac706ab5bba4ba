"""How a weight looks to a method, and where the weights of a causal language model are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.errors import BadInputError


@dataclass(frozen=True)
class WeightView:
    """One weight matrix as [out, in] in float32 with write-back, whatever layer lies behind it.

    Args:
        name: full name of the module, `model.layers.0.self_attn.q_proj`.
        block: index of the decoder block it sits in; the number of blocks for the LM head.
        module: the layer whose input this weight multiplies.
        transposed: the layer stores [in, out] (GPT-2's Conv1D).
        tensor: the module's parameter that holds the weight.
        expert: where the parameter is 3-D, the experts of a mixture in one, the number of this view's expert.
    """

    name: str
    block: int
    module: nn.Module
    transposed: bool = False
    tensor: str = "weight"
    expert: int | None = None

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter behind the view, as in `state_dict`; experts share theirs."""
        if self.expert is None:
            return f"{self.name}.{self.tensor}"
        return f"{self.name.removesuffix(f'.{self.expert}.{self.tensor}')}.{self.tensor}"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter behind the view, in its own dtype and layout."""
        return self.module.get_parameter(self.tensor)

    def own_part(self, tensor: Tensor) -> Tensor:
        """What of a tensor in the parameter's layout belongs to this view; shares memory."""
        return tensor if self.expert is None else tensor[self.expert]

    @property
    def stored(self) -> Tensor:
        """The weight in the layer's dtype and layout, a part of the parameter; shares memory, has no gradient."""
        return self.own_part(self.parameter.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def _oriented(self) -> Tensor:
        return self.stored.T if self.transposed else self.stored

    def read(self) -> Tensor:
        """A float32 copy, [out, in], on the weight's device."""
        return self._oriented().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def write(self, weight: Tensor) -> None:
        """Store [out, in] into the layer, in the layer's dtype."""
        self._oriented().copy_(weight)

    def count_nonzero(self) -> int:
        """Number of weights that are not zero, in the layer's dtype."""
        return int(torch.count_nonzero(self.stored))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder blocks: the outermost ModuleList that holds most of the linear weights.

    Raises:
        BadInputError: the model has no such list, or several of similar size (an encoder beside a decoder).
    """
    candidates: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for _, outer, _ in candidates)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            size = sum(layer.get_parameter("weight").numel() for _, layer, _ in linear_layers(module))
            if size:
                candidates.append((size, name, module))
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    if not candidates:
        raise BadInputError(
            f"model_name_or_path: {type(model).__name__} keeps its blocks in no ModuleList of linear layers; "
            "hf_prune needs a causal language model whose decoder blocks form one ModuleList."
        )
    if len(candidates) > 1 and candidates[1][0] > candidates[0][0] / 2:
        raise BadInputError(
            f"model_name_or_path: {type(model).__name__} has several stacks of blocks ({candidates[0][1]}, "
            f"{candidates[1][1]}); hf_prune handles causal language models with one stack of decoder blocks."
        )
    return candidates[0][1], candidates[0][2]


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every linear layer below `module`: (relative name, layer, stored transposed)."""
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
    """Relative names of the layers that share out tokens: beside some experts, with one output for each or for all."""
    found = set()
    for name, parent in module.named_modules():
        children = dict(parent.named_children())
        for experts in filter(is_experts, children.values()):
            count = experts.get_parameter("down_proj").shape[0]
            for child, layer in children.items():
                weight = getattr(layer, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] in (1, count):
                    found.add(f"{name}.{child}" if name else child)
    return found


def _block_views(prefix: str, index: int, block: nn.Module) -> Iterator[WeightView]:
    """A block's linear layers in order, routers left out, then its experts."""
    left_out = routers(block)
    for name, layer, transposed in linear_layers(block):
        if name not in left_out:
            yield WeightView(f"{prefix}.{name}", index, layer, transposed)
    for name, layer in block.named_modules():
        if is_experts(layer):
            for expert in range(layer.get_parameter("down_proj").shape[0]):
                for tensor in expert_tensors(layer):
                    full = f"{prefix}.{name}.{expert}.{tensor}"
                    yield WeightView(full, index, layer, bool(layer.is_transposed), tensor, expert)


def find_views(model: nn.Module) -> list[WeightView]:
    """Every prunable weight of a causal language model: each block's linear layers and experts, then the LM head."""
    prefix, blocks = find_blocks(model)
    views = [view for index, block in enumerate(blocks) for view in _block_views(f"{prefix}.{index}", index, block)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        name = next(name for name, module in model.named_modules() if module is head)
        views.append(WeightView(name, len(blocks), head))
    return views
