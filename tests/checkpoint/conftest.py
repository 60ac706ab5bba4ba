"""Tiny random models and a real, small disk."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """family -> a fresh random causal language model of two blocks, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

    common = {"vocab_size": 97, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = common | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    configs = {
        "llama": lambda: LlamaConfig(**llama, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**llama, head_dim=16, tie_word_embeddings=False),
        "gemma3": lambda: Gemma3TextConfig(
            **llama, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_head=4, n_positions=64),
        "opt": lambda: OPTConfig(
            **common,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    }

    def build(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(0)
        # Not .to(dtype), which would cast the rotary frequencies as well.
        model = AutoModelForCausalLM.from_config(configs[family](), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no accidental zeros: biases start there
                parameter.add_(torch.where(parameter == 0, 0.01, 0.0).to(dtype))
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> object:
    """A byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return fast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable]:
    """(size, options) -> context manager with the folder of a fresh tmpfs; skips where mounting is not allowed."""

    @contextmanager
    def mounted(size: str, options: str = "rw") -> Iterator[Path]:
        folder = tmp_path / f"disk-{size}-{options}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(folder)]
        try:
            mount = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if mount.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {mount.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    return mounted
