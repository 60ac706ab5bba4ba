"""Operation and parameter counts against closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prune.evaluation.flops import count_flops, count_parameters

TinyModel = Callable[..., PreTrainedModel]
LENGTH = 16
INPUT_IDS = torch.arange(LENGTH)[None]


def linear_flops(model: PreTrainedModel) -> int:
    """2 per weight of every nn.Linear and token."""
    return 2 * LENGTH * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def attention_flops(layers: int = 2, hidden_size: int = 32) -> int:
    """Scores and weighted values of all heads over the full square, 2 per multiply-add."""
    return layers * 2 * (2 * LENGTH * LENGTH * hidden_size)


def test_flops_of_llama(tiny: TinyModel) -> None:
    model = tiny("llama")
    total, nonzero = count_flops(model, INPUT_IDS)
    assert total == linear_flops(model) + attention_flops()
    assert nonzero == total


def test_flops_of_gpt2_count_its_transposed_layers(tiny: TinyModel) -> None:
    model = tiny("gpt2")
    blocks = sum(p.numel() for name, p in model.transformer.h.named_parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    assert count_flops(model, INPUT_IDS)[0] == 2 * LENGTH * (blocks + head) + attention_flops()


def test_flops_of_mixtral_count_the_chosen_experts_only(tiny: TinyModel) -> None:
    model = tiny("mixtral")
    router = 2 * LENGTH * 2 * 4 * 32  # counted here where the router is no nn.Linear
    routers_are_linear = any(isinstance(module, nn.Linear) and "gate" in name for name, module in model.named_modules())
    experts = 2 * (2 * LENGTH) * 2 * 3 * 32 * 24  # 2 layers, 2 of 4 experts a token, 3 matrices
    total, nonzero = count_flops(model, INPUT_IDS)
    assert total == linear_flops(model) + attention_flops() + experts + router * (not routers_are_linear)
    assert nonzero == total
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[:, :, ::2] = 0
    assert count_flops(model, INPUT_IDS) == (total, total - experts // 6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nonzero_flops_lack_two_per_zero_weight_and_token(tiny: TinyModel, family: str) -> None:
    model = tiny(family)
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and ("layers." in name or ".h." in name)]
    generator = torch.Generator().manual_seed(3)
    zeros = 0
    with torch.no_grad():
        for weight in weights:
            mask = torch.rand(weight.shape, generator=generator) < 0.6
            weight[mask] = 0
            zeros += int(mask.sum())
    total, nonzero = count_flops(model, INPUT_IDS)
    assert nonzero == total - 2 * LENGTH * zeros


def test_zero_activations_are_not_mistaken_for_zero_weights(tiny: TinyModel) -> None:
    """Zero values in the embedding make zero inputs, and the masked half of attention is zero."""
    model = tiny("llama", tie_word_embeddings=False)
    nn.init.zeros_(model.model.embed_tokens.weight)
    total, nonzero = count_flops(model, INPUT_IDS)
    assert nonzero == total


def test_a_tied_head_is_one_parameter_and_one_product(tiny: TinyModel) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight[:10] = 0  # the embedding's rows as well
    embedding = model.model.embed_tokens.weight.numel()
    untied, _ = count_parameters(tiny("llama", tie_word_embeddings=False))
    assert count_parameters(model) == (untied - embedding, untied - embedding - 10 * 32)
    total, nonzero = count_flops(model, INPUT_IDS)
    assert nonzero == total - 2 * LENGTH * 10 * 32


def test_nonzero_parameters_of_a_model_zeroed_by_hand(tiny: TinyModel) -> None:
    model = tiny("llama")
    total, before = count_parameters(model)
    assert total == sum(p.numel() for p in model.state_dict().values()) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3:7] = 0
    assert count_parameters(model) == (total, total - 4 * 32)
