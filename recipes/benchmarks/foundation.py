"""hf_prune beside llm-compressor on SmolLM2-135M-Instruct: perplexity, seconds and memory of one-shot pruning.

    python recipes/benchmarks/foundation.py --data FOLDER --peer_python PYTHON --work_folder FOLDER --readme README.md

FOLDER of --data holds c4/*.jsonl (the first documents of C4) and wikitext-2-raw/wiki.test.raw; PYTHON is that of an
environment with llm-compressor (see peers/llm_compressor.py). Both sides prune the same folder with the same token ids,
each run in a fresh process, one at a time and in turn; leave the machine alone meanwhile. Whatever is finished is kept
in the work folder, so a run that was cut off goes on where it was.
"""

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from foundation_tables import markdown, summarise, write_csv, write_readme
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune.data.builtin import resolve_model
from hf_prune.data.text import load_text
from hf_prune.data.windows import calibration_windows, evaluation_windows
from hf_prune.evaluation.perplexity import perplexity, window_nll

HERE = Path(__file__).resolve().parent
SCRIPTS = {"ours": HERE / "peers/ours.py", "peer": HERE / "peers/llm_compressor.py"}
SETTINGS = [(method, pattern) for method in ("sparsegpt", "wanda") for pattern in ("unstructured", "2:4")]
SPARSITY = 0.5
CALIBRATION = {"num_samples": 32, "seq_length": 512, "seed": 0}
EVALUATION = {"seq_length": 1024, "max_windows": 32}

logger = logging.getLogger("foundation")


class Results:
    """What is finished: {"runs": {setting/contestant: [report, ...]}, "quality": {digest of weights: figures}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}, "quality": {}}

    def runs(self, method: str, pattern: str, contestant: str) -> list[dict[str, Any]]:
        """Reports of the finished runs, oldest first; append to it and save."""
        return self.content["runs"].setdefault(f"{method}/{pattern}/{contestant}", [])

    def save(self) -> None:
        """Replace the file in one step."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def digest(folder: Path) -> str:
    """Of the folder's weights: equal runs are told apart from unequal ones, and each is evaluated once."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The dense model's folder and the file of the calibration token ids, made once."""
    model = Path(resolve_model("builtin:smollm2-135m-instruct").path)
    token_ids = arguments.work_folder / "token_ids.safetensors"
    if not token_ids.exists():
        text = load_text(str(next((arguments.data / "c4").glob("*.jsonl"))))
        windows = calibration_windows(text, AutoTokenizer.from_pretrained(model), **CALIBRATION)
        save_file({"input_ids": windows}, token_ids)
    return model, token_ids


def prune_in_turn(arguments: argparse.Namespace, results: Results, model: Path, token_ids: Path) -> None:
    """Run every contestant on every setting until each has its repeats."""
    pythons = {"ours": sys.executable, "peer": arguments.peer_python}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for repeat in range(arguments.repeats):
        for method, pattern in SETTINGS:
            # Who goes first changes from repeat to repeat.
            for contestant in arguments.contestants[:: -1 if repeat % 2 else 1]:
                runs = results.runs(method, pattern, contestant)
                if len(runs) > repeat:
                    continue
                output = pruned_folder(arguments, method, pattern, contestant)
                report, log = output.with_suffix(".json"), output.with_suffix(".log")
                command = [pythons[contestant], SCRIPTS[contestant], "--model", model, "--token_ids", token_ids]
                command += ["--method", method, "--pattern", pattern, "--sparsity", SPARSITY]
                command += ["--output", output, "--report", report]
                with log.open("w") as stream:
                    done = subprocess.run(list(map(str, command)), env=environment, stdout=stream, stderr=stream)
                if done.returncode:
                    ending = f"failed on {method} {pattern} (exit status {done.returncode}, negative: a signal)"
                    raise SystemExit(f"{contestant} {ending}; see {log}, then start again to go on.")
                runs.append(json.loads(report.read_text()) | {"weights": digest(output)})
                results.save()
                seconds, busy = runs[-1]["seconds"]["prune"], runs[-1]["busy_elsewhere"]["prune"]
                logger.info("%s %s %s: %.1f s, %.2f cores busy elsewhere", contestant, method, pattern, seconds, busy)


