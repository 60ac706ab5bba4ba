"""LEGCNet: which weights cause the errors of a training, by their exponents and Granger's test."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from hf_prune.dynamics.granger import STATISTICS, GrangerTest
from hf_prune.errors import BadInputError
from hf_prune.methods.base import MethodInfo

VARIANTS = ("ft", "pt")
DECISIONS = ("causal", "sensitive", "both")
LAGS = ("min", "bic")
CORRECTIONS = ("none", "benjamini_hochberg")
RESTARTS = ("init", "continue")
SERIES = ("weights", "sample", "rows", "units")
# What decides nothing where units are watched.
UNUSED_BY_UNITS = ("perturbation", "ignore", "min_keep_ratio")
WATCHED = ("mlp", "attention", "heads")


@dataclass
class LEGCNetConfig:
    """LEGCNet-FT and LEGCNet-PT (Sahu et al., 2023, https://arxiv.org/abs/2308.09955).

    Series of a training whose Lyapunov exponents Granger-cause its errors are kept, the others pruned.

    Where paper and code disagree, the defaults are the code's: series that cause nothing are pruned, the weights' own
    values are the series, and p is the smallest over all lags, uncorrected. `sensitive`, `sparsity`, `lag: bic`,
    `correction` and `min_keep_ratio` are our additions, and so are series of rows and units.

    Args:
        variant: `ft`, the whole training is recorded; `pt`, its first `recorded_share`.
        recorded_share: of the steps, for `pt`.
        series: `weights`, every one; `sample`, `samples_per_matrix` of each matrix (the others stay); `rows`, the norms
            of each matrix's rows; `units`, the norms of a language model's neurons and heads, which are removed whole.
        samples_per_matrix: chosen by the seed.
        perturbation: with more than 0, a second training is recorded whose weights begin elsewhere, by noise of this
            share of each parameter's deviation, and the series are the differences of the two (one of the paper's two
            definitions; the other, and its code, take the values themselves).
        record_every: steps from one record to the next.
        window: records a window.
        stride: records from one window to the next, 9/10 of a window unless given.
        max_lag: windows of the past that are looked at.
        statistic: of the test, `chi2` or `F`.
        lag: `min`, the smallest p of all lags; `bic`, that of the lag with the lowest BIC.
        correction: of p for the number of series, `none` or `benjamini_hochberg`.
        alpha: series with a smaller p are causal.
        decision: what is kept: `causal`, `sensitive` (a positive mean exponent), or what is `both`.
        sparsity: share of the series that go, the least causal (or sensitive) first, instead of alpha.
        min_keep_ratio: each matrix keeps at least this share of its weights (or rows), those that matter most, and the
            report names those that it held.
        restart: survivors train once more from their initial values (`init`) or go on (`continue`).
        units: what goes with `series: units`, `mlp` neurons and whole key-value groups of `attention` or query `heads`;
            `sparsity`, 0.1 unless given, is then the share of each kind in every block (and in every key-value group),
            to the nearest unit, and what was trained is pruned, whatever `restart` says.
        ignore: layers that are never pruned, by name.
        rounds_folder: where the recording is kept, OUTPUT_DIR.rounds unless given; other decisions find it there.
    """

    method: str | None = "legcnet"
    variant: str = "ft"
    recorded_share: float = 0.1
    series: str = "weights"
    samples_per_matrix: int = 256
    perturbation: float = 0.0
    record_every: int = 1
    window: int = 50
    stride: int | None = None
    max_lag: int = 14
    statistic: str = "chi2"
    lag: str = "min"
    correction: str = "none"
    alpha: float = 0.05
    decision: str = "causal"
    sparsity: float | None = None
    min_keep_ratio: float = 0.001
    restart: str = "init"
    units: list[str] = field(default_factory=lambda: ["mlp"])
    ignore: list[str] = field(default_factory=list)
    rounds_folder: str | None = None

    info = MethodInfo(
        name="legcnet",
        title="LEGCNet",
        summary="keeps the weights whose Lyapunov exponents Granger-cause the errors of a training",
        paper="https://arxiv.org/abs/2308.09955",
        paper_title="A Chaos-Causality Approach to Principled Pruning of Dense Neural Networks",
        citation="""@article{sahu2025chaos,
  title={A Chaos-Causality Approach to Principled Pruning of Dense Neural Networks},
  author={Rajan Sahu and Shivam Chadha and Archana Mathur and Nithin Nagaraj and Snehanshu Saha},
  journal={Chaos Theory and Applications},
  volume={7},
  number={2},
  pages={154--165},
  year={2025},
  doi={10.51537/chaos.1588198}
}""",
    )

    def __post_init__(self) -> None:
        for key, allowed in (
            ("method", (self.info.name,)),
            ("variant", VARIANTS),
            ("series", SERIES),
            ("statistic", STATISTICS),
            ("lag", LAGS),
            ("correction", CORRECTIONS),
            ("decision", DECISIONS),
            ("restart", RESTARTS),
        ):
            if getattr(self, key) not in allowed:
                raise BadInputError(f"{key}: {getattr(self, key)!r} is unknown; choose {', '.join(allowed)}.")
        for key, least in (("window", 4), ("max_lag", 1), ("record_every", 1), ("samples_per_matrix", 1)):
            if getattr(self, key) < least:
                raise BadInputError(f"{key}: {getattr(self, key)} is too few; use {least} or more.")
        for key in ("recorded_share", "alpha", "sparsity"):
            value = getattr(self, key)
            if value is not None and not 0 < value < 1:
                raise BadInputError(f"{key}: {value} is outside (0, 1).")
        if not 0 <= self.min_keep_ratio < 1:
            raise BadInputError(f"min_keep_ratio: {self.min_keep_ratio} is outside [0, 1).")
        unknown = [unit for unit in self.units if unit not in WATCHED]
        if unknown or not self.units:
            raise BadInputError(
                f"units: {', '.join(unknown) or 'none'} cannot be watched; choose of {', '.join(WATCHED)}."
            )
        if self.perturbation < 0:
            raise BadInputError(f"perturbation: {self.perturbation} is no share; use 0 or a small positive number.")
        if self.series == "units":
            for key in UNUSED_BY_UNITS:
                if getattr(self, key) != type(self).__dataclass_fields__[key].default and getattr(self, key) != []:
                    raise BadInputError(f"{key}: units are watched as they are, all of them; leave the key out.")
        if self.stride is not None and self.stride < 1:
            raise BadInputError(f"stride: {self.stride} is too few; use 1 or more.")

    def recorded(self, steps: int) -> int:
        """Steps that are recorded, of so many of a whole training."""
        return steps if self.variant == "ft" else round(self.recorded_share * steps)

    @property
    def step(self) -> int:
        """Records from one window to the next."""
        return self.stride or max(round(0.9 * self.window), 1)


def causal_log_p(test: GrangerTest, config: LEGCNetConfig) -> np.ndarray:
    """ln of one p for each series, float64 [series]; -inf, and so kept, where it could not be tested."""
    log_p = test.smallest() if config.lag == "min" else test.at_chosen_lag()
    if config.correction == "benjamini_hochberg" and test.tested.any():
        corrected = stats.false_discovery_control(np.exp(log_p[test.tested]))
        log_p = log_p.copy()
        with np.errstate(divide="ignore"):
            log_p[test.tested] = np.log(corrected)
    return log_p


def scores(test: GrangerTest, exponents: np.ndarray, config: LEGCNetConfig) -> np.ndarray:
    """How much each series is worth keeping, float64 [series], by ranks; inf where it could not be tested.

    Args:
        exponents: float [series, windows].
    """
    # Uncorrected: the correction keeps the order and makes ties.
    log_p = test.smallest() if config.lag == "min" else test.at_chosen_lag()
    mean = exponents.mean(1)
    # Ranks, so that both measures weigh the same.
    order = {"causal": [-log_p], "sensitive": [mean], "both": [-log_p, mean]}[config.decision]
    rank = np.sum([stats.rankdata(values, method="average") for values in order], axis=0)
    return np.where(test.tested, rank, np.inf)


def decide(test: GrangerTest, exponents: np.ndarray, config: LEGCNetConfig) -> np.ndarray:
    """Which series stay, bool [series]; those that could not be tested do.

    Args:
        exponents: float [series, windows].
    """
    if config.sparsity is not None:
        rank = scores(test, exponents, config)
        keep = np.ones(len(rank), dtype=bool)
        gone = min(round(config.sparsity * len(rank)), int(test.tested.sum()))
        keep[np.argsort(rank, kind="stable")[:gone]] = False
        return keep
    causal, sensitive = causal_log_p(test, config) < np.log(config.alpha), exponents.mean(1) > 0
    keep = {"causal": causal, "sensitive": sensitive, "both": causal & sensitive}[config.decision]
    return keep | ~test.tested
