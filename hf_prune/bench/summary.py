"""The tables of a benchmark: a line for each row and setting, as CSV, Markdown and a plot."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_prune.bench.grid import Grid
from hf_prune.bench.results import Results
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import bootstrap_ratio

# Cores that something else had: above the first the machine was not idle, above the second seconds say little.
QUIET, SHARED = 0.1, 0.5
# Where a point's number stands, in typographic points: neighbours by height have theirs on different sides.
CORNERS = ((7, 4), (-7, -5), (7, -5), (-7, 4))


def summarise(grid: Grid, results: Results) -> list[dict[str, Any]]:
    """A flat line for every row and setting that has a finished run, seeds and repeats put together.

    Seconds are the median over runs that had an idle machine to themselves, over those that shared little of it where
    none had.

    `excess` is log(perplexity / dense perplexity), the mean over seeds; `excess_ratio` and `time_ratio` are to the
    grid's reference row under the same setting, `time_ratio` to its runs of the same days where it has any: machines
    differ from day to day.
    """
    quality = results.quality
    dense = quality["dense"]
    lines = []
    seconds: dict[tuple[str, str], list[tuple[str | None, float]]] = {}
    for setting in grid.settings:
        for row in grid.rows:
            runs = [
                run
                for cell in grid.cells
                if (cell.row, cell.setting) == (row["name"], setting)
                for run in results.runs(cell)
            ]
            if not runs:
                continue
            first = {run["seed"]: quality[run["weights"]] for run in reversed(runs)}
            timed = _timed(runs)
            seconds[setting, row["name"]] = [(run.get("day"), run["seconds"]) for run in timed]
            logs = [math.log(figures["perplexity"] / dense["perplexity"]) for figures in first.values()]
            seed = min(first)
            # Windows are drawn, seeds are what they are: their mean is that of the perplexity shown.
            mean = torch.tensor([figures["nll"] for figures in first.values()], dtype=torch.float64).mean(dim=0)
            _, low, high = bootstrap_ratio(torch.tensor(dense["nll"], dtype=torch.float64), mean)
            excess = sum(logs) / len(logs)
            lines.append(
                {
                    "setting": setting,
                    "row": row["name"],
                    "perplexity": dense["perplexity"] * math.exp(excess),
                    "low": low and dense["perplexity"] * low,
                    "high": high and dense["perplexity"] * high,
                    "excess": excess,
                    "seeds": len(logs),
                    "excess_spread": max(logs) - min(logs),
                    "seconds": median(run["seconds"] for run in timed),
                    "allocation_seconds": median(run.get("allocation_seconds") or 0.0 for run in timed),
                    "runs": len(runs),
                    "peak_memory_bytes": median(run["peak_memory_bytes"] or 0 for run in runs),
                    "sparsity": first[seed]["sparsity"],
                    "total_sparsity": gone(first[seed], dense),
                    "cores_busy_elsewhere": max(run["cores_busy_elsewhere"] for run in timed),
                    "quiet": all(_is_quiet(run) for run in timed),
                    **_agreement(grid, results, row["name"], setting),
                }
            )
    _add_ratios(lines, grid.reference, seconds)
    return lines


def _timed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose seconds count."""
    for limit in (QUIET, SHARED):
        if found := [run for run in runs if _disturbance(run) <= limit]:
            return found
    return runs


def _is_quiet(run: dict[str, Any]) -> bool:
    """Whether a run had an idle machine to itself; one of several side by side had only some of its processors."""
    return _disturbance(run) <= QUIET


def _disturbance(run: dict[str, Any]) -> float:
    """Cores that something else had, runs at its side included."""
    return float(run["cores_busy_elsewhere"]) + run.get("at_once", 1) - 1


def gone(figures: dict[str, Any], dense: dict[str, Any]) -> float:
    """Share of all of the dense model's parameters that are zero or no longer there."""
    if "parameters" not in figures or "parameters" not in dense:
        # Scored before sizes were noted: nothing was ever smaller.
        return figures["total_sparsity"]
    return 1 - figures["parameters"] * (1 - figures["total_sparsity"]) / dense["parameters"]


def _agreement(grid: Grid, results: Results, row: str, setting: str) -> dict[str, float | None]:
    """Mean rank correlation (Spearman) of a row's allocations: over its seeds, and with the reference row's."""

    def allocations(name: str | None) -> list[list[float]]:
        cells = [cell for cell in grid.cells if (cell.row, cell.setting) == (name, setting)]
        found = {cell.seed: run.get("densities") for cell in cells for run in reversed(results.runs(cell))}
        return [densities for densities in found.values() if densities]

    own = allocations(row)
    others = allocations(grid.allocation_reference) if row != grid.allocation_reference else []
    return {
        "allocation_over_seeds": _mean_correlation(list(itertools.combinations(own, 2))),
        "allocation_like_reference": _mean_correlation(list(itertools.product(own, others))),
    }


def _mean_correlation(pairs: list[tuple[list[float], list[float]]]) -> float | None:
    from scipy.stats import spearmanr

    values = [float(spearmanr(a, b).statistic) for a, b in pairs]
    return sum(values) / len(values) if values else None


def _add_ratios(
    lines: list[dict[str, Any]], reference: str | None, seconds: dict[tuple[str, str], list[tuple[str | None, float]]]
) -> None:
    base = {line["setting"]: line for line in lines if line["row"] == reference}
    for line in lines:
        other = base.get(line["setting"])
        line["excess_ratio"] = line["excess"] / other["excess"] if other and other["excess"] > 0 else None
        line["time_ratio"] = (
            _time_ratio(seconds[line["setting"], line["row"]], seconds[line["setting"], other["row"]])
            if other
            else None
        )


