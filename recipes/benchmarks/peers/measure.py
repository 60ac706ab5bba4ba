"""The command line and the measuring rule that every contestant of the benchmarks follows.

Standard library only: hf_prune and each peer import this file in their own environment, so that seconds and bytes mean
the same on both sides. Seconds are wall time of a phase. Memory is the process's own anonymous memory (RssAnon): the
plain resident figure also counts the pages of memory-mapped checkpoint files, which belong to the page cache.
Where torch works on a GPU, memory is the peak of its allocator there. Each phase also records how many cores other
processes kept busy meanwhile, so that a disturbed run can be told.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLING_INTERVAL = 0.02  # seconds between two readings of RssAnon


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """What the command lines of all contestants share: what to prune, with which tokens, and where the results go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--token_ids", type=Path, required=True, help='safetensors with "input_ids" [samples, length]')
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pruned model")
    parser.add_argument("--report", type=Path, required=True, help="JSON of seconds and peak memory by phase")
    return parser


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The one command line of all contestants that zero single weights."""
    parser = make_parser(description)
    parser.add_argument("--method", choices=("magnitude", "wanda", "sparsegpt"), required=True)
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or n:m: at most n of m inputs kept")
    return parser.parse_args()


def own_memory() -> int:
    """Anonymous resident memory of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon line: this measurement needs Linux 4.5 or newer.")


def held_memory() -> int:
    """Bytes that count: what torch has held at most on a GPU, once it works there, else this process's own memory."""
    torch = sys.modules.get("torch")
    # A module that is still being imported has not got everything.
    cuda = getattr(torch, "cuda", None)
    if getattr(cuda, "is_initialized", bool)():
        return int(cuda.max_memory_allocated())  # type: ignore[union-attr]
    return own_memory()


def clocks() -> tuple[float, float, float]:
    """Seconds now: wall clock, processor time of this process, and that of all others since boot (Linux)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # less idle and waiting for a disk
    own = time.process_time()
    return time.perf_counter(), own, busy / os.sysconf("SC_CLK_TCK") - own


class Measurement:
    """Seconds, peak own memory and cores busy elsewhere of named phases; "process" is the time since construction."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}
        self.busy_elsewhere: dict[str, float] = {}
        self.peaks: dict[str, int] = {"process": held_memory()}
        self._phase = "process"
        self._started = clocks()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._observe()
            time.sleep(SAMPLING_INTERVAL)

    def _observe(self) -> None:
        phase, memory = self._phase, held_memory()
        for name in {"process", phase}:
            self.peaks[name] = max(self.peaks.get(name, 0), memory)

    def _record(self, name: str, started: tuple[float, float, float]) -> None:
        wall, own, elsewhere = (now - then for now, then in zip(clocks(), started, strict=True))
        self.seconds[name] = wall
        self.processor_seconds[name] = own
        self.busy_elsewhere[name] = max(0.0, elsewhere / wall)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the enclosed lines as `name`."""
        started, self._phase = clocks(), name
        self._observe()
        try:
            yield
        finally:
            self._observe()
            self._record(name, started)
            self._phase = "process"

    def write(self, path: Path, **facts: object) -> None:
        """Write JSON: one mapping by phase for each of the measures, and the facts."""
        self._record("process", self._started)
        report = {
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "busy_elsewhere": self.busy_elsewhere,  # cores
            "peak_memory_bytes": self.peaks,
        }
        path.write_text(json.dumps(report | facts, indent=2) + "\n")
