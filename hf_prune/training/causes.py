"""From a recording to a decision: exponents of its windows, their test against the target, and what stays."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_prune.dynamics.exponents import window_starts, windowed_exponents
from hf_prune.dynamics.granger import granger_test
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.methods.legcnet import LEGCNetConfig, causal_log_p, decide, scores
from hf_prune.progress import progress
from hf_prune.training.recorder import count_series, read_series, read_targets, recording_seconds

CAUSES = "causes.safetensors"
SERIES_FILE = "series.csv"
SERIES_AT_ONCE = 4096


@dataclass
class Causes:
    """What a recording says.

    Attributes:
        exponents: float32 [series, windows].
        p: float64 [series]; 0 where a series could not be tested, or p is smaller than a float can be.
        scores: float64 [series], the higher the more a series is worth keeping.
        tested, keep: bool [series].
        seconds: of the recorded training, of exponents and of tests.
    """

    exponents: Tensor
    p: Tensor
    scores: Tensor
    tested: Tensor
    keep: Tensor
    seconds: dict[str, float]


def target_steps(config: LEGCNetConfig, steps: int) -> list[int]:
    """The optimizer steps at which a window of the recording ends, of so many that are recorded.

    Raises:
        BadInputError: they are too few for the lag.
    """
    records = steps // config.record_every
    ends = [start + config.window for start in window_starts(records, config.window, config.step)]
    if len(ends) <= 3 * config.max_lag + 1:
        needed = (3 * config.max_lag + 1) * config.step + config.window
        raise BadInputError(
            f"max_lag: {config.max_lag} lags need {3 * config.max_lag + 2} windows, and {steps} recorded steps make "
            f"{len(ends)}; lower max_lag, window or record_every, or record {needed * config.record_every} steps."
        )
    return [end * config.record_every for end in ends]


def find_causes(
    recording: Path, config: LEGCNetConfig, steps: int, twin: Path | None = None, chosen: Tensor | None = None
) -> Causes:
    """Read the first `steps` steps of a recording and decide.

    Args:
        twin: the recording of a second training; the series are then the differences, the target is the first one's.
        chosen: int64, ascending places of the series to look at; all of them unless given.

    Raises:
        BadInputError: too few windows, a window whose target is missing, a target that never changes.
    """
    ends = target_steps(config, steps)
    measured = dict(read_targets(recording))
    missing = [end for end in ends if end not in measured]
    if missing:
        raise BadInputError(
            f"{recording}: the target was not measured at step {missing[0]}, where a window ends; record again with "
            "these settings."
        )
    target = torch.tensor([measured[end] for end in ends], dtype=torch.float64)
    if float(target.max()) == float(target.min()):
        raise BadInputError(
            f"{recording}: the target is {float(target[0]):.4g} in every window, so that nothing can cause it; record "
            "more steps, or an earlier part of the training."
        )
    start = perf_counter()
    records = steps // config.record_every
    parts = []
    for first in progress(range(0, count_series(recording), SERIES_AT_ONCE), "exponents"):
        series = read_series(recording, first, first + SERIES_AT_ONCE)[:, :records]
        if twin is not None:
            series = series - read_series(twin, first, first + SERIES_AT_ONCE)[:, :records]
        if chosen is not None:
            series = series[chosen[(chosen >= first) & (chosen < first + SERIES_AT_ONCE)] - first]
        if not bool(series.isfinite().all()):
            raise BadInputError(f"{recording}: a series holds numbers that are not finite; lower learning_rate.")
        parts.append(windowed_exponents(series, config.window, config.step))
    exponents = torch.cat(parts)
    between = perf_counter()
    test = granger_test(exponents, target, config.max_lag, config.statistic)
    keep = decide(test, exponents.numpy(), config)
    seconds = {
        "recording": sum(recording_seconds(own) for own in (recording, twin) if own is not None),
        "exponents": between - start,
        "granger": perf_counter() - between,
    }
    return Causes(
        exponents,
        torch.from_numpy(np.exp(causal_log_p(test, config))),
        torch.from_numpy(scores(test, exponents.numpy(), config)),
        torch.from_numpy(test.tested),
        torch.from_numpy(np.ascontiguousarray(keep)),
        seconds,
    )


def causes_of(folder: Path, find: Callable[[], Causes]) -> Causes:
    """What a decision's folder keeps; the main process finds it where there is nothing yet.

    Raises:
        BadInputError: on every process, where `find` does.
    """

    def found() -> None:
        if distributed.rank() == 0 and load_causes(folder) is None:
            causes = find()
            folder.mkdir(parents=True, exist_ok=True)
            save_causes(folder, causes)

    distributed.all_or_none(found)
    kept = load_causes(folder)
    assert kept is not None
    return kept


def save_causes(folder: Path, causes: Causes) -> None:
    """Write `causes.safetensors`."""
    names = ("exponents", "p", "scores", "tested", "keep")
    tensors = {name: getattr(causes, name) for name in names}
    seconds = {key: str(value) for key, value in causes.seconds.items()}
    part = folder / f"{CAUSES}.part"
    save_file({name: own.contiguous() for name, own in tensors.items()}, part, metadata=seconds)
    part.replace(folder / CAUSES)


def load_causes(folder: Path) -> Causes | None:
    """What `save_causes` wrote; None where it has not."""
    from safetensors import safe_open

    file = folder / CAUSES
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        seconds = {key: float(value) for key, value in opened.metadata().items()}
    return Causes(**load_file(file), seconds=seconds)


def write_series(file: Path, label: Callable[[int], str], causes: Causes) -> None:
    """A line for each series: what it is, p, its mean exponent, whether it was tested and stays."""
    means = causes.exponents.mean(1)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["series", "p", "mean_exponent", "tested", "kept"])
        for place in range(len(causes.keep)):
            flags = (bool(causes.tested[place]), bool(causes.keep[place]))
            writer.writerow([label(place), float(causes.p[place]), float(means[place]), *flags])
