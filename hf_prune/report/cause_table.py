"""What LEGCNet kept, beside as many series kept by magnitude and by chance: a table and its sentences."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from hf_prune.report.figures import percent


def causes_table(rounds: list[dict[str, Any]]) -> Table:
    """A line for the dense network and for each way to keep as many series."""
    table = Table(title="What was kept", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("Kept by")
    for name in (
        "Connections",
        "Accuracy",
        "Loss",
        "Epochs to the benchmark",
        "Seconds to it, with recording and tests",
    ):
        table.add_column(name, justify="right")
    for row in rounds:
        epochs, seconds = row["epochs_to_benchmark"], row["seconds_to_benchmark"]
        table.add_row(
            "all" if row["kind"] == "dense" else row["kind"].replace("legcnet", "LEGCNet"),
            f"{row['connections']:,}",
            percent(row["accuracy"]),
            f"{row['loss']:.4f}",
            "never" if epochs is None else f"{epochs:.0f}",
            "" if seconds is None else f"{seconds:.1f}",
        )
    return table


def causes_text(report: dict[str, Any]) -> list[str]:
    """What was decided on what, what it cost, and who won."""
    series, seconds, rounds = report["series"], report["seconds"], report["rounds"]
    untested = f"; {series['untested']:,} could not be tested and stay" if series["untested"] else ""
    sentences = [
        f"{series['kept']:,} of {series['all']:,} series stay, by {series['windows']} windows over "
        f"{report['recorded_steps']:,} steps{untested}. Exponents took {seconds['exponents']:.1f} s, Granger's test "
        f"{seconds['granger']:.1f} s; the recorded training {seconds['recording']:.1f} s."
    ]
    if report["benchmark"] is not None:
        sentences.append(f"The benchmark is {percent(report['benchmark'])} accuracy on the training rows.")
    never = [row["kind"] for row in rounds[1:] if report["benchmark"] and row["epochs_to_benchmark"] is None]
    if never:
        sentences.append(f"Never reached by {' and '.join(never)}: the training ended at its limit.")
    own, others = rounds[1], rounds[2:]
    better = [row["kind"] for row in others if row["accuracy"] > own["accuracy"]]
    if better:
        sentences.append(f"As many kept by {' or '.join(better)} are more accurate on the held-out rows.")
    return sentences


def watched_text(report: dict[str, Any]) -> str:
    """What was watched of a language model, and what as many series cost by LEGCNet, by magnitude and by chance."""
    own = report["legcnet"]
    costs, watched = own["perplexities"], own["watched"]
    untested = f", {own['untested']:,} could not be tested" if own["untested"] else ""
    names = {"legcnet": "LEGCNet", "magnitude": "magnitude" if watched == "weights" else "norm", "random": "chance"}
    figures = [f"{costs[kind]:.2f} by {name}" for kind, name in names.items()]
    sentences = [
        f"{own['causal']:,} of {own['series']:,} {watched} cause errors in {own['windows']} windows{untested}; "
        f"{own['series'] - own['kept']:,} go. With as many {'removed' if watched == 'units' else 'made zero'}, "
        f"perplexity is {figures[0]}, {figures[1]} and {figures[2]}."
    ]
    rounds = {row["kind"]: row for row in own.get("rounds", ())}
    trained = {kind: row for kind, row in rounds.items() if kind != "dense" and row["steps"]}
    if rounds and not trained:
        sentences.append("Nothing was trained behind that.")
    elif trained:
        ends = {kind: row["steps_to_benchmark"] for kind, row in trained.items()}
        reached = [f"by {names[kind]} {'never' if end is None else f'after {end:,}'}" for kind, end in ends.items()]
        sentences.append(
            f"Of {rounds['dense']['steps']:,} steps, 99 % of the dense accuracy on the target's windows is reached "
            f"{', '.join(reached)}."
        )
    return " ".join(sentences)
