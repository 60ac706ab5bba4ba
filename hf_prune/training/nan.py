"""A loss that is no number ends a training, and what was reached before stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_prune.errors import RunError


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
            last = get_last_checkpoint(str(self.folder)) if self.folder.is_dir() else None
            kept = f"; {Path(last).name} before it is kept in {self.folder}" if last else ""
            raise RunError(
                f"{self.where}: the loss is {float(loss)} at step {state.global_step}{kept}; lower learning_rate."
            )
