"""What LEGCNet's arithmetic costs, and what less of it decides.

    python recipes/benchmarks/legcnet_cost.py --recording WORK/digits-ft-0.rounds/recording --readme LEGCNET.md

The recording is one that legcnet.py has left, 2,250 steps with windows of 50; nothing is trained here.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from statsmodels.tsa.stattools import grangercausalitytests

from hf_prune.bench.summary import write_between_markers
from hf_prune.dynamics.exponents import windowed_exponents
from hf_prune.dynamics.granger import granger_test, largest_lag
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.training.causes import Causes, find_causes, target_steps

STEPS = 2250
FULL = LEGCNetConfig(sparsity=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    given = parser.parse_args()
    text = "\n\n".join([speed(), precision(given.recording)])
    print(text)
    if given.readme:
        write_between_markers(given.readme, "legcnet_cost", text)


def speed() -> str:
    """Exponents of 100,000 series of 2,000 steps, and Granger's test beside statsmodels in a loop, in one run."""
    generator = torch.Generator().manual_seed(0)
    # Noisy walks that settle, as weights do.
    series = torch.randn(100_000, 2_000, generator=generator).div_(1 + torch.arange(2_000) / 100).cumsum_(1)
    start = time.perf_counter()
    exponents = windowed_exponents(series, 50)
    seconds = time.perf_counter() - start
    target = torch.rand(exponents.shape[1], generator=generator).cumsum(0)
    lag = largest_lag(exponents.shape[1])
    start = time.perf_counter()
    batched = granger_test(exponents, target, lag)
    one = (time.perf_counter() - start) / len(exponents)
    some = 200
    table = [np.column_stack([target, own.double()]) for own in exponents[:some]]
    found = []
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for own in table:
            found.append(grangercausalitytests(own, lag))
    loop = (time.perf_counter() - start) / some
    reference = [[own[at][0]["ssr_chi2test"][1] for at in range(1, lag + 1)] for own in found]
    worst = float(np.abs(batched.p[:some] - reference).max())
    return (
        f"Exponents of 100,000 series over 2,000 steps in windows of 50: {seconds:.0f} s on {torch.get_num_threads()} "
        f"threads. Granger's test with {lag} lags on {exponents.shape[1]} windows: {1e6 * one:.0f} µs a series for all "
        f"of them together, {1e3 * loop:.1f} ms a series by statsmodels in a loop over {some}: {loop / one:.0f}x; the "
        f"largest difference of a p is {worst:.0e}."
    )


def precision(recording: Path) -> str:
    """A line for each way to look at less: seconds, and how often it decides as the whole does."""
    whole = find_causes(recording, FULL, STEPS)
    columns = (
        "looked at", "windows", "lags", "seconds", "rank correlation of p", "same choice, 30 % go",
        "same side of p = 0.05",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines.append(line("everything", FULL, whole, whole))
    for lag in (7, 3, 1):
        config = replace(FULL, max_lag=lag)
        lines.append(line("fewer lags", config, find_causes(recording, config, STEPS), whole))
    for stride in (90, 180):
        config = replace(FULL, stride=stride, max_lag=1)
        windows = len(target_steps(config, STEPS))
        config = replace(config, max_lag=min(largest_lag(windows), FULL.max_lag))
        lines.append(line(f"a window every {stride} steps", config, find_causes(recording, config, STEPS), whole))
    for share in (0.5, 0.1):
        lines.append(sampled(share, recording, whole))
    return "\n".join(lines)


def line(name: str, config: LEGCNetConfig, found: Causes, whole: Causes) -> str:
    """One way to look, beside the whole."""
    seconds = found.seconds["exponents"] + found.seconds["granger"]
    rank = spearmanr(found.p, whole.p).statistic
    alike = float((found.keep == whole.keep).double().mean())
    causal = float(((found.p < FULL.alpha) == (whole.p < FULL.alpha)).double().mean())
    windows = found.exponents.shape[1]
    return f"| {name} | {windows} | {config.max_lag} | {seconds:.1f} | {rank:.2f} | {alike:.1%} | {causal:.1%} |"


def sampled(share: float, recording: Path, whole: Causes) -> str:
    """A sample of the weights, of which 30 % go; the others stay."""
    count = len(whole.keep)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(share * count)].sort().values
    own = find_causes(recording, FULL, STEPS, chosen=chosen)
    beside = Causes(*(getattr(whole, name)[chosen] for name in ("exponents", "p", "scores", "tested", "keep")), {})
    return line(f"{share:.0%} of the weights, compared with the same ones", FULL, own, beside)


if __name__ == "__main__":
    main()
