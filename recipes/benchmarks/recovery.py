"""What ten minutes of training give back to a pruned model, and twenty: LoRA, all parameters, distillation.

    python recipes/benchmarks/recovery.py --work_folder WORK --results recipes/benchmarks/recovery.json \\
        --readme README.md --dataset_name C4_FOLDER --eval_dataset_name WIKITEXT_TEST

SmolLM2-135M-Instruct, sparse (60 %, the preset balanced) and narrower (20 % of the blocks' parameters, refit), each
pruned once and then trained on windows of the same text. STEPS are what two CPU cores with AMX do in about ten minutes,
and in twenty; the table says how long they really took. A run that was cut goes on with the same command, on another
day as well: what is finished stands in recovery.json, and a training that was cut goes on from its last checkpoint.
`--seeds 1 2 3` takes as many sessions of `--max_minutes` as it needs, a seed after the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.files import write_whole
from hf_prune.checkpoint.folder import REPORT_FILE
from hf_prune.pipeline import run
from hf_prune.recipe import make_recipe
from hf_prune.recovery import recover
from hf_prune.training.arguments import make_train_recipe
from hf_prune.training.recovery import RecoveryConfig

MODELS: dict[str, dict[str, Any]] = {
    "60 % zeros (balanced)": {"method": "balanced", "sparsity": 0.6},
    "20 % smaller (refit, Wanda)": {
        "method": "intra_fusion",
        "fusion": "refit",
        "importance": "wanda",
        "sparsity": 0.2,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA, rank 16": {"recovery": "lora", "learning_rate": 1e-3},
    "LoRA, twice as long": {"recovery": "lora", "learning_rate": 1e-3},
    "all parameters": {"recovery": "full", "learning_rate": 2e-4},
    "all parameters, distilled": {"recovery": "full", "loss": "distillation", "learning_rate": 3e-4},
}
STEPS = {"LoRA, rank 16": 250, "LoRA, twice as long": 500, "all parameters": 250, "all parameters, distilled": 200}
# Weights and states stay float32; products are bfloat16, which CPUs with AMX do faster.
TRAINING: dict[str, Any] = {
    "dtype": "float32", "bf16": True, "seq_length": 512, "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine", "warmup_steps": 10, "save_steps": 25, "logging_steps": 10, "eval_efficiency": False,
}  # fmt: skip
PRUNING: dict[str, Any] = {
    "model_name_or_path": "builtin:smollm2-135m-instruct", "dtype": "float32", "num_calibration_samples": 32,
    "seq_length": 512,
}  # fmt: skip
EVALUATION = {"eval_seq_length": 1024, "eval_max_windows": 32, "eval_efficiency": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--eval_dataset_name", required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1])
    parser.add_argument("--max_minutes", type=float, default=75)
    given = parser.parse_args()
    texts = {"dataset_name": given.dataset_name, "eval_dataset_name": given.eval_dataset_name}
    started, longest = time.monotonic(), 0.0
    finished = json.loads(given.results.read_text()) if given.results.exists() else []
    for seed, model, kind in product(given.seeds, given.models, given.kinds):
        if any((own["model"], own["kind"], own["seed"]) == (model, kind, seed) for own in finished):
            continue
        began = time.monotonic()
        # One in any case, and others as long as one like the longest fits.
        if began - started + longest > 60 * given.max_minutes:
            break
        pruned, done = given.work_folder / _slug(model), given.work_folder / f"{_slug(model)}-{_slug(kind)}-{seed}"
        if not pruned.is_dir():
            own = {**PRUNING, **MODELS[model], **texts, **EVALUATION}
            run(make_recipe({**own, "output_dir": str(pruned)}))
        own = {**TRAINING, **EVALUATION, **texts, **KINDS[kind], "max_steps": STEPS[kind], "seed": seed}
        # There already where it was finished and cut before it was noted.
        if not (done.is_dir() and _report(done)["recoveries"][-1]["training"]["steps"] == STEPS[kind]):
            shutil.rmtree(done, ignore_errors=True)
            recover(str(pruned), make_train_recipe({**own, "output_dir": str(done)}, RecoveryConfig))
        report = _report(done)
        finished.append({"model": model, "kind": kind, "seed": seed, **_figures(report)})
        write_whole(given.results, json.dumps(finished, indent=1) + "\n")
        shutil.rmtree(done)
        longest = max(longest, time.monotonic() - began)
    table = _table(finished)
    print(table)
    if given.readme:
        write_between_markers(given.readme, "recovery", table)


def _report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text())
    return report


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    entry = report["recoveries"][-1]
    return {
        "steps": entry["training"]["steps"],
        "seconds": entry["training"]["seconds"],
        "dense": report["evaluation"]["dense"]["perplexity"],
        "before": entry["perplexity_before"],
        "after": entry["perplexity_after"],
        "gap_closed": entry["gap_closed"],
        "zeros": report["sparsity"]["achieved_pruned"] if "sparsity" in report else None,
    }


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _table(finished: list[dict[str, Any]]) -> str:
    """A line for each model and kind: means over seeds, and half the range of what was closed."""
    lines = ["| model | training | steps | seconds | perplexity before | after | gap closed | zeros |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model, kind in product(MODELS, KINDS):
        runs = [own for own in finished if (own["model"], own["kind"]) == (model, kind)]
        if not runs:
            continue
        closed = [own["gap_closed"] for own in runs if own["gap_closed"] is not None]
        spread = f" ± {(max(closed) - min(closed)) / 2:.1%}, {len(closed)} seeds" if len(closed) > 1 else ""
        figures = [
            model,
            kind,
            f"{runs[0]['steps']}",
            f"{median(own['seconds'] for own in runs):.0f}",
            f"{runs[0]['before']:.2f}",
            f"{mean(own['after'] for own in runs):.2f}",
            f"{mean(closed):.0%}{spread}" if closed else "there was none",
            "none" if runs[0]["zeros"] is None else f"{min(own['zeros'] for own in runs):.2%}",
        ]
        lines.append(f"| {' | '.join(figures)} |")
    if finished:
        lines += ["", f"The dense model's perplexity is {finished[0]['dense']:.2f}; gap closed is of log-perplexity."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
