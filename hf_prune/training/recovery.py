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
        base_revision: of that model; the one that was pruned unless base_model is given.
        distillation_temperature: of both distributions, 1 unless given.
        lora_rank: of the adapters, 16 unless given.
        lora_alpha: their products are scaled by lora_alpha / lora_rank; 2 lora_rank unless given.
    """

    recovery: str = "lora"
    loss: str = "language_modeling"
    base_model: str | None = None
    base_revision: str | None = None
    distillation_temperature: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        for key, value, allowed in (("recovery", self.recovery, RECOVERIES), ("loss", self.loss, LOSSES)):
            if value not in allowed:
                raise BadInputError(f"{key}: {value!r} is unknown; choose {' or '.join(allowed)}.")
        for chosen, word, keys in (
            (self.recovery == "lora", "recovery: lora", ("lora_rank", "lora_alpha")),
            (self.loss == "distillation", "loss: distillation", ("distillation_temperature",)),
        ):
            for key in keys:
                if not chosen and getattr(self, key) is not None:
                    raise BadInputError(f"{key}: means something with {word} only; leave the key out.")
        if self.distillation_temperature is not None and self.distillation_temperature <= 0:
            raise BadInputError(f"distillation_temperature: {self.distillation_temperature} must be above 0.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise BadInputError(f"lora_rank: {self.lora_rank} is too few; use 1 or more.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise BadInputError(f"lora_alpha: {self.lora_alpha} must be above 0; adapters would change nothing.")

    @property
    def needs_dense(self) -> bool:
        """Whether there is no recovery without the dense model."""
        return self.loss == "distillation" or self.base_model is not None

    @property
    def temperature(self) -> float:
        """Of the distillation."""
        return 1.0 if self.distillation_temperature is None else self.distillation_temperature

    @property
    def rank(self) -> int:
        """Of the adapters."""
        return 16 if self.lora_rank is None else self.lora_rank

    @property
    def alpha(self) -> float:
        """Of the adapters."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def title(self) -> str:
        """In a few words."""
        what = f"LoRA of rank {self.rank}, merged under the mask" if self.recovery == "lora" else "all parameters"
        how = "distilled from the dense model" if self.loss == "distillation" else "on next-token prediction"
        return f"{what}, {how}"
