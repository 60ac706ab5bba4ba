"""Where the units of a block live, as data: one entry a family of models, by its config's `model_type`.

A fused layer (one with several roles) is pruned as a matrix for each role. A unit is what structured pruning removes as
a whole:

- an MLP neuron: a row of every layer that makes it, and a column of the layer that consumes it;
- a key-value group: the rows of its query heads, of its key and its value head, and the columns that consume them;
- a query head within a group: its rows and columns, the keys and values staying.

A layer's output features are listed by role, in the order in which they are stored, so that fused layers (Phi-3's
qkv_proj, GPT-2's c_attn) need no code. `query_key_value` is GPT-NeoX's layout: per head its query, key and value rows.

To describe another family, add an entry whose names are those of `model.named_modules()` inside one block, and its tiny
config to the tests: the function-preservation test then says whether the entry is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_prune.errors import BadInputError

PER_HEAD = "query_key_value"


@dataclass(frozen=True)
class Coupling:
    """The layers that share units.

    Attributes:
        producers: layer -> roles of its output features, in stored order.
        consumer: the layer whose input features are the units.
        norm: the normalisation in front of the producers, whose gain scales their inputs.
    """

    producers: Mapping[str, tuple[str, ...]]
    consumer: str
    norm: str


@dataclass(frozen=True)
class Family:
    """One family of decoder blocks.

    Attributes:
        mlp, attention: the couplings inside a block.
        width: config field of the MLP's width.
        gain_offset: what a normalisation adds to its stored gain (Gemma stores the gain less one).
    """

    mlp: Coupling
    attention: Coupling
    width: str = "intermediate_size"
    gain_offset: float = field(default=0.0)


_ATTENTION = {"self_attn.q_proj": ("query",), "self_attn.k_proj": ("key",), "self_attn.v_proj": ("value",)}
_GATED = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",)}
_LLAMA = Family(
    mlp=Coupling(_GATED, "mlp.down_proj", "post_attention_layernorm"),
    attention=Coupling(_ATTENTION, "self_attn.o_proj", "input_layernorm"),
)
# Gemma normalises once more behind attention and MLP, which no unit notices.
_GEMMA = Family(
    mlp=Coupling(_GATED, "mlp.down_proj", "pre_feedforward_layernorm"),
    attention=Coupling(_ATTENTION, "self_attn.o_proj", "input_layernorm"),
    gain_offset=1.0,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family(
        mlp=Coupling({"mlp.gate_up_proj": ("gate", "up")}, "mlp.down_proj", "post_attention_layernorm"),
        attention=Coupling({"self_attn.qkv_proj": ("query", "key", "value")}, "self_attn.o_proj", "input_layernorm"),
    ),
    "opt": Family(
        mlp=Coupling({"fc1": ("up",)}, "fc2", "final_layer_norm"),
        attention=Coupling(_ATTENTION, "self_attn.out_proj", "self_attn_layer_norm"),
        width="ffn_dim",
    ),
    "gpt2": Family(
        mlp=Coupling({"mlp.c_fc": ("up",)}, "mlp.c_proj", "ln_2"),
        attention=Coupling({"attn.c_attn": ("query", "key", "value")}, "attn.c_proj", "ln_1"),
        width="n_inner",
    ),
    "gpt_neox": Family(
        mlp=Coupling({"mlp.dense_h_to_4h": ("up",)}, "mlp.dense_4h_to_h", "post_attention_layernorm"),
        attention=Coupling({"attention.query_key_value": (PER_HEAD,)}, "attention.dense", "input_layernorm"),
    ),
}


def fused_layers(model_type: str) -> dict[str, tuple[str, ...]]:
    """Layers with several roles, by their name inside a block; none where the family is not described."""
    family = FAMILIES.get(model_type)
    if family is None:
        return {}
    layers = {**family.mlp.producers, **family.attention.producers}
    return {name: roles for name, roles in layers.items() if len(roles) > 1 or roles == (PER_HEAD,)}


def find_family(model_type: str) -> Family:
    """The description of a family.

    Raises:
        BadInputError: there is none; says what can be done.
    """
    if model_type not in FAMILIES:
        raise BadInputError(
            f"model_name_or_path: which rows and columns of a {model_type} block belong together is not described; "
            f"choose one of {', '.join(FAMILIES)}, or describe it in hf_prune/families.py."
        )
    return FAMILIES[model_type]
