"""How a weight looks to a method, and where the weights of a causal language model are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import BadInputError
from hf_prune.families import PER_HEAD, fused_layers
from hf_prune.layers import expert_tensors, is_experts, linear_layers, routers


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a fused layer: in each of `repeats` equal parts of them all, `size` from `offset` on."""

    offset: int
    size: int
    repeats: int = 1

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """Those of a tensor along one of its axes, which becomes two where there are several parts; shares memory."""
        if self.repeats == 1:
            return tensor.narrow(axis, self.offset, self.size)
        axis %= tensor.ndim
        parts = tensor.unflatten(axis, (self.repeats, tensor.shape[axis] // self.repeats))
        return parts.narrow(axis + 1, self.offset, self.size)


def own_part(tensor: Tensor, expert: int | None, outputs: Outputs | None, axis: int) -> Tensor:
    """What of a tensor in a parameter's layout belongs to one matrix in it; shares memory.

    Args:
        axis: of the outputs, once an expert is chosen.
    """
    own = tensor if expert is None else tensor[expert]
    return own if outputs is None else outputs.of(own, axis)


@dataclass(frozen=True)
class WeightView:
    """One weight matrix as [out, in] in float32 with write-back, whatever layer lies behind it.

    Args:
        name: full name of the layer, `model.layers.0.self_attn.q_proj`; of a fused one with the part that is meant,
            `model.layers.0.self_attn.qkv_proj.query`; of a mixture's with the expert and the parameter.
        block: index of the decoder block it sits in; the number of blocks for the LM head.
        module: the layer whose input this weight multiplies.
        transposed: the layer stores [in, out] (GPT-2's Conv1D).
        tensor: the module's parameter that holds the weight.
        expert: where the parameter is 3-D, the experts of a mixture in one, the number of this view's expert.
        outputs: where the layer is fused, which of its outputs are this view's.
    """

    name: str
    block: int
    module: nn.Module
    transposed: bool = False
    tensor: str = "weight"
    expert: int | None = None
    outputs: Outputs | None = None

    @property
    def layer(self) -> str:
        """Full name of the module."""
        if self.expert is not None:
            return self.name.removesuffix(f".{self.expert}.{self.tensor}")
        return self.name if self.outputs is None else self.name.rpartition(".")[0]

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter behind the view, as in `state_dict`; experts and parts of a layer share theirs."""
        return f"{self.layer}.{self.tensor}"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter behind the view, in its own dtype and layout."""
        return self.module.get_parameter(self.tensor)

    def own_part(self, tensor: Tensor) -> Tensor:
        """What of a tensor in the parameter's layout belongs to this view; shares memory.

        A 3-D tensor where the view's outputs lie in several parts of the layer's.
        """
        return own_part(tensor, self.expert, self.outputs, self._axis)

    def own_outputs(self, outputs: Tensor) -> Tensor:
        """This view's of a layer's outputs [..., out]; shares memory where it can."""
        return outputs if self.outputs is None else self.outputs.of(outputs, -1).flatten(outputs.ndim - 1)

    @property
    def stored(self) -> Tensor:
        """The weight in the layer's dtype and layout, a part of the parameter; shares memory, has no gradient."""
        return self.own_part(self.parameter.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        stored = self.parameter.shape[-2:]
        rows, columns = (stored[1], stored[0]) if self.transposed else stored
        return rows if self.outputs is None else self.outputs.size * self.outputs.repeats, columns

    @property
    def _axis(self) -> int:
        """The stored weight's axis of outputs."""
        return 1 if self.transposed else 0

    def _oriented(self) -> Tensor:
        stored = self.stored
        stored = stored.flatten(self._axis, self._axis + 1) if stored.ndim == 3 else stored
        return stored.T if self.transposed else stored

    def read(self) -> Tensor:
        """A float32 copy, [out, in], on the weight's device."""
        return self._oriented().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def write(self, weight: Tensor) -> None:
        """Store [out, in] into the layer, in the layer's dtype."""
        stored = self.stored
        stored.copy_((weight.T if self.transposed else weight).reshape(stored.shape))

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


def _parts(roles: tuple[str, ...], outputs: int, heads: int, groups: int) -> dict[str, Outputs]:
    """Which of a fused layer's outputs are whose."""
    if roles == (PER_HEAD,):
        size = outputs // (3 * heads)
        return {role: Outputs(place * size, size, heads) for place, role in enumerate(("query", "key", "value"))}
    shares = [{"query": heads, "key": groups, "value": groups}.get(role, 1) for role in roles]
    size, offset, found = outputs // sum(shares), 0, {}
    for role, share in zip(roles, shares, strict=True):
        found[role] = Outputs(offset, share * size)
        offset += share * size
    return found


def _block_views(prefix: str, index: int, block: nn.Module, fused: Fused) -> Iterator[WeightView]:
    """A block's linear layers in order, fused ones by part, routers left out, then its experts."""
    left_out = routers(block)
    for name, layer, transposed in linear_layers(block):
        whole = WeightView(f"{prefix}.{name}", index, layer, transposed)
        if name in fused.layers:
            for role, own in _parts(fused.layers[name], whole.shape[0], fused.heads, fused.groups).items():
                yield replace(whole, name=f"{whole.name}.{role}", outputs=own)
        elif name not in left_out:
            yield whole
    for name, layer in block.named_modules():
        if is_experts(layer):
            for expert in range(layer.get_parameter("down_proj").shape[0]):
                for tensor in expert_tensors(layer):
                    full = f"{prefix}.{name}.{expert}.{tensor}"
                    yield WeightView(full, index, layer, bool(layer.is_transposed), tensor, expert)


@dataclass(frozen=True)
class Fused:
    """A model's fused layers: their roles by name inside a block, and the numbers of heads that parts follow from."""

    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    heads: int = 1
    groups: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Fused:
        """Those that the model's family is described with."""
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = fused_layers(getattr(config, "model_type", None) or "")
        if not layers:
            return cls()
        heads = config.num_attention_heads
        return cls(layers, heads, getattr(config, "num_key_value_heads", None) or heads)


def find_named(model: nn.Module, names: Iterable[str]) -> list[WeightView]:
    """The views of these names, parts of fused layers or whole; unknown names find none."""
    wanted = set(names)
    found = {view.name: view for whole in (False, True) for view in find_views(model, whole=whole)}
    return [view for view in found.values() if view.name in wanted]


def find_views(model: nn.Module, *, whole: bool = False) -> list[WeightView]:
    """Every prunable weight of a causal language model: each block's linear layers and experts, then the LM head.

    Args:
        whole: fused layers are one matrix each, for what takes a parameter as a whole.
    """
    prefix, blocks = find_blocks(model)
    fused = Fused() if whole else Fused.of(model)
    views = [
        view for index, block in enumerate(blocks) for view in _block_views(f"{prefix}.{index}", index, block, fused)
    ]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        name = next(name for name, module in model.named_modules() if module is head)
        views.append(WeightView(name, len(blocks), head))
    return views
