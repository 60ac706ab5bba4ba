"""Tiny recurrent language models, every dropout off unless asked for."""

from typing import Any

import torch
from tiny import VOCABULARY

from hf_prune.models import (
    AutoModelForCausalLM,
    AWDLSTMMoSConfig,
    RecurrentForCausalLM,
    RHNConfig,
    StackedLSTMConfig,
)

DROPOUTS = ("embedding", "input", "hidden", "output", "weight", "latent")
RECURRENT: dict[str, tuple[type, dict[str, Any]]] = {
    "stacked_lstm": (StackedLSTMConfig, {"hidden_size": 6, "embedding_size": 5}),
    "rhn": (RHNConfig, {"hidden_size": 6, "num_hidden_layers": 2, "recurrence_depth": 3}),
    "awd_lstm_mos": (
        AWDLSTMMoSConfig,
        {"hidden_size": 6, "embedding_size": 5, "last_hidden_size": 4, "num_softmaxes": 3},
    ),
}


def recurrent_model(
    kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> RecurrentForCausalLM:
    """A fresh model in eval mode, with weights and biases large enough for gates to open and close."""
    torch.manual_seed(seed)
    config, sizes = RECURRENT[kind]
    known = {f"{name}_dropout": 0.0 for name in DROPOUTS if hasattr(config, f"{name}_dropout")}
    model = AutoModelForCausalLM.from_config(
        config(**{"vocab_size": VOCABULARY, "initializer_range": 1.0, **known, **sizes, **changes}), dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) / 2)
    return model.eval()
