"""What a search found: a table in Markdown, sentences for the card, and two pictures. A leaf: plain data in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.report.figures import duration, number
from hf_prune.report.markdown import code, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
OBJECTIVES = {
    "ls_distance": "the distance of Lyapunov spectra to the dense model's",
    "loss": "the loss on held-out windows",
    "both": "loss and distance of Lyapunov spectra",
    "layer_error": "the error of the blocks' output",
}
AXES = {
    "ls_distance": "LS distance at the first budget",
    "loss": "loss at the first budget, nats a token",
    "both": "relative loss + LS distance at the first budget",
    "layer_error": "layer error at the first budget",
}
SAMPLERS = {"tpe": "TPE", "random": "random search"}
COLUMNS = ("candidate", "value", "LS distance", "loss", "layer error", "most given", "seconds", "of these spectra")


def searched(summary: Mapping[str, Any] | None) -> str:
    """One sentence for the card: how many candidates, by what, at what cost; '' where nothing was searched."""
    if not summary:
        return ""
    distinct = len(summary["candidates"])
    repeated = f", {summary['duplicates']} of them repeated" if summary["duplicates"] else ""
    return (
        f"chosen from {distinct} candidates ({summary['drawn']} drawn by {SAMPLERS[summary['sampler']]}{repeated}) by "
        f"{OBJECTIVES[summary['objective']]}{', the last two by loss' if summary['finalists'] == 2 else ''}; "
        f"{summary['spent']:,} {summary['unit']} and {duration(summary['seconds'])} in all, "
        f"{duration(summary['spectrum_seconds'])} of it for spectra"
    )


def candidate_rows(summary: Mapping[str, Any] | None) -> list[list[str]]:
    """A row of cells for each candidate, safe in Markdown; the best first."""
    return [
        [
            escape(row["candidate"]),
            _figure(row["value"]) or escape(f"not finite: {row['why'] or 'no reason known'}"),
            _figure(row["distance"]),
            _figure(row["loss"]),
            _figure(row["layer_error"]),
            f"{row['budget']}",
            f"{row['seconds']:.1f}",
            f"{row['spectrum_seconds']:.1f}",
        ]
        for row in (summary or {}).get("candidates", [])
    ]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if number(value) is not None else ""


def search_markdown(summary: Mapping[str, Any]) -> str:
    """The whole account of a search."""
    account = searched(summary)
    lines = ["# Search", "", account[0].upper() + account[1:] + ".", ""]
    if summary["chosen"]:
        lines += [f"Chosen: {code(summary['chosen'])}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in candidate_rows(summary)]
    dense = summary["dense"]
    losses = list((dense.get("loss") or {}).values())
    lines += [
        "",
        f"Value: {OBJECTIVES[summary['objective']]}, smaller is better, at the most {summary['unit']} that a candidate "
        "was given; loss in nats a token.",
    ]
    if losses:
        lines += [f"The dense model's loss is {losses[-1]:.4g}; it took {duration(dense['seconds'])}."]
    if summary["agreement"] is not None:
        lines += [f"Spearman's rank correlation of distance and loss in the first round: {summary['agreement']:+.2f}."]
    if summary.get("stability"):
        lines += ["", *_stability(summary["stability"])]
    if summary["refused"]:
        lines += ["", f"{len(summary['refused'])} combinations cannot be run and were skipped:", ""]
        lines += [f"- {escape(own['candidate'])}: {escape(own['why'])}" for own in summary["refused"]]
    return "\n".join(lines)


def _stability(rows: list[dict[str, Any]]) -> list[str]:
    """How far the order of some candidates depends on how spectra are computed."""
    lines = ["| spectrum of | rank correlation with the search's | seconds a spectrum |", "|---|---|---|"]
    for row in rows:
        correlation = "" if row["correlation"] is None else f"{row['correlation']:+.2f}"
        lines.append(f"| {escape(row['spectrum'])} | {correlation} | {row['seconds']:.2f} |")
    count = rows[0]["candidates"]
    return [*lines, "", f"Spearman's rank correlation of the distances of the best {count} candidates."]


def plot_candidates(summary: Mapping[str, Any], path: str | Path) -> Figure:
    """Draw each candidate's first value against the order in which they were drawn, the chosen one marked, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = sorted(
        (row for row in summary["candidates"] if row["first_value"] is not None), key=lambda row: row["trial"]
    )
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["trial"] for row in rows], [row["first_value"] for row in rows], "o", color="#4878a8")
    for row in rows:
        if row["candidate"] == summary["chosen"]:
            axes.plot(row["trial"], row["first_value"], "o", color="#d1873c", label="chosen")
            axes.legend(frameon=False, loc="best")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("trial, in the order they were drawn")
    axes.set_ylabel(AXES[summary["objective"]])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_spectra(dense: list[float], spectra: Mapping[str, list[float]], path: str | Path) -> Figure:
    """Draw the dense model's exponents and those of some candidates, the largest first, as a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, spectrum in spectra.items():
        axes.plot(range(1, len(spectrum) + 1), spectrum, linewidth=1, label=name)
    axes.plot(range(1, len(dense) + 1), dense, color="black", linewidth=2, label="dense")
    axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel("exponent, the largest first")
    axes.set_ylabel("bits a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="x-small")
    figure.savefig(path, dpi=DPI)
    return figure