def _time_ratio(own: list[tuple[str | None, float]], reference: list[tuple[str | None, float]]) -> float | None:
    """Quotient of the medians, each over the runs of days that both have where there are such."""
    shared = {day for day, _ in own} & {day for day, _ in reference}
    medians = [median(took for day, took in runs if day in shared or not shared) for runs in (own, reference)]
    return medians[0] / medians[1] if medians[1] > 0 else None


def markdown(grid: Grid, results: Results, lines: list[dict[str, Any]]) -> str:
    """One table, settings under one another, and the conditions below it."""
    head = [
        "setting",
        "row",
        "perplexity (95 % interval)",
        "excess",
        "seconds",
        "peak MB",
        "zero or gone, of all parameters",
    ]
    correlated = any(correlations(line) for line in lines)
    head += ["allocation's rank correlation"] if correlated else []
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        interval = f" ({line['low']:.1f} to {line['high']:.1f})" if line["low"] else ""
        spread = f" ± {line['excess_spread'] / 2:.3f}, {line['seeds']} seeds" if line["seeds"] > 1 else ""
        against = f" ({line['excess_ratio']:.2f}x)" if line["excess_ratio"] is not None else ""
        time = f" ({line['time_ratio']:.2f}x)" if line["time_ratio"] is not None else ""
        allocating = f", {line['allocation_seconds']:.0f} allocating" if line["allocation_seconds"] >= 1 else ""
        cells = [
            line["setting"],
            line["row"],
            f"{line['perplexity']:.2f}{interval}",
            f"{line['excess']:.3f}{spread}{against}",
            f"{'' if line['quiet'] else '~'}{line['seconds']:.0f}{time}{allocating}",
            f"{line['peak_memory_bytes'] / 1e6:.0f}",
            f"{100 * line['total_sparsity']:.1f} %",
        ]
        cells += [correlations(line)] if correlated else []
        out.append("| " + " | ".join(cells) + " |")
    dense = results.quality["dense"]
    windows = len(dense["nll"])
    quiet = [line["cores_busy_elsewhere"] for line in lines if line["quiet"]]
    reference = f", in brackets as a multiple of {grid.reference}'s" if grid.reference else ""
    note = (
        f"{grid.title} Dense perplexity {dense['perplexity']:.2f} on {windows} windows; excess is the rise of "
        f"log-perplexity in nats a token{reference}. Seconds and peak memory are of the pruning"
    )
    if grid.reference:
        note += ", ratios of seconds those of a common day where there is one"
    note += f"; at most {max(quiet):.2f} cores were busy elsewhere." if quiet else "."
    if len(quiet) < len(lines):
        note += " At `~` the machine was not idle or its processors were shared out: these seconds are a sketch."
    if grid.share_learning:
        note += " Rows with the same learned allocation learned it once: seconds of the later ones lack the learning."
    if correlated and grid.allocation_reference:
        note += (
            f" Rank correlations of densities: over a row's own seeds, or with those of {grid.allocation_reference}."
        )
    return "\n".join([*out, "", note.strip()])


def correlations(line: dict[str, Any]) -> str:
    """How alike a row's allocations are, for a cell of a table; '' where there is nothing to compare."""
    seeds, like = line.get("allocation_over_seeds"), line.get("allocation_like_reference")
    words = [f"{seeds:.2f} over seeds"] if seeds is not None else []
    return ", ".join(words + ([f"{like:.2f}"] if like is not None else []))


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Every column of every line."""
    import pandas

    pandas.DataFrame(lines).to_csv(path, index=False)


def write_between_markers(path: Path, name: str, table: str) -> None:
    """Replace what stands between `<!-- benchmark:NAME:start -->` and `<!-- benchmark:NAME:end -->`.

    Raises:
        BadInputError: the file lacks the two lines; it is left as it was.
    """
    start, end = f"<!-- benchmark:{name}:start -->", f"<!-- benchmark:{name}:end -->"
    text = path.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise BadInputError(f"readme: {path} has no lines {start} and {end}; add them where the table shall stand.")
    before, after = text[: text.index(start)], text[text.index(end) :]
    path.write_text(f"{before}{start}\n{table}\n{after}", encoding="utf-8")


def plot(path: Path, grid: Grid, lines: list[dict[str, Any]]) -> None:
    """Excess log-perplexity against seconds, a panel for each setting, a numbered point for each row, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    settings = [setting for setting in grid.settings if any(line["setting"] == setting for line in lines)]
    figure = Figure(figsize=(3.4 * max(len(settings), 2), 5.4), layout="constrained")
    panels = figure.subplots(1, max(len(settings), 1), squeeze=False)[0]
    points = {}
    for axes, setting in zip(panels, settings, strict=False):
        numbers = {row["name"]: number for number, row in enumerate(grid.rows, 1)}
        own = sorted((line for line in lines if line["setting"] == setting), key=lambda line: line["excess"])
        for line, corner in zip(own, itertools.cycle(CORNERS), strict=False):
            number = numbers[line["row"]]
            marker = "s" if grid.rows[number - 1].get("command") else "o"
            place = (line["seconds"], line["excess"])
            (points[f"{number} {line['row']}"],) = axes.plot(*place, marker, color=f"C{(number - 1) % 10}")
            axes.annotate(
                str(number), place, xytext=corner, textcoords="offset points", fontsize=7, ha="center", va="center"
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.25, y=0.15)
        axes.set_title(setting, fontsize=10, loc="left")
        axes.set_xlabel("seconds to prune", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("rise of log-perplexity (nats a token)", fontsize=9)
    named = [name for number, row in enumerate(grid.rows, 1) if (name := f"{number} {row['name']}") in points]
    columns = max(len(settings), 2)
    handles = [points[name] for name in named]
    figure.legend(handles, named, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
