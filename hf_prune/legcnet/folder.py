"""What every folder and report of LEGCNet says of its series."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.report.cause_plots import plot_exponents, plot_p_values
from hf_prune.training.causes import SERIES_FILE, Causes, save_causes, write_series
from hf_prune.training.rounds import Look


def write_causes(folder: Path, causes: Causes, label: Callable[[int], str], config: LEGCNetConfig) -> None:
    """Exponents, p and what stays, as tensors, as a table by `label`, and drawn."""
    save_causes(folder, causes)
    write_series(folder / SERIES_FILE, label, causes)
    plot_exponents(causes.exponents, causes.keep, config, folder / "plots" / "exponents.png")
    # Sizes decide for units, ranks where a sparsity is given.
    alpha = None if config.sparsity or config.series == "units" else config.alpha
    plot_p_values(causes.p, causes.tested, alpha, folder / "plots" / "p_values.png")


def seconds_to_benchmark(kind: str, reached: Look | None, seconds: dict[str, float], restart: str) -> float | None:
    """Seconds to a look with what the choice rests on: the recorded training where it looks at its end, tests.

    Args:
        kind: of the round.
        reached: the look; None where there was none.
        seconds: of recording, exponents and tests.
        restart: with `continue`, the recorded training is the beginning of every one behind it.
    """
    tests = ("exponents", "granger") if kind == "legcnet" else ()
    begins = kind != "dense" and restart == "continue"
    recording = ("recording",) if begins or kind in ("legcnet", "magnitude") else ()
    return reached[2] + sum(seconds[part] for part in (*recording, *tests)) if reached else None


def describe_causes(causes: Causes, config: LEGCNetConfig, perplexities: dict[str, float]) -> dict[str, Any]:
    """Of a language model: what was watched, what it caused, and perplexity by what chose as many to keep."""
    return {
        "watched": {"units": "units", "rows": "rows"}.get(config.series, "weights"),
        "series": len(causes.keep),
        "kept": int(causes.keep.sum()),
        "untested": int((~causes.tested).sum()),
        "causal": int(((causes.p < config.alpha) & causes.tested).sum()),
        "windows": causes.exponents.shape[1],
        "perplexities": perplexities,
        "seconds": causes.seconds,
    }
