"""Granger causality of one series by each of very many, equal to statsmodels' test on each of them.

Granger (1969), https://doi.org/10.2307/1912791: does the past of a series say more of the next value of another than
that one's own past does? `statsmodels.tsa.stattools.grangercausalitytests` is the reference, its refusals included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.special import gammaln
from torch import Tensor

from hf_prune.errors import BadInputError

STATISTICS = ("chi2", "F")
# Below this share of a column that the others leave, normal equations lose too many digits.
WELL_CONDITIONED = 1e-4
NEARLY_PERFECT = 1e-8
CHUNK = 8192


@dataclass
class GrangerTest:
    """What was tested; logarithms, because p of a strong cause is smaller than a float can be.

    Attributes:
        log_p: float64 [series, max_lag], ln p of lags 1 to max_lag; NaN where a lag cannot be tested.
        bic: float64 [series, lags], of the regression with the series' past on the same observations for every lag,
            divided by their number; of the lags that leave it three observations a parameter, one at least.
        tested: bool [series]; False where a lag is constant or the fit is perfect, which statsmodels refuses.
    """

    log_p: np.ndarray
    bic: np.ndarray
    tested: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """float64 [series, max_lag]."""
        return np.exp(self.log_p)

    def smallest(self) -> np.ndarray:
        """ln of the smallest p over all lags, as published: uncorrected for their number; -inf where untested."""
        return np.where(self.tested, np.nan_to_num(self.log_p, nan=0.0, neginf=-np.inf).min(1), -np.inf)

    def at_chosen_lag(self) -> np.ndarray:
        """ln p at the lag of the lowest BIC (our extension); -inf where untested."""
        chosen = np.nan_to_num(self.bic, nan=np.inf).argmin(1)
        return np.where(self.tested, self.log_p[np.arange(len(self.log_p)), chosen], -np.inf)


def largest_lag(observations: int) -> int:
    """The largest lag that so many observations can test."""
    return (observations - 2) // 3


def granger_test(causes: Tensor, effect: Tensor, max_lag: int = 14, statistic: str = "chi2") -> GrangerTest:
    """Whether each of `causes` Granger-causes `effect`, at every lag from 1 to `max_lag`.

    Args:
        causes: float [series, observations].
        effect: float [observations].
        statistic: `chi2`, n (ssr_own / ssr_joint - 1) against chi-square, or `F`.

    Raises:
        BadInputError: too few observations for the lag, or numbers that are not finite.
    """
    causes, effect = causes.double(), effect.double()
    count = len(effect)
    if count <= 3 * max_lag + 1:
        raise BadInputError(
            f"max_lag: {max_lag} lags need {3 * max_lag + 2} windows, and there are {count}; "
            + (f"use {largest_lag(count)} or fewer, or " if largest_lag(count) > 0 else "")
            + "record more steps or narrower windows."
        )
    if not bool(causes.isfinite().all() and effect.isfinite().all()):
        raise BadInputError("granger: a series holds numbers that are not finite; lower learning_rate.")
    # 2 lag + 1 parameters on count - lag observations.
    comparable = max(min((count - 3) // 7, max_lag), 1)
    test = GrangerTest(
        np.full((len(causes), max_lag), np.nan),
        np.full((len(causes), comparable), np.nan),
        np.ones(len(causes), dtype=bool),
    )
    for lag in range(1, max_lag + 1):
        own = _Own(effect, lag)
        late = comparable - lag
        common = _Own(effect[late:], lag) if lag <= comparable else None
        for start in range(0, len(causes), CHUNK):
            part = slice(start, start + CHUNK)
            log_p, tested = own.test(causes[part], statistic)
            test.log_p[part, lag - 1] = log_p
            test.tested[part] &= tested
            if common is not None:
                test.bic[part, lag - 1] = common.bic(causes[part, late:])
    return test


class _Own:
    """The regression of a series on its own past at one lag, and what other pasts add to it."""

    def __init__(self, effect: Tensor, lag: int) -> None:
        self.lag = lag
        self.target = effect[lag:]
        past = effect.unfold(0, lag, 1)[:-1].flip(1)
        # Statsmodels refuses constant columns beside its own constant.
        self.refused = bool((past.amax(0) == past.amin(0)).any())
        self.design = torch.cat([past, torch.ones(len(past), 1, dtype=effect.dtype)], 1)
        left, values, _ = torch.linalg.svd(self.design, full_matrices=False)
        self.basis = left[:, values > 1e-15 * values[0]]
        self.rank = _rank(values)
        self.residual = self.target - self.basis @ (self.basis.T @ self.target)
        self.centred = float((self.target - self.target.mean()).square().sum())

    def test(self, causes: Tensor, statistic: str) -> tuple[np.ndarray, np.ndarray]:
        """ln p and whether statsmodels would test, for each of `causes` [series, observations]."""
        joint, rank, tested = self._joint(causes)
        observations = len(self.target)
        own = float(self.residual.square().sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = (own - joint) / joint
            if statistic == "chi2":
                log_p = _chi2_log_sf(observations * gain, self.lag)
            else:
                freedom = observations - rank
                log_p = stats.f.logsf(gain / self.lag * freedom, self.lag, freedom)
        return np.where(tested, log_p, np.nan), tested

    def bic(self, causes: Tensor) -> np.ndarray:
        """Of the joint regression, divided by the observations; NaN where it cannot be tested."""
        joint, rank, tested = self._joint(causes)
        observations = len(self.target)
        with np.errstate(divide="ignore", invalid="ignore"):
            bic = np.log(joint / observations) + rank * np.log(observations) / observations
        return np.where(tested, bic, np.nan)

    def _joint(self, causes: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Residual squares and rank of the joint regression, and whether statsmodels would test."""
        past = causes.unfold(1, self.lag, 1)[:, :-1].flip(2)
        constant = (past.amax(1) == past.amin(1)).any(1)
        joint, rank = self._residual_squares(past, ~constant)
        tested = ~constant.numpy() & (joint > np.finfo(float).eps * self.centred) & (self.centred > 0)
        tested &= not self.refused
        return joint, rank, tested

    def _residual_squares(self, past: Tensor, wanted: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of the regression on both pasts, and its rank; normal equations where they are well conditioned."""
        squares = np.full(len(past), np.nan)
        ranks = np.full(len(past), self.rank + self.lag)
        lengths = past.norm(dim=1, keepdim=True).clamp(min=torch.finfo(past.dtype).tiny)
        rest = past / lengths
        rest = rest - self.basis @ (self.basis.T @ rest)
        factor, failed = torch.linalg.cholesky_ex(rest.mT @ rest)
        good = (failed == 0) & (factor.diagonal(dim1=1, dim2=2).amin(1) > WELL_CONDITIONED)
        places = (good & wanted).nonzero().squeeze(1)
        along = torch.linalg.solve_triangular(
            factor[places], rest[places].mT @ self.residual[:, None], upper=False
        ).squeeze(2)
        squares[places.numpy()] = (self.residual.square().sum() - along.square().sum(1)).clamp(min=0).numpy()
        # A difference of equal numbers has lost what a nearly perfect fit is judged by.
        poor = torch.from_numpy(~(squares > NEARLY_PERFECT * self.centred)) | ~good
        for place in (poor & wanted).nonzero().squeeze(1).tolist():
            squares[place], ranks[place] = self._by_pseudoinverse(past[place])
        return squares, ranks

    def _by_pseudoinverse(self, past: Tensor) -> tuple[float, int]:
        """As statsmodels does it, digit by digit: at the edge of a perfect fit its answer is one of rounding."""
        design = torch.cat([self.design[:, :-1], past, self.design[:, -1:]], 1).numpy()
        left, values, right = np.linalg.svd(design, full_matrices=False)
        inverse = np.where(values > 1e-15 * values[0], 1 / np.where(values == 0, 1, values), 0)
        residual = self.target.numpy() - design @ (right.T @ (inverse[:, None] * left.T) @ self.target.numpy())
        return float(residual @ residual), _rank(torch.from_numpy(values))


def _chi2_log_sf(value: np.ndarray, freedom: int) -> np.ndarray:
    """ln of the survival function, also where that is smaller than a float can be."""
    log_sf = stats.chi2.logsf(value, freedom)
    half = freedom / 2
    far = (half - 1) * np.log(value / 2) - value / 2 - gammaln(half)
    return np.where(np.isneginf(log_sf), far, log_sf)


def _rank(values: Tensor) -> int:
    return int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
