"""Series of a training on disk: what a function says of the model behind every step, in bounded memory.

    FOLDER/series.f32     float32 [records, series], a record after another
    FOLDER/targets.jsonl  {"step": ..., "value": ...}, a line for each step at which the target was measured
    FOLDER/recording.json how many series there are, what lies between two records, and the seconds to the last one

A training that goes on from a checkpoint goes on recording behind it: later records of the run that was cut go.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.checkpoint.files import write_whole
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError

VALUES, TARGETS, ABOUT = "series.f32", "targets.jsonl", "recording.json"
BUFFER_BYTES = 16 * 1024**2


class Recorder(TrainerCallback):
    """Appends a record every `every` steps, and the target every `target_every` steps; the main process writes.

    Args:
        observe: float [series] of a model, as many every time.
        folder: see above.
        every: steps from one record to the next.
        target: what the series may cause, measured on the model; None without any.
        target_steps: whether the target is wanted behind a step.
        until: the last step that is recorded; all of them are unless given.
    """

    def __init__(
        self,
        observe: Callable[[nn.Module], Tensor],
        folder: Path,
        every: int = 1,
        target: Callable[[nn.Module], float] | None = None,
        target_steps: Callable[[int], bool] = lambda step: False,
        until: int | None = None,
    ) -> None:
        self.observe = observe
        self.folder = folder
        self.every = every
        self.target = target
        self.target_steps = target_steps
        self.until = until
        self._buffer: list[Tensor] = []
        self._series = 0
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._series = len(self.observe(kwargs["model"]))
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = recording_seconds(self.folder) if state.global_step and (self.folder / ABOUT).is_file() else 0.0
            self._go_on_behind(state.global_step)
            self._start = perf_counter() - before
            self._describe()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        past = self.until is not None and state.global_step > self.until
        if not past and state.global_step % self.every == 0 and distributed.rank() == 0:
            self._buffer.append(self.observe(model).detach().to("cpu", torch.float32, copy=True))
        if self.target is not None and self.target_steps(state.global_step):
            value = self.target(model)
            if distributed.rank() == 0:
                with (self.folder / TARGETS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, "value": value}) + "\n")
        last = state.global_step == (self.until or state.max_steps)
        if not past and (last or control.should_save) and distributed.rank() == 0:
            self._describe()
        # A checkpoint must not be ahead of its records.
        if control.should_save or 4 * self._series * len(self._buffer) >= BUFFER_BYTES:
            self._flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush()

    def _describe(self) -> None:
        about = {"series": self._series, "every": self.every, "seconds": perf_counter() - self._start}
        write_whole(self.folder / ABOUT, json.dumps(about) + "\n")

    def _go_on_behind(self, step: int) -> None:
        """Drop what lies behind a step; refuse to go on where records before it are missing."""
        step = step if self.until is None else min(step, self.until)
        wanted = 4 * self._series * (step // self.every)
        values = self.folder / VALUES
        there = values.stat().st_size if values.is_file() else 0
        if there < wanted:
            raise BadInputError(
                f"output_dir: {self.folder} holds {there // (4 * self._series)} records of the {step // self.every} "
                "before the checkpoint; remove the checkpoints beside it, or choose another output_dir."
            )
        with values.open("ab") as file:
            file.truncate(wanted)
        kept = [line for line in read_targets(self.folder) if line[0] <= step]
        write_whole(
            self.folder / TARGETS, "".join(json.dumps({"step": at, "value": value}) + "\n" for at, value in kept)
        )

    def _flush(self) -> None:
        if self._buffer and distributed.rank() == 0:
            with (self.folder / VALUES).open("ab") as file:
                file.write(torch.stack(self._buffer).numpy().tobytes())
        self._buffer = []


def count_series(folder: Path) -> int:
    """How many series a recording holds."""
    return int(_about(folder)["series"])


def recording_seconds(folder: Path) -> float:
    """Of the training up to the last record; what a kill took away behind a checkpoint does not count."""
    return float(_about(folder)["seconds"])


def _about(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return about


def read_series(folder: Path, start: int = 0, stop: int | None = None) -> Tensor:
    """float32 [series, records] of the series from `start` to `stop`; only these are read into memory."""
    count = count_series(folder)
    values = np.memmap(folder / VALUES, dtype=np.float32, mode="r").reshape(-1, count)
    return torch.from_numpy(np.ascontiguousarray(values[:, start:stop].T))


def read_record(folder: Path, place: int) -> Tensor:
    """float32 [series], one record."""
    count = count_series(folder)
    values = np.memmap(folder / VALUES, dtype=np.float32, mode="r").reshape(-1, count)
    return torch.from_numpy(values[place].copy())


def read_targets(folder: Path) -> list[tuple[int, float]]:
    """(step, value) of every measured target, in order."""
    file = folder / TARGETS
    if not file.is_file():
        return []
    # A run may have been killed in the middle of a line.
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return [(line["step"], line["value"]) for line in lines]
