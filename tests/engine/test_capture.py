"""The walk sees exactly what the model computes: block by block, bit for bit, input by input."""

import numpy
import pytest
import torch
from tiny import FAMILIES, tiny_ids, tiny_model
from torch import Tensor, nn

from hf_prune.engine.capture import BlockRunner, InputObserver
from hf_prune.weights import find_blocks, find_views


def own_forward(model: nn.Module, input_ids: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Every block's output and every linear layer's input in the model's own uninterrupted forward."""
    outputs: list[Tensor] = []
    inputs: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in find_blocks(model)[1]
    ]
    for view in find_views(model):
        handles.append(
            view.module.register_forward_pre_hook(lambda module, args, name=view.name: inputs.update({name: args[0]}))
        )
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_block_outputs_equal_the_models_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model, input_ids = tiny_model(family, dtype), tiny_ids(3, 40)
    expected, _ = own_forward(model, input_ids)
    hidden = None
    with BlockRunner(model) as runner:
        for index in range(len(runner.blocks)):
            hidden = runner.run(index, input_ids, hidden)
            assert torch.equal(hidden, expected[index])
    again, _ = own_forward(model, input_ids)
    assert all(torch.equal(before, after) for before, after in zip(expected, again, strict=True))
    assert all("forward" not in vars(block) for block in runner.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_distinct_input_is_summed_once_and_in_full(family: str) -> None:
    model, input_ids = tiny_model(family), tiny_ids(6, 16)
    views = [view for view in find_views(model) if view.block == 0]
    observer = InputObserver(views, frozenset({"gram", "sum"}))
    with BlockRunner(model) as runner, observer.listening():
        for chunk in input_ids.split(2):
            with observer.forward():
                runner.observe(0, chunk, None)
    members = {tuple(sorted(view.name.rsplit(".", 1)[-1] for view in group)) for _, group in observer.groups}
    shared = {
        "gpt2": {("key", "query", "value"), ("c_proj",), ("c_fc",)},
        "opt": {("k_proj", "q_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)},
    }
    usual = {("k_proj", "q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert members == shared.get(family, usual)
    _, inputs = own_forward(model, input_ids)
    for statistics, group in observer.groups:
        statistics.finish(lambda tensor: None)
        exact = inputs[group[0].name].reshape(-1, group[0].shape[1]).double()
        assert statistics.count == input_ids.numel()
        numpy.testing.assert_allclose(statistics.gram, exact.T @ exact, rtol=1e-4, atol=1e-4)
        numpy.testing.assert_allclose(statistics.sum, exact.sum(dim=0), rtol=1e-4, atol=1e-4)


def test_later_forwards_stop_at_the_last_input_that_is_needed() -> None:
    model, input_ids = tiny_model("llama"), tiny_ids(4, 8)
    down = find_blocks(model)[1][0].mlp.down_proj
    calls: list[int] = []
    down.register_forward_hook(lambda *_: calls.append(1))
    observer = InputObserver([view for view in find_views(model) if view.block == 0], frozenset({"sum"}))
    with BlockRunner(model) as runner, observer.listening():
        for chunk in input_ids.split(1):
            with observer.forward():
                runner.observe(0, chunk, None)
    assert len(calls) == 1


def test_an_untied_head_is_observed_behind_the_last_block() -> None:
    model, input_ids = tiny_model("qwen3"), tiny_ids(2, 8)
    outputs, inputs = own_forward(model, input_ids)
    head = find_views(model)[-1]
    observer = InputObserver([head], frozenset({"sum"}))
    with BlockRunner(model) as runner, observer.listening(), observer.forward():
        runner.observe(len(runner.blocks), input_ids, outputs[-1])
    expected = inputs[head.name].double().reshape(-1, head.shape[1]).sum(dim=0)
    numpy.testing.assert_allclose(observer.groups[0][0].sum, expected, rtol=1e-5, atol=1e-5)


def test_training_mode_comes_back() -> None:
    model = tiny_model("llama").train()
    with BlockRunner(model):
        assert not model.training
    assert model.training
