"""How sparse each layer gets: one rule a file, each a function of the views and the target."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prune.allocation.saved import saved_plan
from hf_prune.allocation.uniform import uniform
from hf_prune.errors import BadInputError
from hf_prune.recipe import PruneConfig
from hf_prune.weights import WeightView

RULES = {"uniform": uniform}


def allocate(config: PruneConfig, views: Sequence[WeightView]) -> tuple[dict[str, float], dict[str, str]]:
    """Density and, where a saved plan says so, pattern of each view by name.

    Raises:
        BadInputError: `config.allocation` is neither a rule nor a saved plan that fits the views.
    """
    if config.allocation in RULES:
        assert config.sparsity is not None
        return RULES[config.allocation](views, config.sparsity), {}
    if config.allocation.endswith(".json"):
        return saved_plan(config, views)
    raise BadInputError(
        f"allocation: {config.allocation!r} is unknown; choose {', '.join(RULES)} or the path of a prune_plan.json."
    )
