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
    """A short ADMM with a faster growing rho; densities and rows by the Fisher information.

    Where a pattern leaves no densities to share out, half a pass of block reconstruction takes that time instead.
    """

    method: str | None = "balanced"
    allocation: str = "auto"
    output_importance: str = "auto"
    iterations: int = 12
    rho_growth: float = 3.0
    factorization: str = "cholesky"
    reconstruct: str = "auto"
    reconstruct_passes: float = 0.5

    info = replace(
        AdmmConfig.info,
        name="balanced",
        title="Balanced preset (short ADMM)",
        summary="the default: Fisher information for densities and rows, a short ADMM; under n:m block training",
    )


@register
@dataclass
class BestConfig(AdmmConfig):
    """Densities and rows by the Fisher information, the whole ADMM, and each block trained towards its dense outputs.

    Passes were chosen on SmolLM2-135M and the validation split.
    """

    method: str | None = "best"
    allocation: str = "auto"
    output_importance: str = "auto"
    reconstruct: str = "block"
    reconstruct_passes: float = 4

    info = replace(
        AdmmConfig.info,
        name="best",
        title="Best preset (ADMM, block reconstruction)",
        summary="Fisher information for densities and rows unless n:m, ADMM, then training of each block",
    )
