"""LoRA under a mask: the adapter's product is masked while it trains, so that merging changes nothing and zeros stay.

Hu et al., 2021, https://arxiv.org/abs/2106.09685, by peft; the effective weight is W + mask * (B A) alpha / r, as in
SQFT (https://arxiv.org/abs/2410.03750). The masked product needs the weight's own gradient: memory is saved on the
optimizer, not on compute.

Adapters and their product are float32. Beside 16-bit weights the sum is rounded once, in training as in merging: the
model that trains is the one that is saved, and what of a change the folder's dtype cannot hold is never counted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_prune.errors import BadInputError
from hf_prune.weights import WeightView

ADAPTER = "default"


def require_peft() -> None:
    """Raise BadInputError where peft is not installed."""
    if find_spec("peft") is None:
        raise BadInputError("recovery: lora needs peft; pip install hf-prune[recovery].")


class MaskedLora:
    """Adapters on the given weight matrices of a model, each under its mask where it has one.

    Args:
        views: what gets an adapter.
        masks: bool by the parameters' names, in the parameters' own layout; a matrix without one is not masked.
        rank, alpha: of the adapters; their product is scaled by alpha / rank.

    Raises:
        BadInputError: peft is not installed.
    """

    def __init__(
        self, model: nn.Module, views: Sequence[WeightView], masks: Mapping[str, Tensor], rank: int, alpha: float
    ) -> None:
        require_peft()
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float works
            target_modules=sorted({view.layer for view in views}),
            fan_in_fan_out=any(view.transposed for view in views),
        )
        self.model = get_peft_model(model, config)
        self._layers: list[tuple[Any, Tensor | None, bool]] = []
        # Parts of a fused layer share its adapter, which leaves the others alone.
        for view in {view.layer: view for view in views}.values():
            layer = model.get_submodule(view.layer)
            own = masks.get(view.parameter_name)
            if view.outputs is not None:
                parts = torch.zeros_like(view.parameter, dtype=torch.bool)
                for member in views:
                    if member.layer == view.layer:
                        member.own_part(parts).fill_(True)
                own = parts if own is None else parts & own
            if own is not None:
                # A buffer follows the model to its device; it is not saved.
                layer.register_buffer("mask", own, persistent=False)
            layer.forward = _forward(layer, view.transposed)
            self._layers.append((layer, own, view.transposed))

    def merge(self) -> nn.Module:
        """The model itself with every adapter added to its weight; zeros are zeros."""
        with torch.no_grad():
            for layer, _, _ in self._layers:
                layer.get_base_layer().weight.copy_(_merged(layer))
                del layer.forward
        merged: nn.Module = self.model.unload()
        return merged


def _merged(layer: Any) -> Tensor:
    """The layer's weight with its adapter's masked product, in the weight's dtype."""
    weight: Tensor = layer.get_base_layer().weight
    # Not in the 16 bits of mixed precision, which a merge does not know.
    with torch.autocast(weight.device.type, enabled=False):
        delta: Tensor = layer.get_delta_weight(ADAPTER)
    mask = getattr(layer, "mask", None)
    return (weight + (delta if mask is None else delta * mask)).to(weight.dtype)


def _forward(layer: Any, transposed: bool) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        base = layer.get_base_layer()
        weight = _merged(layer)
        return functional.linear(inputs, weight.T if transposed else weight, base.bias)

    return forward
