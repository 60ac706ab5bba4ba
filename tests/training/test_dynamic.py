"""Masks that move through a Trainer: against a plain loop, over a cut, with an average, and as a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_net import Data, Net
from tiny import FAMILIES, tiny_ids, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_prune.errors import BadInputError
from hf_prune.methods.dynamic_sparse import FIRST_THRESHOLD, DynamicSparseConfig, initial_masks, updated_masks
from hf_prune.plan import select_views
from hf_prune.sparse_training import run_sparse
from hf_prune.training.arguments import make_train_recipe, make_training_arguments
from hf_prune.training.averaging import WeightAverage
from hf_prune.training.dynamic import DynamicSparseTraining
from hf_prune.training.dynamic_masks import MOMENTUM, SEED_STRIDE
from hf_prune.training.text import Windows

NAMES = ["first.weight", "second.weight"]


class Batches(TrainerCallback):
    """Stops a run behind a step, as a kill would."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.stop:
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
        return Trainer(model=model, args=given, train_dataset=Data(), callbacks=[*kept, Batches(stop)])

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


@pytest.mark.parametrize("stop", [3, 13])
def test_a_cut_run_goes_on_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    own = {"growth": "momentum", "redistribution": "momentum", "death": "threshold", "averaging": True}
    own |= {"non_monotone": 1, "update_steps": 3}
    # Falls in no epoch but the first: the average begins with the third.
    falling = lambda model: float(model.first.weight.abs().sum() > 0)  # noqa: E731
    whole, _ = training(tmp_path / "whole", own, losses=falling, num_train_epochs=4).run()
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "cut", own, stop, losses=falling, num_train_epochs=4).run()
    model, _ = training(tmp_path / "cut", own, losses=falling, num_train_epochs=4).run()
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


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


def test_a_dense_twin_begins_with_the_same_weights(tmp_path: Path) -> None:
    run = training(tmp_path, {"train_dense": True})
    _, rounds = run.run()
    assert [own.kind for own in rounds] == ["dense", "sparse"] and rounds[0].kept == rounds[0].total
    assert not bool((load_file(tmp_path / "round-00" / "model.safetensors")["first.weight"] == 0).any())
    # Read, not trained again.
    again = training(tmp_path, {"train_dense": True}, stop=1).run()[1]
    assert [own.steps for own in again] == [24, 24]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_sparse(family: str, tmp_path: Path) -> None:
    ids = tiny_ids(8, 16)
    names = [view.parameter_name for view in select_views(tiny_model(family), None, None)[0]]

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
