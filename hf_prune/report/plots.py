"""Plots for the card and `inspect`: a heat map per quantity, blocks along the bottom, kinds of weight up the side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.report.figures import number, percent
from hf_prune.report.names import kind_of, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Grid = dict[str, dict[int, float]]
"""Value by kind of weight and block."""

DPI = 150
WIDTHS = (7.0, 10.0)  # inches, for few and for many blocks
ROW = 0.34  # inches a kind of weight
FRAME = 0.95  # inches a panel for its title and axis
UNIFORM = 0.001  # sparsities closer than this are one figure in the title, not a map
NARROWEST = 0.1  # a sparsity colour bar spans at least this much, so that rounding does not look like structure
MOST_ANNOTATED = 16  # blocks; with more the figures no longer fit their cells


def plot_sparsity_by_layer(rows: list[dict[str, Any]], path: str | Path) -> Figure | None:
    """Draw the sparsity of each weight as a PNG at `path`, and below it the relative output error where it is known.

    rows: the views of a prune_report.json, or the rows of checkpoint.inspect; those outside the blocks are not drawn.
    Where every sparsity is the same and errors are known, the title says so and only the errors are drawn.
    Returns the figure, or None (and writes nothing) where no row lies in a block.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("block") is not None and number(row.get("density")) is not None]
    if not rows:
        return None
    sparsity = _grid([(row, 1 - row["density"]) for row in rows])
    error = _grid([(row, row["error"]) for row in rows if (number(row.get("error")) or 0) > 0])
    values = _values(sparsity)
    uniform = max(values) - min(values) < UNIFORM
    title = "Sparsity: zeros in % of the weights"
    if uniform:
        title = f"Sparsity: {percent(sum(values) / len(values))} in each of {len(rows)} weight matrices"
    panels = [] if uniform and error else [(sparsity, title, "cividis", _sparsity_norm(values, uniform))]
    if error:
        above = f"{title}\n" if uniform else ""
        error_title = f"{above}Output error: |dW X|² in % of |W X|², calibration text"
        panels.append((error, error_title, "viridis", _error_norm(_values(error))))
    heights = [ROW * len(panel[0]) + FRAME for panel in panels]
    width = min(max(3 + 0.6 * len({row["block"] for row in rows}), WIDTHS[0]), WIDTHS[1])
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    column = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        _heat_map(axes, *panel)
    column[-1].set_xlabel("block")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_rounds(rounds: list[dict[str, Any]], path: str | Path) -> Figure:
    """Draw perplexity over the share of weights left, from a report's tickets, as a PNG at `path`; controls beside."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(WIDTHS[0], 4.0), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(found["kind"] for found in rounds):
        own = [found for found in rounds if found["kind"] == kind]
        places = [1 - found["sparsity"] for found in own]
        style = "o-" if kind == "ticket" else "x"
        axes.plot(places, [found["perplexity"] for found in own], style, label=kind.replace("_", " "))
    axes.axhline(rounds[0]["perplexity"], color="0.6", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    left = sorted({1 - found["sparsity"] for found in rounds if found["sparsity"] < 1})
    axes.set_xticks(left, [f"{100 * share:.3g} %" for share in left], fontsize="small")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("weights left")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_comparison(comparison: dict[str, Any], path: str | Path) -> Figure:
    """Draw the share of each layer's weights that all tickets keep, beside chance, as a PNG at `path`."""
    from matplotlib.figure import Figure

    layers = comparison["layers"]
    figure = Figure(figsize=(WIDTHS[1], max(ROW * 0.6 * len(layers) + FRAME, 2.5)), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.barh(places, [100 * layer["shared"] / layer["weights"] for layer in layers], color="#4878a8", label="shared")
    chance = [100 * layer["chance"] / layer["weights"] for layer in layers]
    axes.plot(chance, places, "|", color="0.1", markersize=9, markeredgewidth=1.5, label="by chance")
    least = [100 * min(layer["kept"]) / layer["weights"] for layer in layers]
    axes.plot(least, places, ".", color="0.6", label="left in the sparsest")
    axes.set_yticks(places, short_names([layer["layer"] for layer in layers]), fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("% of the layer's weights")
    axes.set_title(f"Weights that {', '.join(comparison['tickets'])} all keep")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_sensitivity(report: dict[str, Any], path: str | Path) -> Figure:
    """Draw what each part costs when it alone is pruned, from a sensitivity.json, as a PNG at `path`.

    Bars are the rise of log-perplexity in nats a token with its 95 % interval; parts in the model's order.
    """
    from matplotlib.figure import Figure

    parts = report["parts"]
    figure = Figure(figsize=(WIDTHS[0], max(ROW * 0.75 * len(parts) + FRAME, 2.5)), layout="constrained")
    axes = figure.subplots()
    places = range(len(parts))
    costs = [part["cost"] for part in parts]
    axes.barh(places, costs, color="#4878a8")
    for place, part in zip(places, parts, strict=True):
        if part["low"] is not None:
            axes.plot([math.log(part["low"]), math.log(part["high"])], [place, place], color="0.25", linewidth=1)
    axes.set_yticks(places, [part["part"] for part in parts], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("rise of log-perplexity when this part alone is pruned (nats a token, 95 % interval)", fontsize=9)
    axes.set_title(f"Sensitivity by {report['by']} at {percent(report['sparsity'])} sparsity", fontsize=11, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_widths(structure: dict[str, Any], path: str | Path) -> Figure:
    """Draw how many neurons each block's MLP keeps, from a report's `structure`, as a PNG at `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    widths = structure["widths"]
    figure = Figure(figsize=(WIDTHS[0], 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(widths)), widths, color="#4878a8")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(structure["before"]["width"], color="0.4", linewidth=0.8)
    axes.set_xlabel("block")
    axes.set_title(f"Neurons an MLP keeps of {structure['before']['width']:,} (the line)", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure


def _grid(items: list[tuple[dict[str, Any], float]]) -> Grid:
    """The mean over the weights of a kind in a block: experts are many."""
    gathered: dict[str, dict[int, list[float]]] = {}
    for row, value in items:
        gathered.setdefault(kind_of(row), {}).setdefault(row["block"], []).append(value)
    return {kind: {block: sum(v) / len(v) for block, v in line.items()} for kind, line in gathered.items()}


def _values(grid: Grid) -> list[float]:
    return [value for line in grid.values() for value in line.values()]


def _sparsity_norm(values: list[float], uniform: bool) -> Normalize:
    from matplotlib.colors import Normalize

    if uniform:
        # One colour that means something: its place between none and all.
        return Normalize(0, 100)
    width = max(max(values) - min(values), NARROWEST)
    low = min(max((min(values) + max(values) - width) / 2, 0.0), 1 - width)
    return Normalize(100 * low, 100 * (low + width))


def _error_norm(values: list[float]) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    low, high = 100 * min(values), 100 * max(values)
    return LogNorm(low, high) if high > 10 * low else Normalize(0, high)


def _heat_map(axes: Axes, grid: Grid, title: str, colours: str, norm: Normalize) -> None:
    """Draw 100 x the values; kinds from top to bottom as they come in a block, what a block lacks stays grey."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    kinds, blocks = list(grid), sorted({block for line in grid.values() for block in line})
    cells = [[100 * grid[kind].get(block, math.nan) for block in blocks] for kind in kinds]
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=10)
    step = max(1, math.ceil(len(blocks) / 30))
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # White lines between the cells, drawn as the minor grid.
    axes.set_xticks([column + 0.5 for column in range(len(blocks) - 1)], minor=True)
    axes.set_yticks([line + 0.5 for line in range(len(kinds) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if len(blocks) <= 40 else 0.4)
    axes.tick_params(which="minor", length=0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    if len(blocks) <= MOST_ANNOTATED:
        for line, values in enumerate(cells):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    red, green, blue, _ = image.cmap(norm(value))
                    colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                    axes.text(column, line, f"{value:.3g}", ha="center", va="center", fontsize=9, color=colour)
