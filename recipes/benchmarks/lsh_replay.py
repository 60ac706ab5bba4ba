"""Searches played again on a truth table: what each would have chosen, at what cost, without training anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lsh_runs import Run
from scipy.stats import spearmanr

from hf_prune.dynamics.distance import make_distance, with_loss
from hf_prune.dynamics.names import FITTED
from hf_prune.search.space import elimination_rounds

Candidate = TypeVar("Candidate")
# Share of the candidates that one seed searches; to the others embeddings are fitted.
JUDGED = 2 / 3
METRICS = {
    "loss": "early loss",
    "raw": "LS distance",
    "pca": "LS distance, 2 components",
    "autoencoder": "LS distance, auto-encoder",
    "both": "both",
}
# Epochs after which a search that looks once does so.
LOOKS = (1, 2, 3, 6, 9)


@dataclass(frozen=True)
class Outcome:
    """What one search led to: correlation of the first score with the final perplexity, regret, and its cost."""

    correlation: float
    regret: float
    epochs: int
    seconds: float


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
    the dense run up to the last round, and for a spectrum wherever it looks. Of the last two, each at its best epoch,
    the better is taken by the loss of the validation text.
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
    chosen = min(finalists, key=lambda own: _last(runs[own].validation_loss))
    return Outcome(rank_correlation(early, final), final[chosen] - min(final), epochs, seconds)


def look_once(metric: str, dense: Run, runs: list[Run], fitted: list[Run], seed: int, epoch: int) -> Outcome:
    """The cheapest search: each candidate for so many epochs, the one with the best score to the end.

    At equal cost: for what looking at the loss of all candidates takes, a metric of spectra, which pays for the dense
    run and for each spectrum, looks at the first of them only. The correlation is over all of them.
    """
    may_cost = sum(_cost(run, epoch, "loss") for run in runs)
    seconds = 0.0 if metric == "loss" else _cost(dense, epoch, metric)
    seen = 0
    while seen < len(runs) and (seen == 0 or seconds + _cost(runs[seen], epoch, metric) <= may_cost):
        seconds += _cost(runs[seen], epoch, metric)
        seen += 1
    early = scores(metric, dense, runs, fitted, epoch, seed)
    chosen = min(range(seen), key=lambda own: (early[own], own))
    last = len(dense.losses)
    epochs = epoch * (seen + (metric != "loss")) + last
    final = [run.perplexity for run in runs]
    seconds += _cost(runs[chosen], last, "loss")
    return Outcome(rank_correlation(early, final), final[chosen] - min(final), epochs, seconds)


def _cost(run: Run, epochs: int, metric: str) -> float:
    look = 0.0 if metric == "loss" else float(run.spectrum_seconds[epochs - 1])
    return float(run.seconds[:epochs].sum()) + look


def rank_correlation(early: list[float], final: list[float]) -> float:
    """Spearman's; NaN where all of one side are alike."""
    if min(len(set(early)), len(set(final))) < 2:
        return math.nan
    return float(spearmanr(early, [_last(own) for own in final]).statistic)


def judged(candidates: dict[str, Candidate], seed: int) -> tuple[list[Candidate], list[Candidate]]:
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
    """Looking once, early, at equal cost: a row for each epoch, regret and rank correlation by each metric."""
    titles = [METRICS[metric] for metric in metrics]
    lines = [f"| one look after | of all epochs | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    last = len(dense.losses)
    for epoch in (own for own in LOOKS if own < last):
        outcomes = replay(dense, candidates, seeds, metrics, look_once, epoch=epoch)
        cells = [
            f"{spread([one.regret for one in own], '.2f')}; {spread([one.correlation for one in own], '+.2f')}"
            for own in outcomes.values()
        ]
        lines.append(f"| {epoch} | {epoch / last:.0%} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Regret in perplexity; Spearman's correlation of the score with the perplexity."])


def spread(values: list[float], form: str) -> str:
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return "not finite"
    text = format(statistics.fmean(there), form)
    return text + (f" ± {format(statistics.stdev(there), form.lstrip('+'))}" if len(there) > 1 else "")
