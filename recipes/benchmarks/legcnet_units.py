"""LEGCNet carried over to a language model: units that do not cause a fine-tuning's errors go, at two sizes.

    python recipes/benchmarks/legcnet_units.py --config recipes/legcnet/smollm2_units.yaml --work_folder WORK \\
        --readme recipes/benchmarks/LEGCNET.md

The fine-tuning is recorded once. A run that was cut goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.folder import REPORT_FILE
from hf_prune.cli.train import make_recipe
from hf_prune.legcnet_units import run_units
from hf_prune.recipe import read_recipe
from hf_prune.report.findings import sizes

SIZES = (0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    given = parser.parse_args()
    reports = []
    for size in SIZES:
        folder = given.work_folder / f"units-{size}"
        own = {"sparsity": size, "output_dir": str(folder), "rounds_folder": str(given.work_folder / "units.rounds")}
        if not folder.is_dir():
            values, text = read_recipe(given.config, own)
            run_units(make_recipe(values, text))
        reports.append(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    text = to_markdown(reports)
    print(text)
    if given.readme:
        write_between_markers(given.readme, "legcnet_units", text)


def to_markdown(reports: list[dict[str, Any]]) -> str:
    """A line for each size, and what was watched below."""
    lines = [
        "| of the blocks' parameters | what stays | fine-tuned | LEGCNet | smallest norms | chance |",
        "|---|---|---|---|---|---|",
    ]
    for size, report in zip(SIZES, reports, strict=True):
        costs = report["legcnet"]["perplexities"]
        dense = report["evaluation"]["dense"]["perplexity"]
        figures = [f"{value:.2f}" for value in (dense, costs["legcnet"], costs["magnitude"], costs["random"])]
        lines.append(f"| {size:.0%} gone | {sizes(report)} | {' | '.join(figures)} |")
    own, seconds = reports[0]["legcnet"], reports[0]["legcnet"]["seconds"]
    lines += [
        "",
        f"Perplexity, nothing retrained behind the removal. {own['series']:,} units over {own['windows']} windows of "
        f"{reports[0]['training']['steps']} steps; {own['causal']:,} cause errors (p < 0.05), {own['untested']:,} "
        f"could not be tested. The recorded training took {seconds['recording']:.0f} s, exponents "
        f"{seconds['exponents']:.0f} s, tests {seconds['granger']:.0f} s.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
