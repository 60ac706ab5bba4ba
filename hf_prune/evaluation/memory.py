"""Peak memory of a stretch of code: the process's own anonymous memory, or the allocator's peak on a GPU."""

import re
import threading
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process: what it allocated itself, no mapped files. None where there is no /proc."""
    if not STATUS.exists():
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


class PeakMemory:
    """Context manager; `bytes` afterwards is the highest memory seen within, or None where it cannot be measured.

    On the CPU a thread samples the anonymous memory of the whole process (Python and libraries included) every few
    milliseconds; a shorter spike can slip through. On CUDA it is the allocator's peak, without the context.
    """

    def __init__(self, device: str | torch.device = "cpu", interval_seconds: float = 0.005) -> None:
        self.device = torch.device(device)
        self.interval_seconds = interval_seconds
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            # A device with a number is "invalid" to the allocator until something has been done on it.
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.finished = threading.Event()
            self.sampler = threading.Thread(target=self._sample, daemon=True)
            self.sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.finished.set()
            self.sampler.join()

    def _sample(self) -> None:
        last = False
        while not last:
            last = self.finished.wait(self.interval_seconds)
            seen = anonymous_bytes()
            self.bytes = seen if self.bytes is None or seen is None else max(self.bytes, seen)
            if seen is None:
                return
