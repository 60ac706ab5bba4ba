"""Masks that hold: against networks whose weights are multiplied by the mask in the forward pass, step by step."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_net import Data, Net, batches
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune.errors import BadInputError, RunError
from hf_prune.training.masks import MaskCallback, MaskHolder, hold_masks, masks_of
from hf_prune.training.trainer import make_trainer, train


def some_masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(parameter.shape, generator=generator) < 0.4
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    }


OPTIMIZERS = {
    # What is added to its denominators is a number in fp16 as well.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, eps=1e-4),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
}


PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "fp16 autocast": (torch.float32, torch.float16),
    "fp16 weights": (torch.float16, None),
    "bf16 weights": (torch.bfloat16, None),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_under_masks_is_training_of_the_masked_network(name: str, precision: str) -> None:
    dtype, inside = PRECISIONS[precision]
    model = Net().to(dtype)
    masks = some_masks(model)
    reference = copy.deepcopy(model)
    parameters = dict(reference.named_parameters())
    optimizer = OPTIMIZERS[name](reference.parameters())

    def loss_of(network: nn.Module, batch: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        own = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        with torch.autocast("cpu", inside or torch.bfloat16, enabled=inside is not None):
            return functional_call(network, weights, (), own)["loss"]

    for batch in batches():
        masked = {
            key: value.masked_fill(~masks[key], 0) if key in masks else value for key, value in parameters.items()
        }
        optimizer.zero_grad()
        loss_of(reference, batch, masked).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()

    optimizer = OPTIMIZERS[name](model.parameters())
    with hold_masks(model, optimizer, masks):
        for batch in batches():
            optimizer.zero_grad()
            loss_of(model, batch, dict(model.named_parameters())).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            for key, mask in masks.items():
                assert not bool((model.get_parameter(key).detach() * ~mask).any())
    for key, parameter in model.named_parameters():
        wanted = parameters[key].masked_fill(~masks[key], 0) if key in masks else parameters[key]
        assert bool(torch.isfinite(parameter).all())
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)


def test_what_no_gradient_makes_of_fp16_weights_is_zero_all_the_same() -> None:
    """AdamW's default of 1e-8 is zero there: a weight without gradient becomes 0 / 0."""
    ends = []
    for mask in (torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, False])):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        holder = MaskHolder({"weight": mask})
        holder.attach(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            (model.weight * torch.tensor([30, 0, -30, 0], dtype=torch.float16)).sum().backward()
            optimizer.step()
        ends.append(model.weight.detach())
    # Every step is the learning rate's length.
    torch.testing.assert_close(ends[1], torch.tensor([0.7, 0, 1.3, 0], dtype=torch.float16), rtol=1e-2, atol=0)
    assert ends[0].isnan().tolist() == [False, True, False, True]


def test_without_masks_momentum_brings_weights_back() -> None:
    """What the holder is for: zeroed once and trained on, hardly a weight stays zero."""
    model = Net()
    masks = some_masks(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with torch.no_grad():
        for key, mask in masks.items():
            model.get_parameter(key).mul_(mask)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    assert int((model.first.weight == 0).sum()) == 0


def test_foreign_masks_and_returned_weights_are_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(BadInputError, match=r"no parameter third\.weight"),
        hold_masks(model, optimizer, {"third.weight": torch.ones(1, dtype=torch.bool)}),
    ):
        pass
    with (
        pytest.raises(BadInputError, match=r"first\.weight is \[16, 6\] and its mask \[2, 2\]"),
        hold_masks(model, optimizer, {"first.weight": torch.ones(2, 2, dtype=torch.bool)}),
    ):
        pass
    for value, said in ((1.0, "brought pruned weights back"), (float("nan"), "ended in weights that are no numbers")):
        with (
            pytest.raises(RunError, match=rf"first\.weight: training {said}"),
            hold_masks(model, optimizer, {"first.weight": torch.zeros(16, 6, dtype=torch.bool)}),
        ):
            with torch.no_grad():
                model.first.weight[0, 0] = value


def test_nothing_is_saved_of_a_model_whose_zeros_came_back() -> None:
    model = Net()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold_masks(model, optimizer, {"first.weight": torch.eye(16, 6, dtype=torch.bool)}) as holder:
        assert int((model.state_dict()["first.weight"] != 0).sum()) == 6
        model.load_state_dict(dense)
        with pytest.raises(RunError, match=r"first\.weight: training brought pruned weights back"):
            model.state_dict()
        holder.apply()
    # Outside nobody holds them.
    model.load_state_dict(dense)
    assert torch.equal(model.state_dict()["first.weight"], dense["first.weight"])


def test_tensorboard_writes_beside_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callback reads the variable when the Trainer is made; the Trainer's own folder is gone in the end."""
    name, seen = "TENSORBOARD_LOGGING_DIR", []

    class Spy(Trainer):
        def __init__(self, **arguments: object) -> None:
            seen.append(os.environ[name])
            super().__init__(**arguments)

    arguments = TrainingArguments(output_dir=str(tmp_path / "checkpoints"), use_cpu=True)
    for given in (None, str(tmp_path / "mine")):
        monkeypatch.delenv(name, raising=False) if given is None else monkeypatch.setenv(name, given)
        make_trainer(Spy, tmp_path / "out.runs", model=Net(), args=arguments, train_dataset=Data())
        assert os.environ.get(name) == given
    assert seen == [str(tmp_path / "out.runs"), str(tmp_path / "mine")]


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_no_checkpoint_holds_what_the_masks_do_not(strategy: str, tmp_path: Path) -> None:
    model = Net()
    masks = {"first.weight": torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) > 0.5}

    class Spoil(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            model.first.weight.data.fill_(1.0)

        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if strategy == "steps":
                model.first.weight.data.fill_(1.0)

    own = TrainingArguments(
        output_dir=str(tmp_path), save_strategy=strategy, save_steps=2, max_steps=40, use_cpu=True, report_to="none",
        per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    built = Trainer(model=model, args=own, train_dataset=Data(), callbacks=[Spoil(), MaskCallback(masks)])
    with pytest.raises(RunError, match=r"first\.weight: training brought pruned weights back"):
        train(built, None)
    assert not list(tmp_path.glob("checkpoint-*"))
    # The hooks are gone with the training that failed.
    model.first.weight.grad = None
    model(**torch.utils.data.default_collate(list(Data())[:4]))["loss"].backward()
    assert bool((model.first.weight.grad[~masks["first.weight"]] != 0).any())


def test_only_parameters_with_zeros_have_masks() -> None:
    model = Net()
    with torch.no_grad():
        model.second.weight[0, :5] = 0
    found = masks_of(model, ["first.weight", "second.weight"])
    assert list(found) == ["second.weight"] and int((~found["second.weight"]).sum()) == 5


def trainer(folder: Path, model: nn.Module, callbacks: list[TrainerCallback], **own: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=16, learning_rate=0.05, weight_decay=0.1,
        save_steps=6, use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, **own,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=callbacks)


@pytest.mark.parametrize("own", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_a_trainer_holds_and_resumes_to_the_bit(own: dict, tmp_path: Path) -> None:
    masks = some_masks(Net())
    whole = Net()
    trainer(tmp_path / "whole", whole, [MaskCallback(masks)], **own).train()
    cut = Net(seed=9)
    # A checkpoint in the middle of the first run; the second begins from other weights, which it replaces.
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    trainer(tmp_path / "cut", cut, [MaskCallback(masks)], **own).train(resume_from_checkpoint=str(checkpoint))
    for key, parameter in whole.named_parameters():
        assert torch.equal(parameter, cut.get_parameter(key))
        if key in masks:
            assert not bool((parameter.detach() * ~masks[key]).any())
            assert int((parameter.detach() != 0).sum()) == int(masks[key].sum())


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_trainer_that_accumulates_trains_the_masked_network(name: str, tmp_path: Path) -> None:
    """Batches of four, all of them together in every step, against the masked function on everything at once."""
    everything = torch.utils.data.default_collate(list(Data()))
    batches = len(Data()) // 4
    assert batches > 1 and len(Data()) % 4 == 0
    model = Net()
    masks = some_masks(model)
    reference = copy.deepcopy(model)
    parameters, optimizer = dict(reference.named_parameters()), OPTIMIZERS[name](reference.parameters())
    for _ in range(5):
        masked = {key: own.masked_fill(~masks[key], 0) if key in masks else own for key, own in parameters.items()}
        optimizer.zero_grad()
        functional_call(reference, masked, (), everything)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=batches, max_steps=5,
        max_grad_norm=0.5, lr_scheduler_type="constant", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    given: tuple = (OPTIMIZERS[name](model.parameters()), None)
    Trainer(model, arguments, train_dataset=Data(), callbacks=[MaskCallback(masks)], optimizers=given).train()
    for key, parameter in model.named_parameters():
        wanted = parameters[key].masked_fill(~masks[key], 0) if key in masks else parameters[key]
        torch.testing.assert_close(parameter, wanted, rtol=1e-4, atol=1e-5)


class Spoiler(TrainerCallback):
    """What goes behind the holder's back, between its last step and the checkpoint."""

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == 5:
            with torch.no_grad():
                kwargs["model"].first.weight.fill_(1.0)


def test_no_checkpoint_is_written_with_weights_that_came_back(tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(RunError, match="brought pruned weights back"):
        trainer(tmp_path, model, [MaskCallback(some_masks(model)), Spoiler()]).train()
    assert not (tmp_path / "checkpoint-6").exists()


FSDP = """
import os
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from hf_prune.training.masks import hold_masks
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
masks = {"0.weight": torch.rand(16, 8) < 0.3, "2.weight": torch.rand(4, 16) < 0.3}
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
before = model[0].weight.full_tensor().clone()
with hold_masks(model, optimizer, masks):
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
for name, mask in masks.items():
    weight = model.get_parameter(name).full_tensor()
    assert not bool((weight * ~mask).any()) and int((weight != 0).sum()) == int(mask.sum()), name
assert not torch.equal(before * masks["0.weight"], model[0].weight.full_tensor())
# Neither leaves before the other has everything.
dist.barrier()
dist.destroy_process_group()
# Threads of torch's that still run now and then abort an interpreter on its way out.
os._exit(0)
"""


@pytest.mark.slow
def test_sharded_parameters_hold_too(tmp_path: Path) -> None:
    """FSDP2 over two processes on the CPU: parameters are DTensors, and so become their masks."""
    script = tmp_path / "sharded.py"
    script.write_text(FSDP)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(script),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    # What went wrong comes first, what torchrun says of it last.
    assert done.returncode == 0, done.stderr[:4000]
