"""LEGCNet carried over to a language model: units that do not cause a fine-tuning's errors go, at two sizes.

    python recipes/benchmarks/legcnet_units.py --config recipes/legcnet/smollm2_units.yaml --work_folder WORK \\
        --dataset_name WIKITEXT_TRAIN --eval_dataset_name WIKITEXT_TEST --readme recipes/benchmarks/LEGCNET.md

WIKITEXT_TRAIN and WIKITEXT_TEST are local copies or left out, which takes WikiText-2 from the Hub; the test is scored
as in the other tables, 32 windows of 1,024. The fine-tuning is recorded once, and a run that was cut goes on with the
same command.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.folder import RECIPE_FILE, REPORT_FILE
from hf_prune.cli.train import make_recipe
from hf_prune.legcnet.units import run_units
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.recipe import read_recipe
from hf_prune.report.findings import sizes
from hf_prune.training.causes import find_causes
from hf_prune.training.recorder import read_targets

SIZES = (0.1, 0.2)
TESTS: dict[str, dict[str, Any]] = {
    "chi-square, smallest p of 14 lags, as published": {},
    "F, smallest p of 14 lags": {"statistic": "F"},
    "F, smallest p of 14 lags, Benjamini-Hochberg": {"statistic": "F", "correction": "benjamini_hochberg"},
    "F, the lag of the lowest BIC": {"statistic": "F", "lag": "bic"},
    "F, 1 lag": {"statistic": "F", "max_lag": 1},
}
HUB, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--dataset_name", default=HUB)
    parser.add_argument("--eval_dataset_name", default=HUB)
    parser.add_argument("--readme", type=Path)
    given = parser.parse_args()
    reports = []
    for size in SIZES:
        folder = given.work_folder / f"units-{size}"
        own = {
            "sparsity": size,
            "output_dir": str(folder),
            "rounds_folder": str(given.work_folder / "units.rounds"),
            "dataset_name": given.dataset_name,
            "dataset_config": CONFIG if given.dataset_name == HUB else None,
            "eval_dataset_name": given.eval_dataset_name,
            "eval_dataset_config": CONFIG if given.eval_dataset_name == HUB else None,
            "eval_split": None,
            "eval_seq_length": 1024,
            "eval_max_windows": 32,
        }
        values, text = read_recipe(given.config, own)
        if not folder.is_dir() or (folder / RECIPE_FILE).read_text(encoding="utf-8") != text:
            run_units(make_recipe({**values, "overwrite_output_dir": True}, text))
        reports.append(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    config = make_recipe(*read_recipe(given.config, {})).method
    text = "\n\n".join([to_markdown(reports), other_tests(given.work_folder / "units.rounds" / "recording", config)])
    print(text)
    if given.readme:
        write_between_markers(given.readme, "legcnet_units", text)


def to_markdown(reports: list[dict[str, Any]]) -> str:
    """A line for each size, and what was watched below."""
    lines = [
        "| of the units | of the blocks' parameters | what stays | fine-tuned | LEGCNet | smallest norms | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, report in zip(SIZES, reports, strict=True):
        costs = report["legcnet"]["perplexities"]
        dense = report["evaluation"]["dense"]["perplexity"]
        figures = [f"{value:.2f}" for value in (dense, costs["legcnet"], costs["magnitude"], costs["random"])]
        removed = f"{report['structure']['removed']:.1%}"
        lines.append(f"| {size:.0%} gone | {removed} | {sizes(report)} | {' | '.join(figures)} |")
    own, seconds = reports[0]["legcnet"], reports[0]["legcnet"]["seconds"]
    lines += [
        "",
        f"Perplexity, nothing retrained behind the removal. {own['series']:,} units over {own['windows']} windows of "
        f"{reports[0]['training']['steps']} steps; {own['causal']:,} cause errors (p < 0.05), {own['untested']:,} "
        f"could not be tested. The recorded training took {seconds['recording']:.0f} s, exponents "
        f"{seconds['exponents']:.0f} s, tests {seconds['granger']:.0f} s.",
    ]
    return "\n".join(lines)


def other_tests(recording: Path, config: LEGCNetConfig) -> str:
    """How many units each test calls causal, and how its ranking agrees with the published one's."""
    lines = ["| test of the same recording | units with p < 0.05 | rank correlation with the first |", "|---|---|---|"]
    steps = max(step for step, _ in read_targets(recording))
    first = None
    for name, own in TESTS.items():
        causes = find_causes(recording, replace(config, sparsity=None, **own), steps)
        first = causes.p if first is None else first
        causal, every = int(((causes.p < config.alpha) & causes.tested).sum()), len(causes.p)
        lines.append(f"| {name} | {causal:,} ({causal / every:.1%}) | {spearmanr(causes.p, first).statistic:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
