"""What a family's stock config can say: new sizes are written into it, and refused where the model would not follow."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_prune.errors import BadInputError
from hf_prune.families import find_family
from hf_prune.structure.groups import ATTENTION, Shape, block_shape, find_groups

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_prune.structure.budget import Structure

# What a config says block by block, where it does.
_BY_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
# What attention and MLP modules remember of their sizes, where they do.
_REMEMBERED = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
    "intermediate_size": "width",
}


def set_sizes(config: Any, shape: Shape, kept_blocks: list[int] | None = None) -> None:
    """Write a block's sizes, and which blocks are left, into a (text) config in place."""
    family = find_family(config.model_type)
    before = config.num_attention_heads
    if shape.width != getattr(config, family.width, None):
        setattr(config, family.width, shape.width)
    if shape.heads != before:
        config.num_attention_heads = shape.heads
        # Said outright: most families would divide the hidden size by the new number.
        config.head_dim = shape.head_size
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = shape.groups
    if kept_blocks is not None:
        for name in _BY_BLOCK:
            value = getattr(config, name, None)
            if isinstance(value, list) and len(value) == config.num_hidden_layers:
                setattr(config, name, [value[block] for block in kept_blocks])
        config.num_hidden_layers = len(kept_blocks)


def set_remembered(block: nn.Module, shape: Shape, config: Any) -> None:
    """Bring a block's modules up to date with its layers.

    Args:
        config: of these sizes; modules that ask theirs in a forward get it.
    """
    for module in block.modules():
        for name, size in _REMEMBERED.items():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(shape, size))
        if isinstance(getattr(module, "num_key_value_groups", None), int):
            module.num_key_value_groups = shape.heads // shape.groups  # type: ignore[assignment]
        if hasattr(module, "config") and hasattr(module.config, "num_attention_heads"):
            module.config = config


def check_stock(model: nn.Module, structure: Structure) -> None:
    """Build the smaller model on the meta device from the config alone, and compare its blocks with the plan.

    Raises:
        BadInputError: the family's config does not accept the sizes; says which it does.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if structure.blocks_removed and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise BadInputError("units: this model scales attention by a block's number, which depth changes; take mlp.")
    if accepts(model, structure.after):
        return
    before, after = structure.before, structure.after
    if not accepts(model, Shape(after.width, before.heads, before.groups, before.head_size)):
        raise BadInputError(
            f"sparsity: the stock config refuses {after.width} neurons an MLP; choose another sparsity."
        )
    share = before.heads // before.groups
    if after.groups != before.groups:
        counts = [
            count
            for count in range(1, before.groups)
            if accepts(model, Shape(before.width, share * count, count, before.head_size))
        ]
        what = f"{after.groups} of {before.groups} key-value groups"
    else:
        counts = [
            count
            for count in range(1, share)
            if accepts(model, Shape(before.width, before.groups * count, before.groups, before.head_size))
        ]
        what = f"{after.heads // after.groups} of {share} query heads a group"
    possible = f"it accepts {', '.join(map(str, counts))}" if counts else "it accepts no other number"
    name = type(model).__name__
    raise BadInputError(
        f"units: {what} cannot be said in the stock config of {name}; {possible}: choose another sparsity or budget, "
        "or take mlp or depth."
    )


def accepts(model: nn.Module, shape: Shape) -> bool:
    """Whether a one-block model of these sizes has the layers that the sizes promise."""
    config: PreTrainedConfig = copy.deepcopy(model.config)  # type: ignore[assignment]
    try:
        set_sizes(config.get_text_config(), shape, kept_blocks=[0])
        # Checks that run when a config is read from its file.
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            built = type(model)(config)
        return block_shape(built) == shape and _heads_fit(built, shape)
    except BadInputError:
        raise
    except Exception:
        return False


def _heads_fit(built: nn.Module, shape: Shape) -> bool:
    """Whether keys and values are as wide as the groups say: `block_shape` has only looked at the output's side."""
    group = find_groups(built, 0, ATTENTION, shape)[0]
    wanted: dict[str, int] = {}
    for stretch in group.producers:
        wanted[stretch.view.name] = max(wanted.get(stretch.view.name, 0), stretch.stop)
    return all(stretch.view.shape[0] == wanted[stretch.view.name] for stretch in group.producers)
