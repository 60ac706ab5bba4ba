"""Searches played again on a truth table: every candidate trained to the end once, spectrum and loss at every epoch.

A run is one safetensors file: `losses` (of held-out windows, nats a token), `seconds` and `spectrum_seconds` [epochs],
`spectra` [epochs, exponents] in bits a step, and `final_loss` [1] on text that nothing is chosen by; the dense run is
`dense`. What a search would have chosen, at what cost, then follows without training anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from hf_prune.dynamics.distance import make_distance, with_loss
from hf_prune.dynamics.names import FITTED
from hf_prune.search.space import elimination_rounds

DENSE = "dense"
# Share of the candidates that one seed searches; to the others embeddings are fitted.
JUDGED = 2 / 3
METRICS = {
    "loss": "early loss",
    "raw": "LS distance",
    "pca": "LS distance, 2 components",
    "autoencoder": "LS distance, auto-encoder",
    "both": "both",
}
# Where a search that looks once does so.
LOOKS = (1, 2, 3, 6, 9)


@dataclass(frozen=True)
class Run:
    """One training: float64 [epochs] of losses, seconds and seconds of spectra; [epochs, exponents] of spectra; [1]."""

    losses: Tensor
    seconds: Tensor
    spectrum_seconds: Tensor
    spectra: Tensor
    final_loss: Tensor

    @property
    def perplexity(self) -> float:
        """After the last epoch, on text that nothing is chosen by."""
        return float(self.final_loss.exp())


@dataclass(frozen=True)
class Outcome:
    """What one search led to: correlation of the first score with the final perplexity, regret, and its cost."""

    correlation: float
    regret: float
    epochs: int
    seconds: float


def save_run(folder: Path, name: str, run: Run) -> None:
    """Complete or absent: a run that is there is finished."""
    partial = folder / f"{name}.tmp"
    save_file({key: value.double().clone() for key, value in vars(run).items()}, partial)
    partial.replace(folder / f"{name}.safetensors")


def load_run(folder: Path, name: str) -> Run:
    """What `save_run` left."""
    return Run(**load_file(folder / f"{name}.safetensors"))


def load_truth(folder: Path) -> tuple[Run, dict[str, Run]]:
    """The dense run and the candidates by name; of candidates that were trained alike, the first, as published.

    Other words need not mean another training: where each layer loses the same share of its weights, redistribution by
    what is left gives each its own back.
    """
    runs = {file.stem: load_run(folder, file.stem) for file in sorted(folder.glob("*.safetensors"))}
    dense = runs.pop(DENSE)
    different: dict[tuple[float, ...], str] = {}
    for name, run in runs.items():
        different.setdefault((*run.losses.tolist(), *run.final_loss.tolist()), name)
    return dense, {name: runs[name] for name in different.values()}


def figures(dense: Run, candidates: dict[str, Run]) -> dict[str, Any]:
    """The truth table as plain data, spectra as their raw distance to the dense one at each epoch."""

    def row(run: Run) -> dict[str, Any]:
        pairs = zip(dense.spectra, run.spectra, strict=True)
        return {
            "perplexity": round(run.perplexity, 4),
            "losses": [round(own, 5) for own in run.losses.tolist()],
            "distances": [round(float(torch.linalg.vector_norm(one - other)), 4) for one, other in pairs],
            "seconds": round(float(run.seconds.sum()), 1),
            "spectrum_seconds": round(float(run.spectrum_seconds.sum()), 1),
        }

    return {name: row(run) for name, run in {DENSE: dense, **candidates}.items()}


def scores(metric: str, dense: Run, runs: list[Run], fitted: list[Run], epoch: int, seed: int) -> list[float]:
    """A score for each run after so many epochs, smaller is better; what is not a number comes last."""
    place = epoch - 1
    losses = [float(run.losses[place]) for run in runs]
    if metric == "loss":
        return [_last(loss) for loss in losses]
    reference = dense.spectra[place]
    name = metric if metric in FITTED else "raw"
    others = torch.stack([run.spectra[place] for run in fitted]) if metric in FITTED else None
    measure = make_distance(name, others, seed)
    distances = [measure(reference, run.spectra[place]) for run in runs]
    if metric == "both":
        loss = float(dense.losses[place])
        distances = [with_loss(own, reference, mine, loss) for own, mine in zip(distances, losses, strict=True)]
    return [_last(own) for own in distances]


def _last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def play(
    metric: str, dense: Run, runs: list[Run], fitted: list[Run], seed: int, first: int = 3, step: int = 3
) -> Outcome:
    """One search over some runs: successive elimination by a metric, the last two trained to the end.

    Every round trains its candidates from the beginning, as published. A metric that looks at spectra also pays for
    the dense run up to the last round, and for a spectrum wherever it looks. Of the last two the better is taken by the
    loss of held-out windows.
    """
    last = len(dense.losses)
    early = scores(metric, dense, runs, fitted, first, seed)
    left, epochs, seconds, reached = list(range(len(runs))), 0, 0.0, first
    ranked = early
    for kept, budget in [(len(runs), first), *elimination_rounds(len(runs), first, step)]:
        budget = min(budget, last)
        left = sorted(left, key=lambda own: (ranked[own], own))[:kept]
        epochs += budget * len(left)
        seconds += sum(_cost(runs[own], budget, metric) for own in left)
        ranked = scores(metric, dense, runs, fitted, budget, seed)
        reached = max(reached, budget)
    finalists = sorted(left, key=lambda own: (ranked[own], own))[:2]
    epochs += last * len(finalists)
    seconds += sum(_cost(runs[own], last, "loss") for own in finalists)
    if metric != "loss":
        epochs += reached
        looked = {min(first + step * number, last) for number in range(len(runs))}
        seconds += float(dense.seconds[:reached].sum())
        seconds += sum(float(dense.spectrum_seconds[epoch - 1]) for epoch in looked if epoch <= reached)
    final = [run.perplexity for run in runs]
    chosen = min(finalists, key=lambda own: _last(float(runs[own].losses[-1])))
    return Outcome(_rank_correlation(early, final), final[chosen] - min(final), epochs, seconds)


def look_once(metric: str, dense: Run, runs: list[Run], fitted: list[Run], seed: int, epoch: int) -> Outcome:
    """The cheapest search: every candidate for so many epochs, the one with the best score to the end."""
    early = scores(metric, dense, runs, fitted, epoch, seed)
    chosen = min(range(len(runs)), key=lambda own: (early[own], own))
    epochs = epoch * len(runs) + len(dense.losses)
    seconds = sum(_cost(run, epoch, metric) for run in runs) + _cost(runs[chosen], len(dense.losses), "loss")
    if metric != "loss":
        epochs, seconds = epochs + epoch, seconds + _cost(dense, epoch, metric)
    final = [run.perplexity for run in runs]
    return Outcome(_rank_correlation(early, final), final[chosen] - min(final), epochs, seconds)


def _cost(run: Run, epochs: int, metric: str) -> float:
    look = 0.0 if metric == "loss" else float(run.spectrum_seconds[epochs - 1])
    return float(run.seconds[:epochs].sum()) + look


def _rank_correlation(early: list[float], final: list[float]) -> float:
    if min(len(set(early)), len(set(final))) < 2:
        return math.nan
    return float(spearmanr(early, [_last(own) for own in final]).statistic)


def judged(candidates: dict[str, Run], seed: int) -> tuple[list[Run], list[Run]]:
    """The candidates that a seed searches, and the others."""
    names = sorted(candidates)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    count = round(JUDGED * len(names))
    mine, others = ([candidates[names[place]] for place in part] for part in (order[:count], order[count:]))
    return mine, others


def replay(
    dense: Run,
    candidates: dict[str, Run],
    seeds: Iterable[int],
    metrics: Iterable[str] = METRICS,
    search: Callable[..., Outcome] = play,
    **keys: Any,
) -> dict[str, list[Outcome]]:
    """Every metric's outcomes of a search with some keys, one a seed, on the same candidates for all.

    A seed chooses the candidates that are searched; embeddings are fitted to the others, which no search judges.
    """
    outcomes: dict[str, list[Outcome]] = {metric: [] for metric in metrics}
    for seed in seeds:
        mine, others = judged(candidates, seed)
        for metric in outcomes:
            outcomes[metric].append(search(metric, dense, mine, others, seed, **keys))
    return outcomes


def to_markdown(outcomes: dict[str, list[Outcome]], dense: Run, candidates: dict[str, Run]) -> str:
    """A row for each metric, mean ± standard deviation over the seeds; below it what training everything costs."""
    lines = ["| chosen by | Spearman at epoch 3 | regret, perplexity | epochs | seconds |", "|---|---|---|---|---|"]
    for metric, own in outcomes.items():
        cells = [
            spread([outcome.correlation for outcome in own], "+.2f"),
            spread([outcome.regret for outcome in own], ".2f"),
            spread([float(outcome.epochs) for outcome in own], ".0f"),
            spread([outcome.seconds for outcome in own], ".0f"),
        ]
        lines.append(f"| {METRICS[metric]} | {' | '.join(cells)} |")
    count = round(JUDGED * len(candidates))
    everything = statistics.fmean(float(run.seconds.sum()) for run in candidates.values()) * count
    final = [run.perplexity for run in candidates.values()]
    seeds = len(next(iter(outcomes.values())))
    by_seed = [[run.perplexity for run in judged(candidates, seed)[0]] for seed in range(seeds)]
    chance = statistics.fmean(statistics.fmean(own) - min(own) for own in by_seed)
    note = (
        f"{count} of {len(candidates)} candidates a seed, {seeds} seeds. Training all of them to the end takes "
        f"{count * len(dense.losses)} epochs and {everything:.0f} seconds and has no regret; one taken by chance is "
        f"{chance:.2f} above the best of its seed's. Perplexity {min(final):.2f} to {max(final):.2f}, dense "
        f"{dense.perplexity:.2f}."
    )
    return "\n".join([*lines, "", note])


def looks_to_markdown(
    dense: Run, candidates: dict[str, Run], seeds: Iterable[int], metrics: Collection[str] = METRICS
) -> str:
    """What is lost by looking once, early: a row for each epoch, regret by each metric."""
    titles = [METRICS[metric] for metric in metrics]
    lines = [f"| one look after | of all epochs | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    last = len(dense.losses)
    for epoch in (own for own in LOOKS if own < last):
        outcomes = replay(dense, candidates, seeds, metrics, look_once, epoch=epoch)
        cells = [spread([outcome.regret for outcome in own], ".2f") for own in outcomes.values()]
        lines.append(f"| {epoch} | {epoch / last:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return "not finite"
    text = format(statistics.fmean(there), form)
    return text + (f" ± {format(statistics.stdev(there), form.lstrip('+'))}" if len(there) > 1 else "")
