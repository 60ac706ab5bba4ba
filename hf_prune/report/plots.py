"""Plots for the card and for `inspect`: one heat map per quantity, blocks along the bottom, kinds of weight up the side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.report.figures import number, percent
from hf_prune.report.names import kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid = dict[str, dict[int, float]]
"""Value by kind of weight and block."""

DPI = 150
WIDTH = 10.0  # inches, so 1500 pixels
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
    grids = [grid for grid in (sparsity, error) if grid and not (grid is sparsity and uniform and error)]
    heights = [ROW * len(grid) + FRAME for grid in grids]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.35 * uniform), layout="constrained")
    if uniform:
        mean = sum(values) / len(values)
        figure.suptitle(f"Sparsity: {percent(mean)} in each of {len(rows)} weight matrices", fontsize=13)
    for axes, grid in zip(
        figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0], grids, strict=True
    ):
        if grid is sparsity:
            _draw_sparsity(axes, grid)
        else:
            _draw_error(axes, grid)
    axes.set_xlabel("block")
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


def _draw_sparsity(axes: Axes, grid: Grid) -> None:
    from matplotlib.colors import Normalize

    values = _values(grid)
    width = max(max(values) - min(values), NARROWEST)
    low = min(max((min(values) + max(values) - width) / 2, 0.0), 1 - width)
    _heat_map(axes, grid, "Sparsity: zeros in % of the weights", "cividis", Normalize(100 * low, 100 * (low + width)))


def _draw_error(axes: Axes, grid: Grid) -> None:
    from matplotlib.colors import LogNorm, Normalize

    low, high = 100 * min(_values(grid)), 100 * max(_values(grid))
    norm = LogNorm(low, high) if high > 10 * low else Normalize(0, high)
    _heat_map(axes, grid, "Error: |dW X|² in % of |W X|², on the calibration text", "viridis", norm)


def _heat_map(axes: Axes, grid: Grid, title: str, colours: str, norm: Normalize) -> None:
    """Draw 100 x the values; kinds from top to bottom as they come in a block, what a block lacks stays grey."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    kinds, blocks = list(grid), sorted({block for line in grid.values() for block in line})
    cells = [[100 * grid[kind].get(block, math.nan) for block in blocks] for kind in kinds]
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize=12, loc="left")
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
    if len(blocks) <= MOST_ANNOTATED:
        for line, values in enumerate(cells):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    dark = sum(image.cmap(norm(value))[:3]) < 1.5
                    colour = "white" if dark else "black"
                    axes.text(column, line, f"{value:.3g}", ha="center", va="center", fontsize=9, color=colour)
