"""What a trained perceptron looks like from inside: WeightWatcher's alpha of its layers, SHAP's means of its features.

`pip install hf-prune[explain]` brings both.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hf_prune.errors import BadInputError

# Layers with alpha between them count as well trained (Martin et al., 2021, https://arxiv.org/abs/2002.06716).
WELL_TRAINED = (2.0, 6.0)
BACKGROUND_ROWS = 100


def require_explanations() -> None:
    """Raise BadInputError where WeightWatcher or SHAP is missing."""
    if find_spec("weightwatcher") is None or find_spec("shap") is None:
        raise BadInputError("explain: it needs WeightWatcher and SHAP; pip install hf-prune[explain].")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Both libraries print and warn as they go; what they do is on the logger for whoever wants it."""
    before, handlers, level = logging.root.manager.disable, list(logging.root.handlers), logging.root.level
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(before)
                # WeightWatcher's import sets up the root logger, here with a stream that is thrown away.
                logging.root.handlers[:] = handlers
                logging.root.setLevel(level)


def alphas(layers: nn.Sequential) -> dict[str, float]:
    """Exponent of the power law that the squared singular values of each linear layer follow, by WeightWatcher.

    Args:
        layers: a layer's place in it is its name; those with fewer than two singular values, and those that no power
            law could be fitted to, are left out.
    """
    with _quietly():
        import weightwatcher

        # Small layers are what there is here; its own lower bound of 50 singular values would leave none.
        details = weightwatcher.WeightWatcher(model=layers).analyze(min_evals=2)
    if not len(details):
        return {}
    # What could not be fitted is -1 there.
    found = zip(details["longname"], details["alpha"], strict=True)
    return {str(name): float(alpha) for name, alpha in found if alpha > 0}


def mean_shap(layers: nn.Sequential, background: Tensor, rows: Tensor, seed: int = 0) -> list[float]:
    """Mean of |SHAP| over rows and classes, by feature (DeepLIFT's rule, https://arxiv.org/abs/1704.02685).

    Args:
        layers: linear layers and activations, to logits.
        background: float32 [rows, features]; at most 100 of them, chosen by the seed, say what a feature is without.
        rows: float32 [rows, features], of which predictions are explained.
    """
    chosen = torch.randperm(len(background), generator=torch.Generator().manual_seed(seed))[:BACKGROUND_ROWS]
    device = next(layers.parameters()).device
    with _quietly():
        import shap

        explainer = shap.DeepExplainer(layers, background[chosen].to(device))
        # Whether values add up to the logits is the test's matter: here a float32 sum over 64 features may be off.
        values = explainer.shap_values(rows.to(device), check_additivity=False)
    return cast(list[float], np.abs(np.asarray(values)).mean(axis=(0, 2)).tolist())


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, of two lists of means; NaN where one of them is all alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(spearmanr(one, other).statistic)
