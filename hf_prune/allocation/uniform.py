"""The same sparsity everywhere, the default of every one-shot paper."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prune.weights import WeightView


def uniform(views: Sequence[WeightView], sparsity: float) -> dict[str, float]:
    """Density 1 - sparsity for each view."""
    return {view.name: 1 - sparsity for view in views}
