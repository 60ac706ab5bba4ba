"""Named settings for people who do not want to choose: `fast`, `balanced` (the default) and `best`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_prune.methods.admm import AdmmConfig
from hf_prune.methods.base import register
from hf_prune.methods.sparsegpt import SparseGPTConfig


@register
@dataclass
class FastConfig(SparseGPTConfig):
    """SparseGPT as published: the least time for a result with a weight update."""

    method: str | None = "fast"

    info = replace(SparseGPTConfig.info, name="fast", title="Fast preset (SparseGPT)", summary="SparseGPT as published")


@register
@dataclass
class BalancedConfig(AdmmConfig):
    """A short ADMM with a faster growing rho, on densities of a short learning (FCPTS).

    Where a pattern leaves no densities to learn, half a pass of block reconstruction takes that time instead.
    """

    method: str | None = "balanced"
    allocation: str = "auto"
    fcpts_steps: int = 6
    fcpts_learning_rate: float = 0.1
    # Too few steps to come back from ERK's densities.
    fcpts_start: str = "uniform"
    fcpts_held_out: float = 0.03
    iterations: int = 12
    rho_growth: float = 3.0
    factorization: str = "cholesky"
    reconstruct: str = "auto"
    reconstruct_passes: float = 0.5

    info = replace(
        AdmmConfig.info,
        name="balanced",
        title="Balanced preset (short ADMM)",
        summary="the default: quickly learned densities (FCPTS), a short ADMM; half a pass of block training under n:m",
    )


@register
@dataclass
class BestConfig(AdmmConfig):
    """Learned densities (FCPTS), the whole ADMM, and each block trained towards its dense outputs.

    Passes were chosen on SmolLM2-135M and the validation split.
    """

    method: str | None = "best"
    allocation: str = "auto"
    # At 60 % and less ERK's densities are too far from good ones for these steps.
    fcpts_start: str = "uniform"
    reconstruct: str = "block"
    reconstruct_passes: float = 4

    info = replace(
        AdmmConfig.info,
        name="best",
        title="Best preset (ADMM, block reconstruction)",
        summary="learned densities (FCPTS) unless n:m, ADMM, then each block is trained towards its dense outputs",
    )
