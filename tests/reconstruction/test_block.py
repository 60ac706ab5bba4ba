"""The training of a block: what moves, what does not, that it helps, and that every process does the same."""

import copy

import pytest
import torch
from tiny import FAMILIES, matrix_of, tiny_ids, tiny_model
from torch import Tensor, nn

from hf_prune.compose import make_config
from hf_prune.engine.block_training import TrainedWeight
from hf_prune.engine.capture import BlockRunner
from hf_prune.errors import BadInputError
from hf_prune.pruning import prune
from hf_prune.reconstruction.block import BlockOutcome, BlockReconstruction
from hf_prune.weights import find_blocks


def options(**changes: object) -> dict[str, object]:
    if changes.get("reconstruct") == "none":
        return {"method": "wanda", "sparsity": 0.6, **changes}
    return {
        "method": "wanda",
        "sparsity": 0.6,
        "reconstruct": "block",
        "reconstruct_passes": 4,
        "reconstruct_learning_rate": 0.1,
        "reconstruct_batch_size": 4,
        **changes,
    }


def block_outputs(model: nn.Module, input_ids: Tensor, block: int) -> Tensor:
    """The output of a block in the model's own forward."""
    seen = []
    blocks = find_blocks(model)[1]

    def record(module: nn.Module, args: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[block].register_forward_hook(record)
    with torch.no_grad():
        model(input_ids)
    handle.remove()
    return seen[0]


def error(model: nn.Module, target: Tensor, input_ids: Tensor, block: int) -> float:
    return float((block_outputs(model, input_ids, block) - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_stay_and_only_surviving_weights_and_norms_move(family: str) -> None:
    plain, trained = tiny_model(family), tiny_model(family)
    dense = {name: value.clone() for name, value in plain.state_dict().items()}
    input_ids = tiny_ids(16, 32)
    first = f"{find_blocks(plain)[0]}.0"
    prune(plain, make_config(options(reconstruct="none", targets=[first])), input_ids=input_ids)
    result = prune(trained, make_config(options(targets=[first])), input_ids=input_ids)
    pruned = {view.parameter for view in result.plan.views}
    moved = set()
    for name, value in trained.state_dict().items():
        before = plain.state_dict()[name]
        if name in pruned:
            assert torch.equal(value == 0, before == 0), name
            assert not torch.equal(value, before), name
        elif not torch.equal(value, dense[name]):
            moved.add(name)
    assert moved and all(name.startswith(first + ".") and ("norm" in name or ".ln_" in name) for name in moved)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())
    assert [view.kept for view in result.views] == [
        int((matrix_of(trained.state_dict(), view) != 0).sum()) for view in result.plan.views
    ]


@pytest.mark.parametrize("target", ["block", "model"])
def test_the_block_comes_nearer_to_its_target(target: str) -> None:
    """On windows that neither the solve nor the training has seen."""
    input_ids, fresh = tiny_ids(24, 64), tiny_ids(8, 64, seed=9)
    dense, plain, trained = (tiny_model("llama") for _ in range(3))
    last = ["model.layers.0", "model.layers.1"]
    prune(plain, make_config(options(reconstruct="none", targets=last)), input_ids=input_ids)
    result = prune(trained, make_config(options(targets=last, reconstruct_target=target)), input_ids=input_ids)
    for outcome in result.reconstruction.values():
        assert 0 < outcome.after < outcome.before and outcome.passes == 4
    before, after = (error(model, block_outputs(dense, fresh, 1), fresh, 1) for model in (plain, trained))
    assert after < 0.9 * before


def test_the_target_is_the_dense_block_on_the_pruned_prefix() -> None:
    """What is reported for block 1 is computed here from three models, block by block."""
    input_ids = tiny_ids(16, 64)
    trained = tiny_model("llama")
    targets = ["model.layers.0", "model.layers.1"]
    config = make_config(options(targets=targets, reconstruct_learning_rate=1e-9))
    outcome = prune(trained, config, input_ids=input_ids).reconstruction[1]
    reference = copy.deepcopy(trained)
    dense = tiny_model("llama")
    # A learning rate of nothing: the prefix is Wanda's, and so is block 1.
    reference.model.layers[1].load_state_dict(dense.model.layers[1].state_dict())
    held_out = [4 * number for number in range(4)]  # batches of 4 windows: 16 windows make 4, one is held out
    whole = error(trained, block_outputs(reference, input_ids, 1), input_ids, 1)
    parts = [
        error(trained, block_outputs(reference, input_ids[start : start + 4], 1), input_ids[start : start + 4], 1)
        for start in held_out
    ]
    assert min(abs(outcome.before - part) for part in parts) < 1e-6 * whole + 1e-9
    assert outcome.after == pytest.approx(outcome.before, rel=1e-4)


def test_a_training_that_does_harm_leaves_the_block_as_it_was() -> None:
    input_ids = tiny_ids(16, 64)
    plain, trained = tiny_model("llama"), tiny_model("llama")
    prune(plain, make_config(options(reconstruct="none")), input_ids=input_ids)
    result = prune(trained, make_config(options(reconstruct_learning_rate=1e5)), input_ids=input_ids)
    assert all(outcome.after == outcome.before for outcome in result.reconstruction.values())
    for one, other in zip(plain.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_weights_are_trained_in_float32() -> None:
    input_ids = tiny_ids(16, 64)
    model = tiny_model("llama", torch.bfloat16)
    # So small a step would be lost on bfloat16 weights, whose neighbours are 0.4 % apart.
    result = prune(model, make_config(options(reconstruct_learning_rate=0.03)), input_ids=input_ids)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(outcome.after < outcome.before for outcome in result.reconstruction.values())
    assert abs(result.sparsity - 0.6) < 0.02


def test_a_budget_of_seconds_ends_the_training_early() -> None:
    config = make_config(options(reconstruct_passes=10_000, reconstruct_seconds=0.2))
    result = prune(tiny_model("llama"), config, input_ids=tiny_ids(16, 64))
    assert all(0 < outcome.passes < 10_000 for outcome in result.reconstruction.values())


def test_half_a_pass_sees_half_of_the_windows() -> None:
    config = make_config(options(reconstruct_passes=0.5, reconstruct_batch_size=1))
    result = prune(tiny_model("llama"), config, input_ids=tiny_ids(16, 64))
    # 16 windows, 2 of them held out.
    assert [outcome.passes for outcome in result.reconstruction.values()] == [0.5] * 3
    assert all(outcome.after < outcome.before for outcome in result.reconstruction.values())


def test_the_forwards_are_counted() -> None:
    input_ids = tiny_ids(16, 64)  # one forward of 1,024 tokens
    calls = []
    original = BlockRunner._forward

    def counted(self: BlockRunner, own: Tensor) -> None:
        calls.append(len(own))
        original(self, own)

    BlockRunner._forward = counted
    try:
        result = prune(tiny_model("llama"), make_config(options(reconstruct_passes=2)), input_ids=input_ids)
    finally:
        BlockRunner._forward = original
    # Whole windows: observe 3 blocks, hand on 2. Batches of 4: 1 held out, looked at 3 times; 3 trained on, twice.
    assert calls.count(16) == 5 and calls.count(4) == 3 * (3 + 6)
    assert result.forward_passes == pytest.approx(5 / 3)


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(BadInputError, match="propagate"):
        make_config(options(propagate=False))
    with pytest.raises(BadInputError, match="reconstruct_target"):
        make_config(options(reconstruct_target="teacher"))
    with pytest.raises(BadInputError, match="one batch only"):
        prune(tiny_model("llama"), make_config(options()), input_ids=tiny_ids(4, 64))
    with pytest.raises(BadInputError, match="needs calibration text"):
        prune(tiny_model("llama"), make_config(options(method="magnitude")))


class Quadratic:
    """A task whose best state is known: one weight vector towards a target, held out equal to training."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.tensor([4.0, 0.0]))
        self.weights = [TrainedWeight(self.parameter, torch.tensor([True, False]), change=2.0)]
        self.norms: list[nn.Parameter] = []
        self.steps = [[0]] * 50
        self.held_out = [0]

    def outputs(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.parameter[None, None] * 1.0, torch.tensor([[[1.0, 3.0]]])

    def total(self, tensor: Tensor) -> None:
        pass

    def agree(self, value: float) -> float:
        return value


def test_the_optimizer_finds_the_constrained_minimum() -> None:
    task = Quadratic()
    outcome = BlockReconstruction(reconstruct_passes=10, reconstruct_learning_rate=0.05).update_block(task)
    assert isinstance(outcome, BlockOutcome)
    assert task.parameter.tolist() == pytest.approx([1.0, 0.0], abs=1e-2)
    assert outcome.before == pytest.approx((9 + 9) / 10) and outcome.after == pytest.approx(9 / 10, rel=1e-3)


def test_the_first_step_is_a_share_of_how_far_pruning_moved_the_weight() -> None:
    task = Quadratic()
    # One step of fifty, the first of Adam: its learning rate, against the gradient's sign.
    BlockReconstruction(reconstruct_passes=0.02, reconstruct_learning_rate=0.05).update_block(task)
    assert task.parameter.tolist() == pytest.approx([4.0 - 0.05 * 2.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_how_far_pruning_moved_the_weights(method: str) -> None:
    """Against the dense weights and, where a Gram matrix is gathered, the outputs on the inputs that the layer saw."""
    dense, model = tiny_model("llama"), tiny_model("llama")
    input_ids = tiny_ids(16, 64)
    name = "model.layers.0.self_attn.q_proj"
    config = make_config({"method": method, "sparsity": 0.6, "targets": [name]})
    (view,) = prune(model, config, input_ids=input_ids).views
    weight, change = (
        dense.get_submodule(name).weight,
        model.get_submodule(name).weight - dense.get_submodule(name).weight,
    )
    expected = change.detach().square().mean().sqrt()
    if method == "sparsegpt":
        seen = []
        handle = dense.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            dense(input_ids)
        handle.remove()
        inputs = seen[0].flatten(0, 1)
        expected = (weight.square().mean().sqrt() * (inputs @ change.T).norm() / (inputs @ weight.T).norm()).detach()
    assert view.change == pytest.approx(float(expected), rel=1e-4)
