"""What tells early which way to prune a transformer once: every candidate pruned for good, and by its first blocks.

    python recipes/benchmarks/lsh_one_shot.py --config recipes/benchmarks/lsh_one_shot.yaml --truth FOLDER \
        [--part 0/2] [--readme recipes/benchmarks/LSH.md] [--json FILE] [--key value ...]

A look prunes the first block, or the first three, with few windows and takes what a search could be guided by: loss
on windows held out of the calibration text, the error of what the last of these blocks hands on, and the distance of
the depth spectrum to the dense model's. The truth is the perplexity of the whole model, pruned with all windows. A
candidate that is finished is not pruned again; `--part 0/2` and `--part 1/2` share them between two processes.
Seconds are processor time: of a look with what it measures (loss and error are of one pass, and the dense model's
spectrum is counted), of the truth the pruning alone. An allocation sees the blocks that are pruned, in a look the
first ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lsh_replay import judged, rank_correlation, spread
from lsh_runs import claim
from lsh_truth import part

from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.files import tensor_digest
from hf_prune.cli.arguments import quiet_libraries
from hf_prune.dynamics.distance import with_loss
from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.recipe import parse_flags, read_recipe
from hf_prune.search.arguments import MAY_CHANGE, make_search_recipe
from hf_prune.search.candidates import Measurement, OneShotCandidates
from hf_prune.search.space import Choice, label

# First blocks that a look prunes.
LOOKS = (1, 3)
DENSE = "dense"
SPECTRAL = ("distance", "both")
METRICS = {"loss": "loss", "layer_error": "layer error", "distance": "LS distance", "both": "both"}


class Truth:
    """The candidates of a recipe, what is looked at, and the text that scores them."""

    def __init__(self, candidates: OneShotCandidates) -> None:
        self.candidates = candidates
        start = candidates.loaded
        self.test = QualityEvaluation(
            candidates.recipe.evaluation, start.tokenizer, start.model.config
        ).windows.input_ids
        self.search = candidates.search
        self.budget = self.search.first_budget
        self.dense: dict[int, Measurement] = {}
        self.dense_seconds: dict[int, float] = {}
        for blocks in LOOKS:
            began = time.process_time()
            self.dense[blocks] = self._of(blocks).dense([self.budget])[self.budget]
            self.dense_seconds[blocks] = time.process_time() - began

    def _of(self, blocks: int, objective: str = "both") -> OneShotCandidates:
        self.candidates.search = replace(self.search, search_blocks=blocks, objective=objective)
        return self.candidates

    def row(self, choice: Choice | None) -> dict[str, Any]:
        """Everything about a candidate, as plain data; of the dense model without one."""
        found: dict[str, Any] = {}
        if choice is None:
            self.candidates.loaded.restore()
            found = {str(blocks): {"seconds": own} for blocks, own in self.dense_seconds.items()}
        else:
            for blocks in LOOKS:
                found[str(blocks)] = self._look(choice, blocks)
        began = time.process_time()
        if choice is not None:
            self.candidates.prune(choice, self.candidates.max_budget)
        took = time.process_time() - began
        nll = float(window_nll(self.candidates.loaded.model, self.test).mean())
        return {**found, "perplexity": math.exp(nll), "seconds": took}

    def _look(self, choice: Choice, blocks: int) -> dict[str, Any]:
        began = time.process_time()
        seen: list[Measurement] = []
        own = self._of(blocks, "loss")
        own.measure(choice, [self.budget], lambda budget, found: seen.append(found))
        looked = time.process_time()
        spectrum, _ = own.spectrum(own.setting, blocks)
        dense = self.dense[blocks]
        assert dense.spectrum is not None
        distance = float(torch.linalg.vector_norm(spectrum - dense.spectrum))
        return {
            "loss": seen[0].loss,
            "layer_error": seen[0].layer_error,
            "distance": distance,
            "both": with_loss(distance, dense.spectrum, seen[0].loss, dense.loss),
            "seconds": looked - began,
            "spectrum_seconds": time.process_time() - looked,
        }

    def identity(self) -> dict[str, Any]:
        """What decides the rows of a table."""
        own = self.candidates
        settings = {**vars(self.search), **{key: value for key, value in own.common.items() if "dataset" not in key}}
        return {
            **{key: value for key, value in settings.items() if key not in MAY_CHANGE},
            **own.optional,
            "calibration text": tensor_digest(own.loaded.calibration),
            "held-out text": tensor_digest(own.loaded.held_out),
            "test text": tensor_digest(self.test),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--part", type=part, default=(0, 1))
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--json", type=Path)
    given, others = parser.parse_known_args()
    quiet_libraries()
    truth = Truth(OneShotCandidates(make_search_recipe(*read_recipe(given.config, parse_flags(others)))))
    claim(given.truth, truth.identity())
    space = truth.candidates.space
    choices = [own for own in space.combinations() if label(own) not in space.refused]
    number, parts = given.part
    named = [(DENSE, None), *((label(own), own) for own in choices)]
    for name, choice in named[number::parts]:
        file = given.truth / f"{name}.json"
        if file.is_file():
            continue
        try:
            row = truth.row(choice)
            said = f"perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s"
        except (BadInputError, RunError, torch.linalg.LinAlgError) as error:
            row, said = {"failed": str(error)}, str(error)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(row), encoding="utf-8")
        partial.replace(file)
        print(f"{name}: {said}", flush=True)
    rows = {name: json.loads(file.read_text()) for name, _ in named if (file := given.truth / f"{name}.json").is_file()}
    if len(rows) < len(named):
        print(f"{len(rows)} of {len(named)} are there; the table wants all.")
        return
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = to_markdown({name: row for name, row in rows.items() if "failed" not in row})
    print(table)
    if given.readme:
        write_between_markers(given.readme, "lsh-one-shot", table)


def to_markdown(rows: dict[str, dict[str, Any]], seeds: int = 20) -> str:
    """A row for each metric and number of blocks: correlation and regret on two thirds of the candidates a seed.

    Candidates that are one and the same in the end, to the last bit, count once.
    """
    same = {rows[name]["perplexity"]: name for name in sorted(rows, reverse=True) if name != DENSE}
    names = sorted(same.values())
    own = {name: rows[name] for name in names}
    everything = sum(row["seconds"] for row in own.values())
    lines = ["| chosen by | first blocks | Spearman | regret, perplexity | of all seconds |", "|---|---|---|---|---|"]
    samples = [judged({name: name for name in names}, seed)[0] for seed in range(seeds)]
    for blocks in LOOKS:
        for metric, title in METRICS.items():
            scores = {name: _last(row[str(blocks)][metric]) for name, row in own.items()}
            figures = [_judge(scores, own, sample) for sample in samples]
            took = sum(_cost(row[str(blocks)], metric) for row in own.values())
            took += rows[DENSE][str(blocks)]["seconds"] if metric in SPECTRAL else 0
            lines.append(
                f"| {title} | {blocks} | {spread([one for one, _ in figures], '+.2f')} | "
                f"{spread([other for _, other in figures], '.2f')} | {took / everything:.0%} |"
            )
    final = [row["perplexity"] for row in own.values()]
    best = [[own[name]["perplexity"] for name in sample] for sample in samples]
    chance = statistics.fmean(statistics.fmean(some) - min(some) for some in best)
    return "\n".join([
        *lines,
        "",
        f"{len(samples[0])} of {len(names)} candidates that differ a seed, {seeds} seeds. Pruning all {len(names)} for "
        f"good takes {everything:.0f} seconds; one taken by chance is {chance:.2f} above the best of its seed's. "
        f"Perplexity {min(final):.2f} ({same[min(final)]}) to {max(final):.2f}, dense {rows[DENSE]['perplexity']:.2f}.",
    ])  # fmt: skip


def _judge(scores: dict[str, float], rows: dict[str, dict[str, Any]], sample: list[str]) -> tuple[float, float]:
    """Spearman's correlation of the scores with the perplexities, and the regret of the best score."""
    final = [rows[name]["perplexity"] for name in sample]
    early = [scores[name] for name in sample]
    chosen = min(sample, key=lambda name: (scores[name], name))
    return rank_correlation(early, final), rows[chosen]["perplexity"] - min(final)


def _cost(look: dict[str, Any], metric: str) -> float:
    """Seconds of a look; only what needs the spectrum pays for it."""
    return look["seconds"] + (look["spectrum_seconds"] if metric in SPECTRAL else 0)


def _last(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


if __name__ == "__main__":
    main()
