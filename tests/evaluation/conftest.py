"""A word-level tokenizer and tiny random models that fit it."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(60)]
VOCABULARY = ["<unk>", "<s>", "</s>", "user", *WORDS]
WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 64, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**WIDTHS, intermediate_size=48, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(**WIDTHS, intermediate_size=48, num_key_value_heads=1, head_dim=8, sliding_window=8),
    "gpt2": GPT2Config(**WIDTHS),
    "opt": OPTConfig(**WIDTHS, ffn_dim=48, word_embed_proj_dim=32, init_std=0.4),
    "mixtral": MixtralConfig(
        **WIDTHS, intermediate_size=24, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}
CLASSES = {
    "llama": LlamaForCausalLM,
    "gemma3": Gemma3ForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "opt": OPTForCausalLM,
    "mixtral": MixtralForCausalLM,
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Makes a random model of a family, with changes to its config, in eval mode."""

    def make(family: str, **changes: object) -> PreTrainedModel:
        config = type(CONFIGS[family]).from_dict({**CONFIGS[family].to_dict(), **changes})
        torch.manual_seed(0)
        return CLASSES[family](config).eval()

    return make


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, <s> before every text, no chat template."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
