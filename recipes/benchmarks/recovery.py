"""What twenty minutes of training give back to a pruned model: LoRA, all parameters, distillation; zeros intact.

    python recipes/benchmarks/recovery.py --work_folder WORK --readme README.md \\
        --dataset_name C4_FOLDER --eval_dataset_name WIKITEXT_TEST

SmolLM2-135M-Instruct, sparse (60 %, the preset balanced) and narrower (20 % of the blocks' parameters, refit), each
pruned once and then trained on other windows of the same text. STEPS are what two CPU cores do in about 20 minutes; the
table says how long they really took. A run that was cut goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hf_prune.bench.summary import write_between_markers
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
    "all parameters": {"recovery": "full", "learning_rate": 2e-4},
    "all parameters, distilled": {"recovery": "full", "loss": "distillation", "learning_rate": 3e-4},
}
STEPS = {"LoRA, rank 16": 150, "all parameters": 150, "all parameters, distilled": 115}
TRAINING: dict[str, Any] = {
    "dtype": "float32", "seq_length": 512, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine",
    "warmup_steps": 10, "save_steps": 25, "logging_steps": 10, "eval_efficiency": False, "seed": 1,
}  # fmt: skip
EVALUATION = {"eval_seq_length": 1024, "eval_max_windows": 32, "eval_efficiency": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--eval_dataset_name", required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--max_minutes", type=float, default=75)
    given = parser.parse_args()
    texts = {"dataset_name": given.dataset_name, "eval_dataset_name": given.eval_dataset_name}
    started = time.monotonic()
    for model in given.models:
        pruned = given.work_folder / _slug(model)
        if not pruned.is_dir():
            own = {**MODELS[model], **texts, **EVALUATION, "num_calibration_samples": 32, "seq_length": 512}
            own |= {
                "model_name_or_path": "builtin:smollm2-135m-instruct",
                "dtype": "float32",
                "output_dir": str(pruned),
            }
            run(make_recipe(own))
        for kind in given.kinds:
            done = given.work_folder / f"{_slug(model)}-{_slug(kind)}"
            if not done.is_dir() and time.monotonic() - started < 60 * given.max_minutes:
                own = {**TRAINING, **EVALUATION, **texts, **KINDS[kind], "max_steps": STEPS[kind]}
                recover(str(pruned), make_train_recipe({**own, "output_dir": str(done)}, RecoveryConfig))
    table = _table(given.work_folder)
    print(table)
    if given.readme:
        write_between_markers(given.readme, "recovery", table)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _table(work_folder: Path) -> str:
    lines = ["| model | training | steps | seconds | perplexity before | after | gap closed | zeros |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for kind in KINDS:
            file = work_folder / f"{_slug(model)}-{_slug(kind)}" / "prune_report.json"
            if not file.is_file():
                continue
            report = json.loads(file.read_text())
            entry = report["recoveries"][-1]
            figures = [
                model, kind, f"{entry['training']['steps']}", f"{entry['training']['seconds']:.0f}",
                f"{entry['perplexity_before']:.2f}", f"{entry['perplexity_after']:.2f}", f"{entry['gap_closed']:.0%}",
                f"{report['sparsity']['achieved_pruned']:.2%}" if "sparsity" in report else "none",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(figures)} |")
            dense = report["evaluation"]["dense"]["perplexity"]
    if len(lines) > 2:
        lines += ["", f"The dense model's perplexity is {dense:.2f}; gap closed is of log-perplexity."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
