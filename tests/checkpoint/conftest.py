"""Tiny random models."""

from collections.abc import Callable

import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """family -> a fresh random causal language model without a single zero, in eval mode."""

    def build(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        model = tiny.tiny_model(family, dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # biases start at zero
                parameter.add_(torch.where(parameter == 0, 0.01, 0.0).to(dtype))
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> object:
    """A byte-level tokenizer with a chat template."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer
