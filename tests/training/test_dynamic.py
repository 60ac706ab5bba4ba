"""Masks that move through a Trainer: against a plain loop, over a cut, with an average, and as a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_net import Data, Net
from tiny import FAMILIES, tiny_ids, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_prune.errors import BadInputError
from hf_prune.methods.dynamic_sparse import FIRST_THRESHOLD, DynamicSparseConfig, initial_masks, updated_masks
from hf_prune.plan import select_views
from hf_prune.sparse_training import run_sparse
from hf_prune.training.arguments import make_train_recipe, make_training_arguments
from hf_prune.training.averaging import WeightAverage
from hf_prune.training.dynamic import DynamicSparseTraining
from hf_prune.training.dynamic_masks import MOMENTUM, SEED_STRIDE, DynamicMaskCallback, forget
from hf_prune.training.text import Windows

NAMES = ["first.weight", "second.weight"]


class Batches(TrainerCallback):
    """Stops a run behind a step, as a kill would; behind the checkpoint of one where the step is negative."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.stop:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == -self.stop:
            raise KeyboardInterrupt


def training(folder: Path, own: dict[str, Any], stop: int = 0, losses: Any = None, **arguments: Any) -> Any:
    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        given = TrainingArguments(
            **{
                "output_dir": str(output_dir), "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True,
                "seed": 3, "dataloader_pin_memory": False, "num_train_epochs": 2, "learning_rate": 0.02,
                "lr_scheduler_type": "constant", "max_grad_norm": 0, "weight_decay": 0.01, "save_strategy": "steps",
                "save_steps": 2, "save_total_limit": 1, **arguments,
            }
        )  # fmt: skip
        kept = [callback for callback in callbacks if not isinstance(callback, Batches)]
        return Trainer(model=model, args=given, train_dataset=Data(), callbacks=[Batches(stop), *kept])

    config = DynamicSparseConfig(**{"sparsity": 0.6, "update_steps": 4, **own})
    return DynamicSparseTraining(
        lambda seed: Net(seed or 0), NAMES, make_trainer, lambda model: {}, config, folder, seed=7, held_out_loss=losses
    )


def batches_of_the_trainer(folder: Path) -> list[dict[str, Tensor]]:
    """What the Trainer's loader hands out in two epochs with its seed."""
    seen: list[dict[str, Tensor]] = []

    class Watched(Net):
        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if self.training:
                seen.append({"inputs": inputs.clone(), "labels": labels.clone()})
            return super().forward(inputs, labels)

    run = training(folder, {})
    run.make_model = lambda seed: Watched(seed or 0)
    run.run()
    return seen


@pytest.mark.parametrize(
    ("growth", "redistribution"),
    [("random", "none"), ("gradient", "nonzeros"), ("gradient", "momentum"), ("momentum", "momentum")],
)
def test_a_trainer_does_what_a_plain_loop_does(growth: str, redistribution: str, tmp_path: Path) -> None:
    own = {"growth": growth, "redistribution": redistribution, "death": "magnitude"}
    model, rounds = training(tmp_path / "run", own).run()

    config = DynamicSparseConfig(sparsity=0.6, update_steps=4, **own)
    plain = Net(0)
    weights = {name: plain.get_parameter(name) for name in NAMES}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    masks = initial_masks(shapes, 0.6, "er", torch.Generator().manual_seed(7))
    decayed = [weight for weight in plain.parameters() if weight.ndim > 1]
    others = [weight for weight in plain.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=0.02
    )
    means = {name: torch.zeros(shape) for name, shape in shapes.items()}
    everything = batches_of_the_trainer(tmp_path / "watched")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    for step, batch in enumerate(everything, start=1):
        optimizer.zero_grad()
        plain(**batch)["loss"].backward()
        dense = {name: weight.grad.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.grad *= masks[name]
            means[name] = MOMENTUM * means[name] + dense[name]
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
            if step % 4 == 0 and step < len(everything):
                new, _ = updated_masks(
                    weights, masks, config, config.rate(step, len(everything)), FIRST_THRESHOLD,
                    torch.Generator().manual_seed(7 * SEED_STRIDE + step), {"gradient": dense, "momentum": means},
                )  # fmt: skip
                for name, weight in weights.items():
                    for kept in ("exp_avg", "exp_avg_sq"):
                        optimizer.state[weight][kept].mul_(masks[name] & new[name])
                    weight.mul_(new[name])
                masks = new
    for name, parameter in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=1e-6), name
    stored = load_file(next((tmp_path / "run").glob("sparse-*")) / "masks.safetensors")
    assert all(torch.equal(stored[name], masks[name]) for name in NAMES)
    assert rounds[-1].kept == round(0.4 * sum(mask.numel() for mask in masks.values()))
    assert not torch.equal(
        masks[NAMES[0]], initial_masks(shapes, 0.6, "er", torch.Generator().manual_seed(7))[NAMES[0]]
    )


@pytest.mark.parametrize(
    ("stop", "saved"), [(3, "steps"), (13, "steps"), (-12, "steps"), (-48, "steps"), (30, "epoch")]
)
def test_a_cut_run_goes_on_to_the_same_bits(stop: int, saved: str, tmp_path: Path) -> None:
    """Within an epoch, at an update and the end of an epoch, behind the last step, from an epoch's checkpoint."""
    own = {"growth": "momentum", "redistribution": "momentum", "death": "threshold", "averaging": True}
    own |= {"non_monotone": 1, "update_steps": 3}
    alive: list[int] = []

    def falling(model: nn.Module) -> float:
        """Falls in no epoch but the first: the average begins with the third."""
        alive.append(sum(int((model.get_parameter(name) != 0).sum()) for name in NAMES))
        return 1.0

    given = {"losses": falling, "num_train_epochs": 4, "save_strategy": saved}
    whole, _ = training(tmp_path / "whole", own, **given).run()
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "cut", own, stop, **given).run()
    model, rounds = training(tmp_path / "cut", own, **given).run()
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert sum(int((model.get_parameter(name) != 0).sum()) for name in NAMES) <= rounds[-1].kept
    # Looked at before masks move, when no weight has just grown from zero.
    assert set(alive) == {rounds[-1].kept}


def test_a_folder_has_one_beginning_whatever_the_settings(tmp_path: Path) -> None:
    """Another training's result under the same settings is never taken for one's own."""
    first, _ = training(tmp_path, {}).run()
    other = training(tmp_path, {"growth": "gradient"}, learning_rate=0.1)
    other.fingerprint = "another learning rate"
    with pytest.raises(BadInputError, match="holds a training of another model, text or recipe"):
        other.run()
    training(tmp_path, {"growth": "gradient"}).run()
    seeded = training(tmp_path, {})
    seeded.seed = 8
    assert not torch.equal(seeded.run()[0].first.weight, first.first.weight)
    assert len(list(tmp_path.glob("sparse-*"))) == 3


