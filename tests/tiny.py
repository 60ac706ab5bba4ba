"""Tiny random models of every supported family, a tokenizer of bytes, and a text to go with them."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 260
_COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
_LLAMA = {**_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True, max_position_embeddings=128),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=16, max_position_embeddings=128),
    # Sliding and full layers get different masks and rotary embeddings.
    "gemma3": lambda: Gemma3TextConfig(
        **_LLAMA,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=128,
    ),
    "gpt2": lambda: GPT2Config(**_COMMON, n_embd=32, n_head=4, n_positions=128),
    "opt": lambda: OPTConfig(
        **_COMMON,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
}
# Families whose blocks are described for structured pruning beside those above.
MORE_FAMILIES = {
    "qwen2": lambda: Qwen2Config(**_LLAMA, max_position_embeddings=128),
    "mistral": lambda: MistralConfig(**_LLAMA, max_position_embeddings=128, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**_LLAMA, head_dim=16, sliding_window=8, max_position_embeddings=128),
    "phi3": lambda: Phi3Config(**{**_LLAMA, "pad_token_id": 0}, max_position_embeddings=128),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_COMMON, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=128
    ),
}
# Four experts, of which every token takes two.
MIXTURES = {
    "mixtral": lambda: MixtralConfig(
        **_LLAMA, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, sliding_window=None
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_LLAMA,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        max_position_embeddings=128,
    ),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A fresh random causal language model of three blocks, in eval mode."""
    torch.manual_seed(seed)
    # Not .to(dtype), which would cast the rotary frequencies as well.
    config = {**FAMILIES, **MORE_FAMILIES, **MIXTURES}[family]()
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_ids(samples: int = 12, tokens: int = 64, seed: int = 1) -> torch.Tensor:
    """Random calibration windows, int64 [samples, tokens]."""
    return torch.randint(0, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def matrix_of(weights: dict[str, torch.Tensor], view: Any) -> torch.Tensor:
    """A plan's weight matrix [out, in] in a state dict, row by row as the plan's own words have it."""
    weight = weights[view.parameter]
    weight = weight if view.expert is None else weight[view.expert]
    weight = weight.T if view.transposed else weight
    if view.outputs is None:
        return weight
    own, stride = view.outputs, len(weight) // view.outputs.repeats
    return weight[[part * stride + own.offset + row for part in range(own.repeats) for row in range(own.size)]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `<|end|>` (256) at the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
