"""What a model costs to keep and to run: memory, file size, time and operations, several models in one interleaved run.

Every model gets a process of its own, so that its memory is its own, and only one of them works at a time: the models
take turns in every repeat (A B A B ...), so that a machine that slows down slows all of them, and figures are medians.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.load import load_config, pick_device
from hf_prune.errors import BadInputError, RunError
from hf_prune.progress import progress

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def measure_efficiency(
    models: Mapping[str, str | Path],
    *,
    dtype: str = "auto",
    device: str = "auto",
    prompt_length: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    revisions: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure models side by side: batch 1, random prompt, greedy decoding with the cache.

    Args:
        models: name -> folder or Hub id. All must fit in memory at once; measure one at a time where they do not.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" ...
        prompt_length: tokens of the prompt, shortened where the models' context is too short for it.
        new_tokens: tokens generated, at least 2.
        repeats: timed loads and timed generations per model, after one of each that is not timed.
        revisions: name -> branch, tag or commit, for Hub ids.
        trust_remote_code: run code from the model's repository.

    Returns:
        {"device", "dtype", "prompt_length", "new_tokens", "repeats", and for each name:}

        - parameters, nonzero_parameters: a tied parameter counts once.
        - file_bytes: of the safetensors files; None where there are none.
        - load_seconds: median; from files in the page cache into the process's or the device's own memory.
        - peak_memory_bytes: of loading and generating; anonymous memory of a process that does nothing else (Python
          and libraries included) on a CPU, the allocator's peak on CUDA; None where neither can be read.
        - flops_per_token, nonzero_flops_per_token: of a prefill; the latter is theoretical, see `flops.py`.
        - time_to_first_token_seconds: median; prefill and choice of the first token.
        - prefill_tokens_per_second: prompt length over that.
        - decode_tokens_per_second: median over repeats, first token excluded.
        - decode_latency_p50_seconds, decode_latency_p95_seconds: of single tokens, pooled over repeats.

    Raises:
        BadInputError: impossible lengths, a device that is not there, a model that is not found or damaged.
        RunError: a model could not be loaded or run.
    """
    if new_tokens < 2 or repeats < 1:
        raise BadInputError(
            f"measuring decoding needs new_tokens >= 2 and repeats >= 1, got {new_tokens} and {repeats}."
        )
    revisions = revisions or {}
    device = str(pick_device(device))
    prompt_length = min(prompt_length, shortest_context(models, revisions, trust_remote_code) - new_tokens)
    if prompt_length < 1:
        raise BadInputError(f"new_tokens: {new_tokens} new tokens leave no room for a prompt in the model's context.")
    options = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "threads": torch.get_num_threads(),
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
    }
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(WorkerProcess(name, path=str(path), revision=revisions.get(name), **options))
            for name, path in models.items()
        }
        turns = [*["warm_up"], *["load"] * repeats, *["generate"] * repeats, *["count"]]
        answers: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in models}
        for command in progress(turns, "efficiency", total=len(turns)):
            for name, worker in workers.items():
                answers[name].setdefault(command, []).append(worker.ask(command))
    threads = torch.get_num_threads()
    kind = f"{device}, {threads} thread{'s' * (threads != 1)}" if device == "cpu" else gpu_name(device)
    dtypes = sorted({answer["warm_up"][0]["dtype"] for answer in answers.values()})
    measured = {
        name: summarize(answer, prompt_length, file_bytes(models[name], revisions.get(name)))
        for name, answer in answers.items()
    }
    return {
        "device": kind,
        "dtype": ", ".join(dtypes),
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "repeats": repeats,
        **measured,
    }


def summarize(answer: dict[str, list[dict[str, Any]]], prompt_length: int, size: int | None) -> dict[str, Any]:
    """Medians and percentiles of one model's answers, command -> one answer per turn."""
    first_seconds = statistics.median(turn["token_seconds"][0] for turn in answer["generate"])
    steps = np.array([turn["token_seconds"][1:] for turn in answer["generate"]])  # [repeats, new_tokens - 1]
    p50, p95 = np.percentile(steps, [50, 95])
    return {
        **answer["count"][0],
        "file_bytes": size,
        "load_seconds": statistics.median(turn["seconds"] for turn in answer["load"]),
        "peak_memory_bytes": answer["warm_up"][0]["peak_memory_bytes"],
        "prefill_tokens_per_second": prompt_length / first_seconds,
        "time_to_first_token_seconds": first_seconds,
        "decode_tokens_per_second": float(np.median(1 / steps.mean(axis=1))),
        "decode_latency_p50_seconds": float(p50),
        "decode_latency_p95_seconds": float(p95),
    }


def shortest_context(models: Mapping[str, str | Path], revisions: Mapping[str, str], trust_remote_code: bool) -> int:
    """The number of positions that all the models can read."""
    configs = [
        load_config(str(path), ModelArguments(trust_remote_code=trust_remote_code), revisions.get(name))
        for name, path in models.items()
    ]
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize for config in configs)


def file_bytes(path: str | Path, revision: str | None = None) -> int | None:
    """Bytes of the safetensors files of a folder or of a Hub id's cached snapshot; None where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(str(path), revision=revision, allow_patterns="*.safetensors", local_files_only=True)
        )
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None


def gpu_name(device: str) -> str:
    """The accelerator's product name where torch knows it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


class WorkerProcess:
    """The parent's end of `efficiency_worker.py`: a context manager that starts it, asks it and ends it."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        # The child must find this package however the parent did.
        search_path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_prune.evaluation.efficiency_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search_path},
        )
        self._say(json.dumps(options))

    def ask(self, command: str) -> dict[str, Any]:
        """Have the worker run one of its methods and return its answer."""
        self._say(command)
        line = self.process.stdout.readline()  # type: ignore[union-attr]  # it is a pipe
        if not line:
            raise RunError(
                f"the process measuring the efficiency of the {self.name} model ended at {command!r} with exit code"
                f" {self.process.wait()} (-9 means that the memory ran out);"
                f" set eval_efficiency to false, or use a larger machine."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(
                f"measuring the efficiency of the {self.name} model failed at {command!r}: {answer['error']}"
            )
        return answer

    def _say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has died: ask() finds out and says so
            print(line, file=self.process.stdin, flush=True)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the pipe, at which the worker ends; a worker in the middle of something is stopped."""
        if error is not None:
            self.process.kill()
        self.process.communicate()