@pytest.mark.parametrize(
    ("own", "arguments", "message"),
    [
        ({"update_steps": 24}, {}, "update_steps: the masks would first move behind step 24, and the training has 24"),
        ({"update_steps": None}, {"num_train_epochs": 1}, "would first move behind step 12, and the training has 12"),
    ],
)
def test_masks_that_would_never_move_are_refused(own: dict, arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        training(tmp_path / "run", {**own, "train_dense": True}, **arguments).run()
    assert not list(tmp_path.iterdir())
    # What was there before stays.
    training(tmp_path / "run", {}, **arguments).run()
    with pytest.raises(BadInputError, match=message):
        training(tmp_path / "run", own, **arguments).run()
    assert (tmp_path / "run" / "initial.safetensors").is_file() and len(list((tmp_path / "run").glob("sparse-*"))) == 1


def test_scaled_gradients_and_packed_states_are_refused() -> None:
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    arguments.fp16 = True
    callback = DynamicMaskCallback({}, DynamicSparseConfig(growth="gradient", update_steps=1))
    with pytest.raises(BadInputError, match="fp16: it scales gradients"):
        state, loader = TrainerState(max_steps=4), [None] * 4
        callback.on_train_begin(arguments, state, TrainerControl(), model=Net(), train_dataloader=loader)
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"codes": torch.zeros(2, 2, dtype=torch.uint8)}
    with pytest.raises(BadInputError, match="optim: SGD packs what it remembers"):
        forget(optimizer, weight, torch.ones(2, 2, dtype=torch.bool))


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, {}, stop=13).run()
    file = next(tmp_path.rglob("dynamic_masks.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(BadInputError, match=r"checkpoint-12: the checkpoint lacks its masks .* remove it"):
        training(tmp_path, {}).run()
    shutil.rmtree(file.parent)
    training(tmp_path, {}).run()


def test_the_average_is_the_mean_of_the_steps_since_the_loss_stopped_falling() -> None:
    losses = iter([3.0, 2.0, 2.5, 3.1])
    average = WeightAverage(lambda model: next(losses), non_monotone=2)
    net = nn.Linear(2, 2, bias=False)
    masks = {"weight": torch.ones(2, 2, dtype=torch.bool)}
    average.attach(net, masks)
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    for _ in range(4):
        for _ in range(3):
            with torch.no_grad():
                net.weight.copy_(torch.randn(2, 2, generator=generator))
            if average.began:
                seen.append(net.weight.detach().clone())
            average.step()
        average.end_epoch()
    # 3.1 is not below the lowest of all epochs but the last two, which is 3: nothing was averaged before.
    assert average.began and not seen
    stays = torch.tensor([[True, False], [True, True]])
    for step in range(4):
        with torch.no_grad():
            net.weight.copy_(torch.randn(2, 2, generator=generator))
            if step == 2:
                average.forget("weight", stays)
            if step >= 2:
                net.weight[0, 1] = 0.25
        seen.append(net.weight.detach().clone())
        average.step()
    average.write()
    wanted = torch.stack(seen).mean(dim=0)
    wanted[0, 1] = 0.25  # over the two steps since it grew
    assert torch.allclose(net.weight, wanted, atol=1e-6)


def test_an_average_that_never_began_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(2, 2)
    before = net.weight.detach().clone()
    average = WeightAverage(lambda model: 1.0, non_monotone=2)
    average.attach(net, {})
    average.write()
    assert torch.equal(net.weight, before) and "the held-out loss fell to the end" in caplog.text


def test_a_dense_twin_begins_with_the_same_weights(tmp_path: Path) -> None:
    run = training(tmp_path, {"train_dense": True})
    _, rounds = run.run()
    assert [own.kind for own in rounds] == ["dense", "sparse"] and rounds[0].kept == rounds[0].total
    assert not bool((load_file(tmp_path / "round-00" / "model.safetensors")["first.weight"] == 0).any())
    # Read, not trained again.
    again = training(tmp_path, {"train_dense": True}, stop=1).run()[1]
    assert [own.steps for own in again] == [24, 24]


def test_a_dense_twin_is_averaged_where_the_sparse_training_is(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            seen.append(kwargs["model"].first.weight.detach().clone())

    plain = training(tmp_path / "plain", {}, num_train_epochs=4)
    plain.make_trainer(Net(0), tmp_path / "plain", [Weights()]).train()
    own = {"train_dense": True, "averaging": True, "non_monotone": 1}
    model, rounds = training(tmp_path / "run", own, losses=lambda model: 1.0, num_train_epochs=4).run()
    assert [own.kind for own in rounds] == ["dense", "sparse"] and bool((model.first.weight == 0).any())
    # With the third epoch the loss is not below that of all but the last before it: the mean begins with its last step.
    twin = load_file(tmp_path / "run" / "averaged-1" / "model.safetensors")["first.weight"]
    assert torch.allclose(twin, torch.stack(seen[35:]).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_sparse(family: str, tmp_path: Path) -> None:
    ids = tiny_ids(8, 16)
    names = [view.parameter_name for view in select_views(tiny_model(family), None, None, whole=True)[0]]

    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        given = make_training_arguments({"max_steps": 4, "learning_rate": 1e-3}, output_dir, 0, "cpu")
        return Trainer(model=model, args=given, train_dataset=Windows(ids), callbacks=callbacks)

    config = DynamicSparseConfig(sparsity=0.7, growth="gradient", death="set", update_steps=1)
    make = lambda seed: tiny_model(family, seed=seed or 0).train()  # noqa: E731
    found, rounds = DynamicSparseTraining(make, names, make_trainer, lambda model: {}, config, tmp_path).run()
    total = sum(found.get_parameter(name).numel() for name in names)
    assert rounds[-1].kept == round(0.3 * total)
    # What grew in the third update and met a gradient since is there; nothing is there that no mask holds.
    alive = sum(int((found.get_parameter(name) != 0).sum()) for name in names)
    assert 0.95 * round(0.3 * total) <= alive <= round(0.3 * total)


RECIPE = {
    "model_type": "llama",
    "config_overrides": "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2,tie_word_embeddings=true",
    "vocab_size": 300, "device": "cpu", "dataset_name": "builtin:python-docs", "seq_length": 32,
    "max_train_windows": 64, "eval_dataset_name": "builtin:python-docs", "eval_split": "test", "eval_seq_length": 32,
    "eval_max_windows": 8, "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-3,
    "eval_efficiency": False, "method": "dynamic_sparse", "sparsity": 0.75, "growth": "gradient", "update_steps": 3,
    "averaging": True, "train_dense": True,
}  # fmt: skip


def test_a_recipe_makes_a_verified_folder(tmp_path: Path) -> None:
    report = run_sparse(make_train_recipe({**RECIPE, "output_dir": str(tmp_path / "out")}, DynamicSparseConfig))
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(0.75, abs=1e-4)
    assert all(row["passed"] for row in report["verification"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    zeros = sum(int((model.get_parameter(f"{view['name']}.weight") == 0).sum()) for view in report["views"])
    assert zeros == round(0.75 * report["sparsity"]["pruned_parameters"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Dynamic sparse training" in card and "2101.09048" in card
    said = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert said["evaluation"]["dense"]["perplexity"] > 1 and said["method"]["options"]["growth"] == "gradient"


def test_too_little_text_to_hold_some_out_is_refused(tmp_path: Path) -> None:
    values = {**RECIPE, "max_train_windows": 16, "output_dir": str(tmp_path / "out")}
    with pytest.raises(BadInputError, match="averaging: 16 windows are held out, and the text fills 16"):
        run_sparse(make_train_recipe(values, DynamicSparseConfig))
    assert not (tmp_path / "out").exists()


def moved_masks(folder: Path, batch: int) -> dict[str, Tensor]:
    """What this process's masks are behind a training, where every process has batches of so many rows."""
    # SGD: a gradient summed in another order moves a weight by as little, whatever its size.
    own = {"optim": "sgd", "learning_rate": 0.2, "save_strategy": "no", "per_device_train_batch_size": batch}
    config = DynamicSparseConfig(growth="gradient", redistribution="momentum", death="global_magnitude", update_steps=4)
    net = Net(0)
    shapes = {name: tuple(net.get_parameter(name).shape) for name in NAMES}
    moving = DynamicMaskCallback(initial_masks(shapes, 0.6, "er", torch.Generator().manual_seed(7)), config, 7)
    training(folder, {}, **own).make_trainer(net, folder, [moving]).train()
    assert moving.updates == 5
    return moving.masks


ONE_OF_TWO = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
from test_dynamic import moved_masks
import torch.distributed as dist
folder = Path(sys.argv[1])
masks = moved_masks(folder, 4)
assert dist.get_world_size() == 2
save_file(masks, folder / f"{dist.get_rank()}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_move_masks_as_one_does_on_the_batches_of_both(tmp_path: Path) -> None:
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}:{here.parents[1]}"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[:4000]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    one = moved_masks(tmp_path / "one", 8)
    for name in NAMES:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], one[name])
