"""The truth table of lsh.py: a dense twin and every candidate trained to the end once, looked at after every epoch.

    python recipes/benchmarks/lsh_truth.py --config recipes/benchmarks/lsh.yaml --truth FOLDER [--validation TEXT] \
        [--part 0/2] [--key value ...]

Three texts: windows held out of the training text are what a search sees on the way, the validation text chooses the
epoch that is kept of each training, and the recipe's evaluation text, which nothing is chosen by, scores it. TEXT is a
local copy of the second; without it, it is the validation split of the evaluation's dataset. Other keys are those of
the recipe, as dataset_name and eval_dataset_name for local copies.

`--part 0/2` trains every second run from the first on, `--part 1/2` the others, side by side into one folder. A run
that is finished is not trained again, so that the same command goes on after a cut. The folder belongs to its recipe;
only the values that are searched may be others. Seconds are the process's own processor time.

`--stability 5`, once all are there: how far the order of the five that end best depends, at the search's first budget,
on how their spectra are computed. `--readme FILE` takes that table between its lines `benchmark:lsh-stability`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lsh_runs import DENSE, Run, claim, is_there, load_run, save_run

from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.files import tensor_digest
from hf_prune.cli.arguments import quiet_libraries
from hf_prune.errors import RunError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
from hf_prune.recipe import parse_flags, read_recipe
from hf_prune.search.arguments import MAY_CHANGE, make_search_recipe
from hf_prune.search.space import label
from hf_prune.search.stability import rank_stability
from hf_prune.search.trained import TrainedCandidates

# Windows of the validation text: as many tokens as the first 100 kB of WikiText-2's, in windows of 35.
VALIDATION_WINDOWS = 600


@dataclass(frozen=True)
class Texts:
    """int64 [windows, tokens]: what chooses an epoch, and what nothing is chosen by."""

    validation: torch.Tensor
    test: torch.Tensor

    @classmethod
    def of(cls, candidates: TrainedCandidates, validation: str | None) -> Texts:
        """Those of a recipe, the first in a local copy where there is one."""
        start, own = candidates.loaded.start, candidates.recipe.evaluation
        name, split = (validation, None) if validation else (own.eval_dataset_name, "validation")
        other = replace(own, eval_dataset_name=name, eval_split=split, eval_max_windows=VALIDATION_WINDOWS)
        if validation:
            other = replace(other, eval_dataset_config=None, eval_dataset_revision=None)
        texts = [QualityEvaluation(each, start.tokenizer, start.config).windows.input_ids for each in (other, own)]
        alike = min(len(text) for text in texts)
        if torch.equal(texts[0][:alike], texts[1][:alike]):
            raise SystemExit("--validation: it is the text that scores what is chosen; give another")
        return cls(*texts)


def identity(candidates: TrainedCandidates, texts: Texts, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """What decides how the runs of a table go, the searched values aside; the keys `left_out` do not count.

    Where a text lies says nothing of what it is: digests stand for them.
    """
    axes, own = candidates.space.axes, candidates.recipe
    sections = (candidates.search, own.model, own.fresh, own.method)
    settings = {key: value for section in sections for key, value in vars(section).items()}
    settings |= {**own.decisive["training"], "seed": own.text.seed}
    return {
        **{key: value for key, value in settings.items() if key not in {*MAY_CHANGE, *axes, *left_out}},
        "searched": sorted(axes),
        "training text": tensor_digest(candidates.loaded.windows.input_ids),
        "held-out text": tensor_digest(candidates.loaded.held_out),
        "validation text": tensor_digest(texts.validation),
        "test text": tensor_digest(texts.test),
    }


def trained(candidates: TrainedCandidates, texts: Texts, config: DynamicSparseConfig | None) -> Run:
    """One training, looked at after every epoch; the dense twin's where there is no config."""
    losses: list[float] = []
    validation_losses: list[float] = []
    seconds: list[float] = []
    spectra: list[torch.Tensor] = []
    spectrum_seconds: list[float] = []
    best: dict[str, torch.Tensor] = {}
    began = time.process_time()

    def look(epoch: int, model: Any) -> None:
        nonlocal began, best
        seconds.append(time.process_time() - began)
        losses.append(candidates.held_out_loss(model))
        validation_losses.append(float(window_nll(model, texts.validation).mean()))
        if validation_losses[-1] < min(validation_losses[:-1], default=float("inf")):
            best = {name: own.clone() for name, own in model.state_dict().items()}
        start = time.process_time()
        if candidates.search.needs_spectrum:
            spectra.append(candidates.spectrum(model, candidates.setting)[0])
        began = time.process_time()
        spectrum_seconds.append(began - start)

    candidates.train_to(config, range(1, candidates.max_budget + 1), look)
    if not best:
        raise RunError("no epoch has a finite loss on the validation text.")
    kept = candidates.loaded.start.make_model(None)
    kept.load_state_dict(best)
    return Run(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(validation_losses, dtype=torch.float64),
        torch.tensor(seconds),
        torch.tensor(spectrum_seconds),
        torch.stack(spectra) if spectra else torch.empty(len(losses), 0),
        window_nll(kept, texts.test).mean().reshape(1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--validation")
    parser.add_argument("--part", type=part, default=(0, 1))
    parser.add_argument("--stability", type=int, default=0)
    parser.add_argument("--readme", type=Path)
    given, others = parser.parse_known_args()
    quiet_libraries()
    candidates = TrainedCandidates(make_search_recipe(*read_recipe(given.config, parse_flags(others))))
    texts = Texts.of(candidates, given.validation)
    claim(given.truth, identity(candidates, texts))
    choices = candidates.space.combinations()
    runs = {DENSE: None} | {
        label(own): candidates.config(own) for own in choices if label(own) not in candidates.space.refused
    }
    number, parts = given.part
    failed = []
    for name, config in list(runs.items())[number::parts]:
        if is_there(given.truth, name):
            continue
        try:
            run = trained(candidates, texts, config)
        except (RunError, torch.linalg.LinAlgError) as error:
            print(f"{name}: {error}", flush=True)
            if name == DENSE:
                raise SystemExit("without the dense twin there is no table") from None
            failed.append(name)
            continue
        save_run(given.truth, name, run)
        took = float(run.seconds.sum())
        print(f"{name}: perplexity {run.perplexity:.2f} of epoch {run.best_epoch}, {took:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"not in the table: {'; '.join(failed)}")
    if given.stability:
        there = [own for own in choices if is_there(given.truth, label(own))]
        best = sorted(there, key=lambda own: load_run(given.truth, label(own)).perplexity)[: given.stability]
        table = stability_table(rank_stability(candidates, best, candidates.search.first_budget))
        print(table)
        if given.readme:
            write_between_markers(given.readme, "lsh-stability", table)


def stability_table(rows: list[dict[str, Any]]) -> str:
    """A line for each way to compute the spectra."""
    lines = ["| spectra | rank correlation with the search's | seconds a spectrum |", "|---|---|---|"]
    for row in rows:
        correlation = "" if row["correlation"] is None else f"{row['correlation']:+.2f}"
        lines.append(f"| {row['spectrum']} | {correlation} | {row['seconds']:.2f} |")
    return "\n".join([*lines, "", f"{rows[0]['candidates']} candidates; of each the raw distance to the dense twin."])


def part(text: str) -> tuple[int, int]:
    """`0/2` as numbers."""
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write 0/2 and 1/2")
    return int(number), int(parts)


if __name__ == "__main__":
    main()
