"""One model in a process of its own, which measures it on demand (`python -m hf_prune.evaluation.efficiency_worker`).

It reads a line of JSON with the fields of `Worker`, then a command a line (a method's name), and answers each with a
line of JSON. `efficiency.py` is at the other end.
"""

import gc
import json
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_prune.evaluation.flops import count_flops, count_parameters
from hf_prune.evaluation.greedy import greedy_tokens
from hf_prune.evaluation.memory import PeakMemory
from hf_prune.models import AutoModelForCausalLM


@dataclass
class Worker:
    """The model at `path` on `device`; see `measure_efficiency` for the fields."""

    path: str
    revision: str | None
    dtype: str
    device: str
    trust_remote_code: bool
    threads: int
    prompt_length: int
    new_tokens: int
    model: PreTrainedModel = field(init=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)

    def load(self) -> dict[str, Any]:
        """Load the weights into this process's own memory, anew; seconds that took.

        from_pretrained may leave weights mapped to their file: not read yet, and not in this process's memory. The
        copy ends that, so that time and memory cover every byte.
        """
        self.__dict__.pop("model", None)  # the last one goes before the new one comes
        gc.collect()
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            self.path, revision=self.revision, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        for tensor in [*model.parameters(), *model.buffers()]:  # a tied one comes once and stays tied
            tensor.data = tensor.data.to(self.device, copy=True)
        self.model = model.eval()
        self.synchronize()
        return {"seconds": time.perf_counter() - start}

    def generate(self) -> dict[str, Any]:
        """Seconds of each of `new_tokens` greedy tokens after the prompt; the first is the prefill's."""
        tokens = greedy_tokens(self.model, self.prompt())
        seconds = []
        self.synchronize()
        start = time.perf_counter()
        for _ in islice(tokens, self.new_tokens):
            now = time.perf_counter()
            seconds.append(now - start)
            start = now
        return {"token_seconds": seconds}

    def warm_up(self) -> dict[str, Any]:
        """The first load and generation, slowed by imports and cold caches: measured for memory, not for time."""
        with PeakMemory(self.device) as peak:
            self.load()
            self.generate()
        return {"peak_memory_bytes": peak.bytes, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def count(self) -> dict[str, Any]:
        """Parameters, and FLOPs per token of a prefill."""
        parameters, nonzero_parameters = count_parameters(self.model)
        flops, nonzero_flops = count_flops(self.model, self.prompt())
        return {
            "parameters": parameters,
            "nonzero_parameters": nonzero_parameters,
            "flops_per_token": round(flops / self.prompt_length),
            "nonzero_flops_per_token": round(nonzero_flops / self.prompt_length),
        }

    def prompt(self) -> torch.Tensor:
        """Random tokens, the same for every model of this vocabulary: int64 [1, prompt_length]."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, self.prompt_length), generator=generator).to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if torch.device(self.device).type != "cpu":
            getattr(torch, torch.device(self.device).type).synchronize()


def main() -> None:
    """Answer commands until the other end closes the pipe. Whatever else is printed here goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    worker = Worker(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        try:
            answer = getattr(worker, line.strip())()
        except Exception as error:  # whatever it is, the other end turns it into its own
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
