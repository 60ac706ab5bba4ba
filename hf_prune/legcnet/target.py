"""What series of a language model may cause: the tokens of a held-out text that it does not predict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_prune.errors import BadInputError
from hf_prune.training.arguments import FreshModelArguments


@dataclass
class WatchedModelArguments(FreshModelArguments):
    """A language model to watch: where it begins, and what its series may cause."""

    target_windows: int = field(
        default=8,
        metadata={"help": "last windows of the text, not trained on: errors on them are the target"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_windows < 1:
            raise BadInputError(f"target_windows: {self.target_windows} is too few; use 1 or more.")


@torch.no_grad()
def next_token_errors(windows: Tensor, model: Any) -> float:
    """Share of the next tokens that a model does not predict; int64 `windows` [windows, tokens]."""
    training = model.training
    model.eval()
    hits = total = 0
    for row in windows.split(1):
        own = row.to(next(model.parameters()).device)
        guesses = model(input_ids=own, use_cache=False).logits[:, :-1].argmax(-1)
        hits += int((guesses == own[:, 1:]).sum())
        total += guesses.numel()
    model.train(training)
    return 1 - hits / total
