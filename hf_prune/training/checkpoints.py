"""The Trainer's checkpoints: which one to go on from, and what stays where the loss is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.errors import RunError


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder: a run may have been killed while it wrote one."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if _is_whole(path)}
    return steps[max(steps)] if steps else None


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes this file last.
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


class StopAtNaN(TrainerCallback):
    """Raises RunError at the first logged loss that is not finite.

    Args:
        where: what the message says of the training.
        folder: of the Trainer's checkpoints.
    """

    def __init__(self, where: str, folder: Path) -> None:
        self.where = where
        self.folder = folder

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            last = last_checkpoint(self.folder)
            kept = f"; {last.name} before it is kept in {self.folder}" if last else ""
            raise RunError(
                f"{self.where}: the loss is {float(loss)} at step {state.global_step}{kept}; lower learning_rate."
            )
