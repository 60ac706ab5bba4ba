"""LEGCNet on scikit-learn's tables, beside magnitude and chance at the same count; five seeds.

    python recipes/benchmarks/legcnet.py --config recipes/benchmarks/legcnet.yaml --work_folder WORK \\
        --readme recipes/benchmarks/LEGCNET.md

Seconds to the benchmark hold everything: what was trained and recorded before the decision for LEGCNet and magnitude,
exponents and tests for LEGCNet, nothing for chance, and then the training of what is left until it is as good as the
benchmark. The dense training is the recorded one. A run that was cut, by --max_minutes too, goes on; the README gets
what is whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.folder import RECIPE_FILE
from hf_prune.cli.train import make_recipe
from hf_prune.legcnet.perceptron import LEGCNET_REPORT, run_legcnet
from hf_prune.recipe import read_recipe

TABLES: dict[str, dict[str, Any]] = {
    "breast_cancer": {"hidden_sizes": ["6"], "max_steps": 2250},
    "iris": {"hidden_sizes": ["6"], "max_steps": 2250},
    "wine": {"hidden_sizes": ["6"], "max_steps": 2250},
    "digits": {"hidden_sizes": ["50", "30"], "max_steps": 2250},
}
# The published decision over the whole training and over its beginning, and one that has to choose.
DECISIONS: dict[str, dict[str, Any]] = {
    "FT": {},
    "PT": {"variant": "pt", "recorded_share": 0.3, "window": 20, "max_lag": 10},
    "FT, 30 % go": {"sparsity": 0.3},
}

COLUMNS = (
    "table", "kept by", "connections", "FLOPs a row", "not testable", "accuracy %", "change", "loss change", "epochs",
    "seconds", "SHAP",
)  # fmt: skip
LAYERS = ("table", "kept by", "alpha", "moved in the first epoch", "in the middle one", "in the last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--tables", nargs="*", default=list(TABLES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--max_minutes", type=float, default=60)
    given = parser.parse_args()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    left = 0
    for seed in given.seeds:
        for table in given.tables:
            for name, decision in DECISIONS.items():
                words = name.replace(" ", "").replace("%", "").replace(",", "-")
                folder = given.work_folder / f"{table}-{words}-{seed}"
                # What decides on the same recording shares it.
                rounds = given.work_folder / f"{table}-{decision.get('variant', 'ft')}-{seed}.rounds"
                own = {**TABLES[table], **decision, "dataset_name": f"sklearn:{table}", "seed": seed}
                places = {"output_dir": str(folder), "rounds_folder": str(rounds)}
                values, text = read_recipe(given.config, {**own, **places})
                if folder.is_dir() and (folder / RECIPE_FILE).read_text(encoding="utf-8") != text:
                    raise SystemExit(f"{folder} is of another recipe; remove it and {rounds}")
                if not folder.is_dir():
                    if time.monotonic() - started > 60 * given.max_minutes:
                        left += 1
                        continue
                    run_legcnet(make_recipe(values, text))
                rows += rows_of(json.loads((folder / LEGCNET_REPORT).read_text()), table, name)
    text = to_markdown(rows)
    print(text)
    if left:
        print(f"{left} runs are left for another time: the same command goes on.")
    elif given.readme:
        write_between_markers(given.readme, "legcnet", text)


def rows_of(report: dict[str, Any], table: str, decision: str) -> list[dict[str, Any]]:
    """A row for the dense network and for each way to keep as many connections."""
    dense = report["rounds"][0]
    found = []
    for row in report["rounds"]:
        if row["kind"] == "dense" and decision != "FT":
            continue
        found.append(
            {
                "table": table,
                "row": "dense"
                if row["kind"] == "dense"
                else f"{decision}: {row['kind'].replace('legcnet', 'LEGCNet')}",
                "connections": row["connections"],
                "flops": row["flops"],
                "accuracy": 100 * row["accuracy"],
                "accuracy_change": 100 * (row["accuracy"] - dense["accuracy"]),
                "loss_change": row["loss"] - dense["loss"],
                "epochs": row["epochs_to_benchmark"],
                "seconds": row["seconds_to_benchmark"],
                "alphas": row["alphas"],
                "shap": row["shap_rank_correlation"],
                "moved": [own for own in row["moved"] if own],
                "untested": report["series"]["untested"] if row["kind"] == "legcnet" else None,
            }
        )
    return found


def by_layer(found: list[dict[str, float]], form: str) -> str:
    """Mean and standard deviation of what the seeds have of each layer, the layers in order."""
    layers = list(dict.fromkeys(layer for own in found for layer in own))
    return ", ".join(spread([own[layer] for own in found if layer in own], form) for layer in layers)


def spread(values: Iterable[float | None], form: str) -> str:
    """Mean and standard deviation of those that are there, and how many are not."""
    every = list(values)
    there = [value for value in every if value is not None]
    if not there:
        return "never"
    text = format(statistics.fmean(there), form)
    text += f" ± {format(statistics.stdev(there), form.lstrip('+'))}" if len(there) > 1 else ""
    return text + (f" ({len(every) - len(there)} never)" if len(there) < len(every) else "")


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The table, who won, and what became of each layer."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    layers = [f"| {' | '.join(LAYERS)} |", "|---" * len(LAYERS) + "|"]
    keys = list(dict.fromkeys((row["table"], row["row"]) for row in rows))
    means: dict[tuple[str, str], float] = {}
    for table, name in keys:
        own = [row for row in rows if (row["table"], row["row"]) == (table, name)]
        means[table, name] = statistics.fmean(row["accuracy"] for row in own)
        figures = [
            spread([row["connections"] for row in own], ".0f"), spread([row["flops"] for row in own], ".0f"),
            spread([row["untested"] for row in own], ".0f") if own[0]["untested"] is not None else "",
            spread([row["accuracy"] for row in own], ".1f"), spread([row["accuracy_change"] for row in own], "+.1f"),
            spread([row["loss_change"] for row in own], "+.3f"), spread([row["epochs"] for row in own], ".0f"),
            spread([row["seconds"] for row in own], ".1f"), spread([row["shap"] for row in own], ".2f"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join([table, name, *figures])} |")
        moved = [row["moved"] for row in own if row["moved"]]
        of_layers = [by_layer([row["alphas"] for row in own], ".1f")]
        for place in (0.0, 0.5, 1.0):
            of_layers.append(by_layer([epochs[round(place * (len(epochs) - 1))] for epochs in moved], ".3f"))
        layers.append(f"| {' | '.join([table, name, *of_layers])} |")
    lines.append("")
    for other in ("magnitude", "random"):
        own = [(key, (key[0], key[1].replace("LEGCNet", other))) for key in keys if "LEGCNet" in key[1]]
        better = sum(means[two] > means[one] for one, two in own)
        lines.append(f"Kept by {other}, as many are more accurate in {better} of {len(own)} cases.")
    return "\n".join([*lines, "", "Layer by layer:", "", *layers])


if __name__ == "__main__":
    main()
