"""Plots of what causes errors: exponents over a training, and the p of every series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from hf_prune.methods.legcnet import LEGCNetConfig
    from hf_prune.training.rounds import Round

DPI = 150
KEPT, PRUNED = "#4878a8", "#d1873c"
BINS = 40
# log10 of the smallest p that is drawn where it is.
SMALLEST = -100


def plot_exponents(exponents: Tensor, keep: Tensor, config: LEGCNetConfig, path: str | Path) -> Figure:
    """Draw median and quartiles of the exponents of kept and of pruned series over the windows, as a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    ends = config.record_every * (config.window + config.step * np.arange(exponents.shape[1]))
    for name, which, colour in (("kept", keep, KEPT), ("pruned", ~keep, PRUNED)):
        if not bool(which.any()):
            continue
        low, middle, high = np.quantile(exponents[which].numpy(), [0.25, 0.5, 0.75], axis=0)
        axes.plot(ends, middle, color=colour, label=f"{name} ({int(which.sum()):,})")
        axes.fill_between(ends, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.axhline(0, color="0.6", linewidth=1, zorder=0)
    axes.set_xlabel("step at which a window ends")
    axes.set_ylabel("largest Lyapunov exponent, nats a record")
    axes.set_title("Exponents of the series: median and quartiles")
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_p_values(p: Tensor, tested: Tensor, alpha: float | None, path: str | Path) -> Figure:
    """Draw a histogram of log10 p of the series that could be tested, as a PNG at `path`; `alpha` where it decided."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(p[tested].clamp(min=10**SMALLEST).log10().numpy(), bins=BINS, range=(SMALLEST, 0), color=KEPT)
    if alpha is not None:
        axes.axvline(math.log10(alpha), color="0.1", linewidth=1, label=f"alpha = {alpha:g}")
        axes.legend(frameon=False)
    axes.set_xlabel(f"log10 of Granger's p, series against errors; what is smaller stands at {SMALLEST}")
    axes.set_ylabel("series")
    untested = int((~tested).sum())
    axes.set_title(f"{int(tested.sum()):,} series" + (f"; {untested:,} could not be tested" if untested else ""))
    return _save(figure, path)


def plot_moved(rounds: Sequence[Round], path: str | Path, steps_an_epoch: int = 1) -> Figure:
    """Draw how far each layer moved from look to look, dense in full and pruned dashed, as a PNG at `path`.

    Args:
        rounds: the dense training and the one of what LEGCNet keeps.
        steps_an_epoch: 1, to draw over steps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for found, line, name in zip(rounds, ("-", "--"), ("dense", "pruned"), strict=True):
        for place, layer in enumerate(found.layers):
            # Where nothing was trained there is a look, and nothing that has moved.
            looks = zip(found.looks, found.moved, strict=False)
            norms = [(step / steps_an_epoch, moved[layer]) for (step, *_), moved in looks if layer in moved]
            if norms:
                places, values = zip(*norms, strict=True)
                marker, label = "o" if len(norms) == 1 else "", f"{layer}, {name}"
                axes.plot(places, values, linestyle=line, marker=marker, color=f"C{place}", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("epoch" if steps_an_epoch > 1 else "step")
    axes.set_ylabel("norm of what changed since the look before")
    axes.set_title("How far the layers move")
    if axes.lines:
        axes.legend(frameon=False, fontsize="small", ncols=1 + len(axes.lines) // 8)
    return _save(figure, path)


def _save(figure: Figure, path: str | Path) -> Figure:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure
