"""The batched test against statsmodels, one series at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tools.sm_exceptions import InfeasibleTestError
from statsmodels.tsa.stattools import grangercausalitytests
from torch import Tensor

from hf_prune.dynamics.granger import granger_test, largest_lag
from hf_prune.errors import BadInputError

# Statsmodels warns of what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {"chi2": "ssr_chi2test", "F": "ssr_ftest"}


def reference(cause: np.ndarray, effect: np.ndarray, max_lag: int, statistic: str) -> list[float] | None:
    try:
        found = grangercausalitytests(np.column_stack([effect, cause]), max_lag)
    except InfeasibleTestError:
        return None
    return [found[lag][0][NAMES[statistic]][1] for lag in range(1, max_lag + 1)]


def agree(causes: Tensor, effect: Tensor, max_lag: int, statistic: str) -> list[bool]:
    test = granger_test(causes, effect, max_lag, statistic)
    for place, cause in enumerate(causes.numpy()):
        wanted = reference(cause, effect.numpy(), max_lag, statistic)
        assert (wanted is not None) == test.tested[place], place
        if wanted is not None:
            np.testing.assert_allclose(test.p[place], wanted, rtol=1e-6, atol=1e-6)
            assert np.exp(test.smallest()[place]) == pytest.approx(min(wanted), rel=1e-6, abs=1e-6)
    return test.tested.tolist()


def series(count: int, steps: int, seed: int) -> Tensor:
    return torch.randn(count, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("statistic", ["chi2", "F"])
@pytest.mark.parametrize(("steps", "max_lag"), [(44, 14), (200, 5), (8, 2), (5, 1)])
def test_random_and_causal_series(statistic: str, steps: int, max_lag: int) -> None:
    causes, effect = series(12, steps, 0), series(1, steps, 1)[0]
    # Half of them are the effect's past, more or less.
    causes[:6, :-1] = effect[1:] + torch.linspace(0.1, 3, 6)[:, None] * causes[:6, :-1]
    assert all(agree(causes, effect, max_lag, statistic))
    if steps == 200:
        test = granger_test(causes, effect, max_lag, statistic)
        p = np.exp(test.smallest())
        assert p[:2].max() < 1e-6 < p[6:].min()
        # Small ones too, as far as floats go.
        wanted = np.array([reference(cause, effect.numpy(), max_lag, statistic) for cause in causes.numpy()])
        normal = wanted > np.finfo(float).tiny
        np.testing.assert_allclose(test.log_p[normal], np.log(wanted[normal]), rtol=1e-6)


@pytest.mark.parametrize("statistic", ["chi2", "F"])
def test_series_that_can_hardly_be_tested_or_not_at_all(statistic: str) -> None:
    causes, effect = series(8, 44, 2), series(1, 44, 3)[0]
    causes[0] = 4.0
    causes[1] = 0.0
    causes[1, 20] = 1.0
    causes[2, :-1] = 0.0
    causes[3] = causes[3].round()
    causes[4] = effect
    causes[5, 2:] = effect[:-2]
    causes[6] = torch.linspace(0, 1, 44) ** 2
    causes[7] = torch.sin(torch.arange(44.0))
    tested = agree(causes, effect, 14, statistic)
    assert not tested[0] and tested[3]
    assert granger_test(causes, effect, 14, statistic).smallest()[0] == -np.inf


def test_an_effect_that_never_changes_tests_nothing() -> None:
    assert agree(series(3, 44, 4), torch.ones(44, dtype=torch.float64), 3, "chi2") == [False] * 3


@settings(max_examples=25)
@given(
    steps=st.integers(5, 60),
    digits=st.integers(0, 6),
    causal=st.floats(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_series(steps: int, digits: int, causal: float, seed: int) -> None:
    effect = series(1, steps, seed)[0].round(decimals=digits)
    causes = series(3, steps, seed + 1)
    causes[:, :-1] += causal * effect[1:]
    agree(causes.round(decimals=digits), effect, largest_lag(steps), "chi2")


def test_the_lag_of_lowest_bic_is_the_one_that_causes() -> None:
    causes, effect = series(20, 300, 5), series(1, 300, 6)[0]
    for cause in causes:
        cause[:-3] += 2 * effect[3:]
    test = granger_test(causes, effect, 8)
    chosen = test.bic.argmin(1)
    assert (chosen == 2).mean() > 0.8 and test.at_chosen_lag().max() < np.log(1e-10)


def test_bic_does_not_choose_a_saturated_regression() -> None:
    """With 44 windows and 14 lags 29 parameters meet 30 observations, and noise would cause noise."""
    test = granger_test(series(400, 44, 7), series(1, 44, 8)[0], 14)
    assert test.bic.shape[1] == 5
    assert (test.at_chosen_lag() < np.log(0.05)).mean() < 0.2 < (test.smallest() < np.log(0.05)).mean()


def test_p_too_small_for_a_float_has_a_logarithm() -> None:
    """An effect that is its cause's past but for a millionth: the statistic is about 1e14."""
    cause = series(1, 400, 9)
    effect = torch.cat([torch.zeros(1, dtype=torch.float64), cause[0, :-1]]) + 1e-6 * series(1, 400, 10)[0]
    test = granger_test(cause, effect, 2)
    assert test.tested[0] and np.isfinite(test.log_p).all() and test.log_p.max() < -1000


def test_too_few_windows_say_how_many_there_must_be() -> None:
    with pytest.raises(BadInputError, match="max_lag: 14 lags need 44 windows, and there are 20; use 6 or fewer"):
        granger_test(series(2, 20, 0), series(1, 20, 1)[0], 14)
    with pytest.raises(BadInputError, match="not finite"):
        granger_test(torch.full((2, 20), torch.nan), series(1, 20, 1)[0], 2)
