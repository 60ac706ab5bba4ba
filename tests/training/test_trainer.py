"""A training that was cut goes on from all of its weights, whatever its family calls them in files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, Trainer

from hf_prune.errors import BadInputError, RunError
from hf_prune.training.arguments import make_train_recipe, make_training_arguments
from hf_prune.training.checkpoints import StopBehind, last_checkpoint
from hf_prune.training.recovery import RecoveryConfig
from hf_prune.training.text import Windows
from hf_prune.training.trainer import make_trainer, only_weights_change, train

OPTIONS: dict[str, Any] = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True,
}  # fmt: skip


def trained(source: Path, folder: Path, end: int, checkpoint: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source)
    with only_weights_change(model):
        arguments = make_training_arguments(OPTIONS, folder, 0, "cpu")
        windows = Windows(tiny_ids(16, 16))
        own = {"model": model, "args": arguments, "train_dataset": windows, "callbacks": [StopBehind(end)]}
        train(make_trainer(Trainer, folder / "logs", **own), checkpoint)
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama"])
def test_it_goes_on_to_the_same_bits(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    whole = trained(tmp_path / "model", tmp_path / "whole", 4)
    trained(tmp_path / "model", tmp_path / "cut", 2)
    again = trained(tmp_path / "model", tmp_path / "cut", 4, last_checkpoint(tmp_path / "cut"))
    begun = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert not torch.equal(begun.get_parameter(name), parameter), name
    # What is saved in the end has the family's own names.
    again.save_pretrained(tmp_path / "saved")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("model", "saved")]
    assert names[0] == names[1]


def test_a_checkpoint_without_one_of_the_parameters_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    trained(tmp_path / "model", tmp_path / "cut", 2)
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    weights = load_file(checkpoint / "model.safetensors")
    weights["elsewhere"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"it holds no model\.layers\.1\.mlp\.up_proj\.weight"):
        trained(tmp_path / "model", tmp_path / "cut", 4, checkpoint)


@pytest.mark.parametrize("launcher", ["FSDP", "DEEPSPEED"])
def test_weights_are_not_sharded(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="fsdp: masks and scores are of whole weights"):
        make_train_recipe({"fsdp": "full_shard"}, RecoveryConfig)
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(BadInputError, match=f"the launcher's config says {launcher}"):
        make_training_arguments(OPTIONS, tmp_path, 0, "cpu")


def test_a_logger_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    for name in ("wandbb", "neptune"):
        with pytest.raises(BadInputError, match=r"^report_to: "):
            make_training_arguments({**OPTIONS, "report_to": name}, tmp_path, 0, "cpu")
    assert not list(tmp_path.iterdir())


def test_a_logger_hears_every_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named integration is transformers' own business; that it is asked is ours."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    heard: list[float] = []

    class Notebook(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.extend([logs["loss"]] if "loss" in (logs or {}) else [])

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setitem(OPTIONS, "report_to", ["notebook"])
    monkeypatch.setitem(OPTIONS, "logging_steps", 1)
    trained(tmp_path / "model", tmp_path / "run", 4)
    # A fresh model knows nothing of 256 bytes.
    assert len(heard) == 4 and heard[0] == pytest.approx(math.log(256), rel=0.02)
