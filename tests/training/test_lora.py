"""What recovery trains with: adapters that are what they claim to be, distillation that is a divergence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, MORE_FAMILIES, tiny_ids, tiny_model
from torch.distributions import Categorical, kl_divergence

from hf_prune.plan import select_views
from hf_prune.training.arguments import make_training_arguments
from hf_prune.training.distillation import DistillationTrainer, divergence
from hf_prune.training.lora import MaskedLora
from hf_prune.training.masks import masks_of
from hf_prune.training.text import Windows


def randomise(model: torch.nn.Module) -> None:
    """Adapters begin with zero products; any numbers show more."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_merging_changes_no_logits_and_no_zero(family: str) -> None:
    model = tiny_model(family)
    layers = select_views(model, None, None, whole=True)[0]
    with torch.no_grad():
        for view in layers[::2]:
            view.parameter.mul_(torch.rand(view.parameter.shape) < 0.5)
    names = [view.parameter_name for view in layers]
    masks = masks_of(model, names)
    assert len(masks) == len(layers[::2])
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    ids = tiny_ids(2, 16)
    # Fused layers part by part, as a one-shot plan has them: an adapter each all the same.
    adapters = MaskedLora(model, select_views(model, None, None)[0], masks, rank=4, alpha=8)
    randomise(adapters.model)
    with torch.no_grad():
        wanted = adapters.model(input_ids=ids, use_cache=False).logits
    trained = {
        name.split("base_model.model.")[1] for name, own in adapters.model.named_parameters() if own.requires_grad
    }
    assert trained and all("lora_" in name for name in trained)
    merged = adapters.merge()
    assert merged is model and not any("lora" in name for name in model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)
    for name in names:
        after = model.get_parameter(name).detach()
        assert not torch.equal(after, before[name])
        if name in masks:
            assert not bool((after * ~masks[name]).any())


def test_sixteen_bit_weights_are_rounded_once() -> None:
    """To the nearest bfloat16 of the exact sum, while it trains as when it is merged."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    views = select_views(model, None, None)[0]
    with torch.no_grad():
        for view in views:
            view.parameter.mul_(torch.rand(view.parameter.shape) < 0.5)
    masks = masks_of(model, [view.parameter_name for view in views])
    adapters = MaskedLora(model, views, masks, rank=4, alpha=8)
    randomise(adapters.model)
    exact, twice = {}, {}
    for view in views:
        layer = model.get_submodule(view.layer)
        down, up = (own["default"].weight.detach() for own in (layer.lora_A, layer.lora_B))
        assert down.dtype == up.dtype == torch.float32
        change = 2 * (up.double() @ down.double()) * masks[view.parameter_name]
        weight = layer.get_base_layer().weight.detach().clone()
        exact[view.parameter_name], twice[view.parameter_name] = weight.double() + change, weight + change.bfloat16()
    with torch.no_grad():
        wanted = adapters.model(input_ids=tiny_ids(2, 16), use_cache=False).logits
        assert torch.equal(adapters.merge()(input_ids=tiny_ids(2, 16), use_cache=False).logits, wanted)

    def too_far(found: torch.Tensor, name: str) -> bool:
        # Half a unit in the last of bfloat16's eight binary digits, and float32's own noise.
        half = 2.0 ** (torch.frexp(exact[name]).exponent.double() - 9)
        return bool(((found.double() - exact[name]).abs() > 1.001 * half + 1e-8).any())

    assert not any(too_far(model.get_parameter(name).detach(), name) for name in exact)
    assert all(too_far(twice[name], name) for name in exact)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_masks_it_is_peft(family: str) -> None:
    ids = tiny_ids(2, 16)
    logits = []
    for ours in (True, False):
        model = tiny_model(family)
        views = select_views(model, None, None, whole=True)[0]
        names = [view.name for view in views]
        transposed = family == "gpt2"
        wrapped: Any = (
            MaskedLora(model, views, {}, rank=4, alpha=8).model
            if ours
            else get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=transposed))
        )
        randomise(wrapped)
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [own.grad for name, own in wrapped.named_parameters() if "lora_A" in name]
        logits.append((loss.detach(), *gradients))
    for own, theirs in zip(*logits, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_that_of_torch_distributions(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, teacher = (torch.randn(2, 300, 11, generator=generator) for _ in range(2))
    wanted = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=ours / temperature))
    found = divergence(ours, teacher, temperature)
    torch.testing.assert_close(found, temperature**2 * wanted.mean(), rtol=1e-5, atol=1e-6)


def test_accumulated_distillation_steps_like_one_large_batch(tmp_path: Path) -> None:
    ends = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        model, teacher = tiny_model("llama").train(), tiny_model("llama", seed=1)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        options |= {"learning_rate": 0.1, "optim": "sgd", "save_strategy": "no", "max_grad_norm": 0.0}
        arguments = make_training_arguments(options, tmp_path / str(size), 0, "cpu")
        DistillationTrainer(
            model=model, args=arguments, train_dataset=Windows(tiny_ids(8, 16)), teacher=teacher
        ).train()
        ends.append(torch.cat([own.detach().flatten() for own in model.parameters()]))
    assert not torch.equal(ends[0], torch.cat([own.flatten() for own in tiny_model("llama").parameters()]))
    for other in ends[1:]:
        torch.testing.assert_close(ends[0], other, rtol=1e-4, atol=1e-6)
