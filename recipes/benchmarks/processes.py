"""How pruning scales over processes and threads, and what keeping it resumable costs, on one machine with two cores.

    python recipes/benchmarks/processes.py --work_folder WORK --dataset_name C4_FOLDER

Writes PROCESSES.md beside this file. SmolLM2-135M-Instruct in float32, 32 x 512 calibration tokens, each way --repeats
times in turn, every run a process of its own; seconds are those of the pruning itself, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "model_name_or_path": "builtin:smollm2-135m-instruct", "dtype": "float32", "sparsity": 0.5,
    "num_calibration_samples": 32, "seq_length": 512, "eval_efficiency": False,
}  # fmt: skip
METHODS = ("sparsegpt", "balanced")
# Processes and threads in each.
WAYS = ((1, 1), (2, 1), (1, 2))
HEAD = """# Processes and threads

`python recipes/benchmarks/processes.py --work_folder WORK --dataset_name C4_FOLDER` on two CPU cores:
SmolLM2-135M-Instruct in float32, 50 %, 32 x 512 tokens of C4. Seconds to load and prune, medians over --repeats
({repeats} here); kept is what being able to go on behind a cut adds to the rest of them: fingerprints of all weights,
plan, state behind blocks. All of it is with offload: none; what keeping costs with disk or cpu is not measured.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    given.work_folder.mkdir(parents=True, exist_ok=True)
    reports: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for repeat in range(given.repeats):
        for method in METHODS:
            for processes, threads in WAYS:
                folder = given.work_folder / f"{method}-{processes}-{threads}-{repeat}"
                if not folder.is_dir():
                    prune(folder, {**RECIPE, "method": method, "dataset_name": given.dataset_name}, processes, threads)
                report = json.loads((folder / "prune_report.json").read_text(encoding="utf-8"))
                reports.setdefault((method, processes, threads), []).append(report)
    text = HEAD.format(repeats=given.repeats) + to_markdown(reports)
    print(text)
    Path(__file__).with_name("PROCESSES.md").write_text(text, encoding="utf-8")


def prune(folder: Path, recipe: dict[str, Any], processes: int, threads: int) -> None:
    """One run; of what it makes only the report stays."""
    flags = [f"--{key}={value}" for key, value in recipe.items()]
    flags += [f"--output_dir={folder}", f"--num_processes={processes}"]
    command = [sys.executable, "-m", "hf_prune", "prune", *flags]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)
    for part in folder.iterdir():
        if part.name != "prune_report.json":
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def to_markdown(reports: dict[tuple[str, int, int], list[dict[str, Any]]]) -> str:
    """A line for each way, beside one process with one thread."""
    lines = ["| method | processes | threads each | seconds | faster than 1 x 1 | kept |", "|---" * 6 + "|"]
    for (method, processes, threads), own in reports.items():
        seconds = {way: median_seconds(reports[method, *way]) for way in WAYS}
        kept = statistics.median(share_kept(report) for report in own)
        took = seconds[processes, threads]
        faster = seconds[1, 1] / took
        lines.append(f"| {method} | {processes} | {threads} | {took:.0f} | {faster:.2f}x | {kept:.1%} |")
    return "\n".join(lines) + "\n"


def share_kept(report: dict[str, Any]) -> float:
    """Seconds of keeping, of loading and pruning without them."""
    keeping = report["saving_seconds"] + report["claiming_seconds"]
    return keeping / (seconds_of(report) - keeping)


def median_seconds(reports: list[dict[str, Any]]) -> float:
    """To load and prune."""
    return statistics.median(seconds_of(report) for report in reports)


def seconds_of(report: dict[str, Any]) -> float:
    """To load and prune."""
    return report["seconds"]["load"] + report["seconds"]["prune"]


if __name__ == "__main__":
    main()
