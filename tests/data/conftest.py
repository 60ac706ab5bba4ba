"""Tiny tokenizers, built on the spot."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
]
CHAT_TEMPLATE = (
    "{{ bos_token if starts_with_bos else '' }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
)


def byte_level(adds_bos: bool, merges: int = 60) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's or Llama 3's: every text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    single = "<s> $A" if adds_bos else "$A"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """Adds no beginning-of-sequence token, as SmolLM2's and GPT-2's; its chat template writes none."""
    tokenizer = byte_level(adds_bos=False)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("starts_with_bos", "false")
    return tokenizer


@pytest.fixture(scope="session")
def with_bos() -> PreTrainedTokenizerFast:
    """Adds <s>, as Llama's and Gemma's; so does its chat template."""
    tokenizer = byte_level(adds_bos=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("starts_with_bos", "true")
    return tokenizer
