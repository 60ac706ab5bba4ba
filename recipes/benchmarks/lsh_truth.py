"""The truth table of lsh.py: a dense twin and every candidate trained to the end once, looked at after every epoch.

    python recipes/benchmarks/lsh_truth.py --config recipes/benchmarks/lsh.yaml --truth FOLDER [--key value ...]

Keys are those of the recipe, as dataset_name and eval_dataset_name for local copies of the text. A run that is finished
is not trained again, so that the same command goes on after a cut; another recipe wants another FOLDER. Losses along
the way are of windows that are held out of the training text, as a search sees them; the final perplexity is of the
evaluation text. Seconds are the process's own processor time: they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lsh_replay import DENSE, Run, save_run

from hf_prune.cli.arguments import quiet_libraries
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
from hf_prune.recipe import parse_flags, read_recipe
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.candidates import Measurement
from hf_prune.search.space import label
from hf_prune.search.trained import TrainedCandidates


def trained(
    candidates: TrainedCandidates,
    evaluation: QualityEvaluation,
    config: DynamicSparseConfig | None,
    epochs: Collection[int],
) -> Run:
    """One training to the last of some epochs, looked at after each; the dense twin's where there is no config."""
    seen: list[Measurement] = []
    seconds: list[float] = []
    looked = []
    final = torch.empty(0)
    began = time.process_time()

    def look(epoch: int, model: Any) -> None:
        nonlocal began, final
        seconds.append(time.process_time() - began)
        start = time.process_time()
        seen.append(candidates.measured(epoch, model))
        looked.append(time.process_time() - start)
        if epoch == max(epochs):
            final = evaluation.measure(model.eval(), "final").nll.mean()
        began = time.process_time()

    candidates.train_to(config, epochs, look)
    spectra = [own.spectrum for own in seen if own.spectrum is not None]
    return Run(
        torch.tensor([own.loss for own in seen], dtype=torch.float64),
        torch.tensor(seconds),
        torch.tensor(looked),
        torch.stack(spectra) if spectra else torch.empty(len(seen), 0),
        final.reshape(1),
    )


def evaluation_of(candidates: TrainedCandidates) -> QualityEvaluation:
    """The text that nothing is chosen by."""
    start = candidates.loaded.start
    return QualityEvaluation(candidates.recipe.evaluation, start.tokenizer, start.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--truth", type=Path, required=True)
    given, others = parser.parse_known_args()
    quiet_libraries()
    candidates = TrainedCandidates(make_search_recipe(*read_recipe(given.config, parse_flags(others))))
    evaluation = evaluation_of(candidates)
    given.truth.mkdir(parents=True, exist_ok=True)
    choices = candidates.space.combinations()
    runs = {DENSE: None} | {
        label(own): candidates.config(own) for own in choices if label(own) not in candidates.space.refused
    }
    for name, config in runs.items():
        if not (given.truth / f"{name}.safetensors").is_file():
            run = trained(candidates, evaluation, config, range(1, candidates.max_budget + 1))
            save_run(given.truth, name, run)
            print(f"{name}: perplexity {run.perplexity:.2f}, {float(run.seconds.sum()):.0f} s", flush=True)


if __name__ == "__main__":
    main()
