"""What recovery decides: which parameters train, on which loss, by which Trainer."""

from __future__ import annotations

from dataclasses import dataclass

from hf_prune.errors import BadInputError

RECOVERIES = ("lora", "full")
LOSSES = ("language_modeling", "distillation")


@dataclass
class RecoveryConfig:
    """A short training of a pruned model, zeros held.

    Args:
        recovery: `lora`, adapters on every pruned layer, merged under the mask; `full`, all parameters.
        loss: `language_modeling`, next-token cross-entropy; `distillation`, the divergence from the dense model's
            next-token distributions.
        base_model: the dense model, for distillation and for comparison; the one that the folder's recipe names unless
            given.
        distillation_temperature: of both distributions.
        lora_rank: of the adapters.
        lora_alpha: their products are scaled by lora_alpha / lora_rank.
    """

    recovery: str = "lora"
    loss: str = "language_modeling"
    base_model: str | None = None
    distillation_temperature: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32

    def __post_init__(self) -> None:
        for key, value, allowed in (("recovery", self.recovery, RECOVERIES), ("loss", self.loss, LOSSES)):
            if value not in allowed:
                raise BadInputError(f"{key}: {value!r} is unknown; choose {' or '.join(allowed)}.")
        if self.distillation_temperature <= 0:
            raise BadInputError(f"distillation_temperature: {self.distillation_temperature} must be above 0.")
        if self.lora_rank < 1:
            raise BadInputError(f"lora_rank: {self.lora_rank} is too few; use 1 or more.")

    @property
    def title(self) -> str:
        """In a few words."""
        what = f"LoRA of rank {self.lora_rank}, merged under the mask" if self.recovery == "lora" else "all parameters"
        how = "distilled from the dense model" if self.loss == "distillation" else "on next-token prediction"
        return f"{what}, {how}"
