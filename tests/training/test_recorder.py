"""Recordings: what a callback of two lines would have kept, through buffers, cuts and resuming."""

import json
from pathlib import Path

import pytest
import torch
from small_net import Data, Net
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune.errors import BadInputError
from hf_prune.training import recorder
from hf_prune.training.recorder import Recorder, read_series, read_targets


def observe(model: nn.Module) -> Tensor:
    return model.first.weight.flatten()


class Plain(TrainerCallback):
    """Everything in memory."""

    def __init__(self) -> None:
        self.records: list[Tensor] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.records.append(observe(kwargs["model"]).detach().clone())


def train(folder: Path, callbacks: list[TrainerCallback], checkpoint: Path | None = None, steps: int = 24) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, learning_rate=0.05, use_cpu=True,
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, save_steps=8,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=Net(), args=arguments, train_dataset=Data(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def make(folder: Path, every: int = 1) -> Recorder:
    # The target is a series too, so that it can be checked.
    return Recorder(observe, folder, every, lambda model: float(observe(model)[0]), lambda step: step % 5 == 0)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("buffer", [1, recorder.BUFFER_BYTES])
def test_records_are_what_was_there(every: int, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "BUFFER_BYTES", buffer)
    plain = Plain()
    train(tmp_path / "trainer", [plain, make(tmp_path / "records", every)])
    wanted = torch.stack(plain.records, 1)
    assert torch.equal(read_series(tmp_path / "records"), wanted[:, every - 1 :: every])
    assert torch.equal(read_series(tmp_path / "records", 10, 13), wanted[10:13, every - 1 :: every])
    assert read_targets(tmp_path / "records") == [(step, float(wanted[0, step - 1])) for step in (5, 10, 15, 20)]


class Cut(Exception):
    pass


class CutAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            raise Cut


@pytest.mark.parametrize("every", [1, 3])
def test_a_recording_that_was_cut_goes_on_behind_its_checkpoint(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Records behind the checkpoint reach the disk as well, and are dropped.
    monkeypatch.setattr(recorder, "BUFFER_BYTES", 1)
    train(tmp_path / "whole", [make(tmp_path / "wanted", every)])
    with pytest.raises(Cut):
        train(tmp_path / "cut", [make(tmp_path / "records", every), CutAt(13)])
    assert read_series(tmp_path / "records").shape[1] == 13 // every
    # As a kill would leave them.
    with (tmp_path / "records" / "targets.jsonl").open("a") as file:
        file.write('{"step": 1')
    with (tmp_path / "records" / "series.f32").open("ab") as file:
        file.write(b"123")
    train(tmp_path / "cut", [make(tmp_path / "records", every)], tmp_path / "cut" / "checkpoint-8")
    assert torch.equal(read_series(tmp_path / "records"), read_series(tmp_path / "wanted"))
    assert read_targets(tmp_path / "records") == read_targets(tmp_path / "wanted")


def test_records_that_are_missing_are_missed(tmp_path: Path) -> None:
    train(tmp_path / "trainer", [])
    with pytest.raises(BadInputError, match="holds 0 records of the 8 before the checkpoint"):
        train(tmp_path / "trainer", [make(tmp_path / "records")], tmp_path / "trainer" / "checkpoint-8")


def test_the_memory_of_a_recording_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "BUFFER_BYTES", 4 * 96 * 5)
    held = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            held.append(len(own._buffer))

    own = make(tmp_path / "records")
    train(tmp_path / "trainer", [own, Look()])
    assert max(held) < 5 and json.loads((tmp_path / "records" / "recording.json").read_text())["series"] == 96
