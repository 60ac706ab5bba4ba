"""Recurrent language models as transformers knows models; importing this makes its Auto classes know them.

The classes live in one file that needs torch and transformers alone: `save_pretrained` puts a copy of it beside the
weights, so that a folder loads without hf_prune by `trust_remote_code=True`, and with this imported without it.
`AutoConfig` and `AutoModelForCausalLM` are those of transformers: taken from here, they know these models for sure.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from hf_prune.models.modeling_recurrent import (
    AWDLSTMMoSConfig,
    AWDLSTMMoSForCausalLM,
    RecurrentConfig,
    RecurrentForCausalLM,
    RecurrentState,
    RHNConfig,
    RHNForCausalLM,
    StackedLSTMConfig,
    StackedLSTMForCausalLM,
)

__all__ = [
    "AWDLSTMMoSConfig",
    "AWDLSTMMoSForCausalLM",
    "AutoConfig",
    "AutoModelForCausalLM",
    "RHNConfig",
    "RHNForCausalLM",
    "RecurrentConfig",
    "RecurrentForCausalLM",
    "RecurrentState",
    "StackedLSTMConfig",
    "StackedLSTMForCausalLM",
]

for _model in (StackedLSTMForCausalLM, RHNForCausalLM, AWDLSTMMoSForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