def pruned_folder(arguments: argparse.Namespace, method: str, pattern: str, contestant: str) -> Path:
    """Where a contestant saves a setting's model."""
    return arguments.work_folder / f"{method}-{pattern.replace(':', '_')}-{contestant}"


def evaluate(arguments: argparse.Namespace, results: Results, dense: Path) -> None:
    """Score the dense model and every pruned folder that has not been scored, all with hf_prune's evaluator."""
    text = load_text(str(arguments.data / "wikitext-2-raw/wiki.test.raw"))
    windows = evaluation_windows(text, AutoTokenizer.from_pretrained(dense), **EVALUATION).input_ids
    todo = {"dense": (dense, "unstructured", digest(dense))}
    for method, pattern in SETTINGS:
        for contestant in SCRIPTS:
            if runs := results.runs(method, pattern, contestant):
                folder = pruned_folder(arguments, method, pattern, contestant)
                todo[folder.name] = (folder, pattern, runs[-1]["weights"])
    results.content["dense"] = todo["dense"][2]
    for name, (folder, pattern, weights) in todo.items():
        if weights in results.content["quality"]:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        figures = {"perplexity": perplexity(window_nll(model, windows, description=name)), **zeros(model, pattern)}
        results.content["quality"][weights] = figures
        results.save()
        logger.info("%s: %s", name, figures)


def zeros(model: torch.nn.Module, pattern: str) -> dict[str, float]:
    """Share of zeros in the Linears inside the blocks, and the share of groups that break an n:m pattern."""
    linears = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    kept = [part.weight != 0 for name, part in linears.items() if not name.endswith("lm_head")]
    figures = {"sparsity": 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)}
    if pattern != "unstructured":
        most, group = map(int, pattern.split(":"))
        broken = [(mask.view(-1, group).sum(-1) > most).double().mean() for mask in kept]
        figures["broken_groups"] = torch.stack(broken).mean().item()
    return figures


def main() -> None:
    """Prepare, prune in turn, evaluate, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext-2-raw/")
    parser.add_argument("--peer_python", required=True, help="the Python that has llm-compressor")
    parser.add_argument("--work_folder", type=Path, required=True, help="keeps models and results; 5 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="who runs")
    parser.add_argument("--redo", nargs="+", choices=list(SCRIPTS), default=[], help="forget these finished runs first")
    parser.add_argument("--csv", type=Path, default=HERE / "results.csv")
    parser.add_argument("--readme", type=Path, help="README whose table is replaced")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.work_folder.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.work_folder / "results.json")
    for key in list(results.content["runs"]):
        if key.rsplit("/", 1)[1] in arguments.redo:
            del results.content["runs"][key]
    model, token_ids = prepare(arguments)
    prune_in_turn(arguments, results, model, token_ids)
    evaluate(arguments, results, model)
    rows = summarise(results.content["runs"], results.content["quality"])
    dense = results.content["quality"][results.content["dense"]]["perplexity"]
    conditions = (
        f"SmolLM2-135M-Instruct in float32 (dense perplexity {dense:.2f}). Calibration: {CALIBRATION['num_samples']} x "
        f"{CALIBRATION['seq_length']} tokens of C4, the same ids for both. Perplexity: WikiText-2 test, the first "
        f"{EVALUATION['max_windows']} windows of {EVALUATION['seq_length']} tokens, one evaluator for both."
    )
    table = markdown(rows, SETTINGS, conditions)
    write_csv(arguments.csv, rows)
    if arguments.readme:
        write_readme(arguments.readme, table)
    print(table)


if __name__ == "__main__":
    main()
