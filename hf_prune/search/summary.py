"""What a search says of itself: candidates in order, what they cost, and the files that show it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_prune.report.search_report import plot_candidates, plot_spectra, search_markdown
from hf_prune.search.arguments import SearchArguments
from hf_prune.search.candidates import Candidates
from hf_prune.search.space import label
from hf_prune.search.study import StudyFolder, counted, drawn, found

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SUMMARY, TABLE = "search.json", "search.md"
MOST_SPECTRA = 8


def summarise(
    arguments: SearchArguments,
    candidates: Candidates,
    folder: StudyFolder,
    spent: tuple[int, float],
) -> dict[str, Any]:
    """Plain data: settings, cost, every candidate. Of each, the trial with the most budget counts; finalists stand
    first in their order, then who survived longest, then the better value, and what is not finite last.
    """
    rows: dict[str, dict[str, Any]] = {}
    trials = folder.trials()
    for trial in trials:
        if "refused" in trial.user_attrs or "duplicate_of" in trial.user_attrs or not trial.state.is_finished():
            continue
        row = _row(trial, arguments)
        name = label(trial.params)
        before = rows.get(name)
        if before is not None:
            kept = row if row["budget"] >= before["budget"] else before
            costs = {key: row[key] + before[key] for key in ("seconds", "spectrum_seconds", "spent")}
            first = {key: before[key] for key in ("trial", "first_value", "first_distance", "first_loss")}
            row = {**kept, **costs, **first}
        rows[name] = row
    finalists: list[str] = folder.study.user_attrs.get("finalists", [])
    order = {name: place for place, name in enumerate(finalists)}

    def rank(item: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
        name, row = item
        value = row["value"] if row["value"] is not None else math.inf
        return row["value"] is None, order.get(name, len(order)), -row["budget"], value, row["trial"]

    named = sorted(rows.items(), key=rank)
    ranked = [row for _, row in named]
    # Once there are finalists, nobody else.
    eligible = (row for name, row in named if name in order or not order)
    chosen = next((row["candidate"] for row in eligible if row["value"] is not None), None)
    dense = folder.study.user_attrs.get("dense", {})
    stability = folder.study.user_attrs.get("stability")
    total_budget, seconds = spent
    return {
        **({"stability": stability["rows"]} if stability else {}),
        "search": arguments.search,
        "sampler": arguments.sampler,
        "pruner": arguments.pruner,
        "objective": arguments.objective,
        "finalists": arguments.finalists,
        "distance": arguments.distance if arguments.needs_spectrum else None,
        "seed": arguments.search_seed,
        "unit": candidates.unit,
        "space": {key: [_plain(value) for value in values] for key, values in candidates.space.axes.items()},
        "possible": candidates.space.possible,
        "refused": [{"candidate": name, "why": why} for name, why in sorted(candidates.space.refused.items())],
        "drawn": len(counted(trials)),
        "duplicates": sum("duplicate_of" in trial.user_attrs for trial in drawn(trials)),
        "refused_drawn": sum("refused" in trial.user_attrs for trial in drawn(trials)),
        "spent": total_budget,
        "seconds": seconds,
        "spectrum_seconds": dense.get("spectrum_seconds", 0.0) + sum(row["spectrum_seconds"] for row in rows.values()),
        "dense": dense,
        "agreement": _agreement(list(rows.values())),
        "chosen": chosen,
        "candidates": ranked,
    }


def _row(trial: FrozenTrial, arguments: SearchArguments) -> dict[str, Any]:
    own = found(trial)
    value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
    return {
        "candidate": label({key: _plain(value) for key, value in trial.params.items()}),
        "trial": trial.number,
        "value": value,
        "first_value": value,
        "distance": own.get("distance"),
        "first_distance": own.get("distance"),
        "loss": own.get("loss"),
        "first_loss": own.get("loss"),
        "layer_error": own.get("layer_error"),
        "budget": own.get("reached") or trial.user_attrs.get("budget", arguments.first_budget),
        "spent": own.get("spent", 0),
        "seconds": own.get("seconds", 0.0),
        "spectrum_seconds": own.get("spectrum_seconds", 0.0),
        "why": own.get("sentence"),
    }


def _plain(value: Any) -> Any:
    """A saved plan without the folders of this machine."""
    return Path(value).name if isinstance(value, str) and value.endswith(".json") else value


def _agreement(rows: list[dict[str, Any]]) -> float | None:
    """Spearman's rank correlation of distance and loss in the first round; None where there are not three of both."""
    from scipy.stats import spearmanr

    pairs = [
        (row["first_distance"], row["first_loss"])
        for row in rows
        if row["first_distance"] is not None and row["first_loss"] is not None
    ]
    if len(pairs) < 3 or any(len(set(own)) < 2 for own in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def write_tables(
    folder: Path, summary: Mapping[str, Any], dense: Mapping[int, Tensor], spectra: Mapping[str, Tensor]
) -> None:
    """search.json, search.md and the pictures, into search_dir."""
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(search_markdown(summary) + "\n", encoding="utf-8")
    if summary["candidates"]:
        plot_candidates(summary, folder / "candidates.png")
    if spectra and dense:
        best = {name: spectrum.tolist() for name, spectrum in list(spectra.items())[:MOST_SPECTRA]}
        plot_spectra(dense[min(dense)].tolist(), best, folder / "spectra.png")
