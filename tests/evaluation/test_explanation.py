"""Looking into perceptrons, against closed forms: a spectrum drawn from a power law, and a linear model's own SHAP."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_prune.errors import BadInputError
from hf_prune.evaluation import explanation
from hf_prune.evaluation.explanation import alphas, mean_shap, rank_correlation


def test_alpha_is_the_exponent_of_the_spectrum() -> None:
    # Quantiles of a density that falls with the power -3: eigenvalues of W^T W above 1.
    count, alpha = 300, 3.0
    eigenvalues = (1 - (torch.arange(count) + 0.5) / count) ** (-1 / (alpha - 1))
    layer, small = nn.Linear(count, count, bias=False), nn.Linear(count, 4)
    left, _ = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        layer.weight.copy_(left @ eigenvalues.sqrt().diag())
    found = alphas(nn.Sequential(layer, nn.ReLU(), small))
    assert list(found) == ["0", "2"] and found["0"] == pytest.approx(alpha, rel=0.1)


def test_shap_of_a_linear_model_is_its_weight_times_the_distance_from_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    background, rows = torch.randn(40, 5, generator=generator), torch.randn(7, 5, generator=generator)
    layer = nn.Linear(5, 3)
    expected = (layer.weight[None] * (rows - background.mean(0))[:, None]).abs().mean((0, 1))
    np.testing.assert_allclose(mean_shap(nn.Sequential(layer), background, rows), expected.detach(), rtol=1e-4)


def test_ranks_are_compared_by_spearman(capfd: pytest.CaptureFixture[str]) -> None:
    # 1 - 6 (0 + 1 + 1) / (3 (9 - 1)).
    assert rank_correlation([1.0, 2.0, 9.0], [0.1, 0.5, 0.2]) == pytest.approx(0.5)
    assert np.isnan(rank_correlation([1.0, 1.0], [0.0, 2.0])) and capfd.readouterr() == ("", "")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"explain: it needs WeightWatcher and SHAP; pip install hf-prune\[explain"):
        explanation.require_explanations()
