"""hf_prune makes Hugging Face causal language models smaller and says what that cost.

Everything public is imported on first use, so that `import hf_prune` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "BadInputError": "hf_prune.errors",
    "HfPruneError": "hf_prune.errors",
    "RunError": "hf_prune.errors",
    "PruneConfig": "hf_prune.arguments",
    "AdmmConfig": "hf_prune.methods.admm",
    "BalancedConfig": "hf_prune.methods.presets",
    "BestConfig": "hf_prune.methods.presets",
    "FastConfig": "hf_prune.methods.presets",
    "FcptsConfig": "hf_prune.methods.fcpts",
    "IntraFusionConfig": "hf_prune.methods.intra_fusion",
    "MagnitudeConfig": "hf_prune.methods.magnitude",
    "RIAConfig": "hf_prune.methods.ria",
    "SparseGPTConfig": "hf_prune.methods.sparsegpt",
    "WandaConfig": "hf_prune.methods.wanda",
    "Plan": "hf_prune.plan",
    "PruneResult": "hf_prune.pruning",
    "plan_pruning": "hf_prune.pruning",
    "prune": "hf_prune.pruning",
}
__all__ = [
    "AdmmConfig",
    "BadInputError",
    "BalancedConfig",
    "BestConfig",
    "FastConfig",
    "FcptsConfig",
    "HfPruneError",
    "IntraFusionConfig",
    "MagnitudeConfig",
    "Plan",
    "PruneConfig",
    "PruneResult",
    "RIAConfig",
    "RunError",
    "SparseGPTConfig",
    "WandaConfig",
    "__version__",
    "plan_pruning",
    "prune",
]

if TYPE_CHECKING:
    from hf_prune.arguments import PruneConfig
    from hf_prune.errors import BadInputError, HfPruneError, RunError
    from hf_prune.methods.admm import AdmmConfig
    from hf_prune.methods.fcpts import FcptsConfig
    from hf_prune.methods.intra_fusion import IntraFusionConfig
    from hf_prune.methods.magnitude import MagnitudeConfig
    from hf_prune.methods.presets import BalancedConfig, BestConfig, FastConfig
    from hf_prune.methods.ria import RIAConfig
    from hf_prune.methods.sparsegpt import SparseGPTConfig
    from hf_prune.methods.wanda import WandaConfig
    from hf_prune.plan import Plan
    from hf_prune.pruning import PruneResult, plan_pruning, prune


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
