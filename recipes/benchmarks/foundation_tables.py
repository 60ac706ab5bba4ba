"""The tables of the one-shot benchmark: a flat CSV of everything, and the few columns that a README shows."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

CONTESTANTS = ("ours", "peer")
MARKERS = "<!-- benchmark:foundation:start -->", "<!-- benchmark:foundation:end -->"
QUIET = 0.05  # cores; above this the machine was not idle

Row = dict[str, Any]


def summarise(runs: dict[str, list[Row]], quality: dict[str, Row]) -> list[Row]:
    """One flat row per setting and contestant, medians over its runs.

    Args:
        runs: reports of the runs by "method/pattern/contestant".
        quality: perplexity, sparsity and broken groups by digest of the weights.
    """
    rows = []
    for key, reports in runs.items():
        if not reports:
            continue
        method, pattern, contestant = key.split("/")
        row: Row = {"method": method, "pattern": pattern, "contestant": contestant, "runs": len(reports)}
        figures = quality.get(reports[-1]["weights"], {})
        row |= {name: figures.get(name) for name in ("perplexity", "sparsity", "broken_groups")}
        for phase in ("import", "load", "prune", "save", "process"):
            row[f"{phase}_seconds"] = round(median(report["seconds"][phase] for report in reports), 2)
        row["slowest_prune_seconds"] = round(max(report["seconds"]["prune"] for report in reports), 2)
        row["prune_processor_seconds"] = round(median(report["processor_seconds"]["prune"] for report in reports), 2)
        for phase in ("prune", "process"):
            row[f"{phase}_peak_bytes"] = round(median(report["peak_memory_bytes"][phase] for report in reports))
        row["cores_busy_elsewhere"] = round(max(report["busy_elsewhere"]["prune"] for report in reports), 3)
        row["distinct_weights"] = len({report["weights"] for report in reports})
        row["threads"] = reports[-1]["threads"]
        row["versions"] = " ".join(f"{name} {version}" for name, version in reports[-1]["versions"].items())
        rows.append(row)
    return rows


def markdown(rows: list[Row], settings: Sequence[tuple[str, str]], conditions: str) -> str:
    """One line per (method, pattern), ours beside the peer's, and below it the conditions."""
    by_key = {(row["method"], row["pattern"], row["contestant"]): row for row in rows}
    lines = ["| method | setting | perplexity ours / peer | seconds ours / peer | ratio | peak MB ours / peer |"]
    lines.append("|---|---|---|---|---|---|")
    for method, pattern in settings:
        ours, peer = (by_key.get((method, pattern, contestant), {}) for contestant in CONTESTANTS)
        both = ours and peer
        ratio = f"{ours['prune_seconds'] / peer['prune_seconds']:.2f}" if both else "-"
        setting = "50 %" if pattern == "unstructured" else pattern
        cells = [
            " / ".join(f"{row[key] / unit:.{digits}f}" if row.get(key) is not None else "-" for row in (ours, peer))
            for key, unit, digits in (("perplexity", 1, 2), ("prune_seconds", 1, 1), ("prune_peak_bytes", 1e6, 0))
        ]
        lines.append(f"| {method} | {setting} | {cells[0]} | {cells[1]} | {ratio} | {cells[2]} |")
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    fewest = min(row["runs"] for row in rows)
    runs = "single runs" if fewest == 1 else f"medians of {fewest} runs or more"
    busy = max(row["cores_busy_elsewhere"] for row in rows)
    note = (
        f"{conditions} Seconds and peak own (anonymous) memory are of the pruning itself, {runs} on "
        f"{rows[0]['threads']} CPU threads with at most {busy:.2f} cores busy elsewhere; {versions}."
    )
    if any(row["cores_busy_elsewhere"] > QUIET for row in rows):
        note += " The machine was not idle: the seconds are only a sketch."
    return "\n".join([*lines, "", note])


def write_csv(path: Path, rows: list[Row]) -> None:
    """Every column of every row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_readme(path: Path, table: str) -> None:
    """Put the table between the README's markers."""
    text = path.read_text()
    if not all(marker in text for marker in MARKERS):
        raise SystemExit(f"{path} has no lines {MARKERS[0]} and {MARKERS[1]}: add them where the table shall stand.")
    before, rest = text.split(MARKERS[0])
    path.write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")
