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
    """

    name: str
    block: int
    module: nn.Module
    transposed: bool = False

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter behind the view, as in `state_dict`."""
        return f"{self.name}.weight"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter behind the view, in its own dtype and layout."""
        return self.module.get_parameter("weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def _oriented(self) -> Tensor:
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    def read(self) -> Tensor:
        """A float32 copy, [out, in], on the weight's device."""
        return self._oriented().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def write(self, weight: Tensor) -> None:
        """Store [out, in] into the layer, in the layer's dtype."""
        self._oriented().copy_(weight)

    def count_nonzero(self) -> int:
        """Number of weights that are not zero, in the layer's dtype."""
        return int(torch.count_nonzero(self.parameter.detach()))


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


def find_views(model: nn.Module) -> list[WeightView]:
    """Every prunable weight of a causal language model: the blocks' linear layers in order, then the LM head."""
    prefix, blocks = find_blocks(model)
    views = [
        WeightView(f"{prefix}.{index}.{name}", index, layer, transposed)
        for index, block in enumerate(blocks)
        for name, layer, transposed in linear_layers(block)
    ]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        name = next(name for name, module in model.named_modules() if module is head)
        views.append(WeightView(name, len(blocks), head))
    return views
