"""Runs in real processes of a fork server, which has paid for the imports, and what cuts them at a chosen moment."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hf_prune import cli

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hf_prune.pipeline", "datasets", "rich.console", "tiny", "cut_runs"])

# A run of a second that keeps its place behind every block.
RECIPE = {
    "method": "sparsegpt", "sparsity": 0.5, "allocation": "fisher", "output_importance": "fisher",
    "num_calibration_samples": 40, "seq_length": 64, "eval_seq_length": 64, "eval_max_windows": 4,
    "eval_efficiency": False, "checkpoint_every": 1,
}  # fmt: skip

# Exit codes.
KILLED, TOO_LARGE, STOPPED = -signal.SIGKILL, -signal.SIGXFSZ, 75

# Fewer bytes than a block of the tiny models has.
HALF = 10_000


@dataclass(frozen=True)
class Cut:
    """The moment before an event of Python's audit hooks, and what happens then.

    Attributes:
        event: `os.rename` (to the name), `open`, `os.remove`, `os.link` (of the name).
        name: how the file's name begins.
        count: the how-manieth of these events, from 1.
        action: `kill`; `term`, SIGTERM; `dawn`, nothing until the clock on the wall shows 06; `half`, the kernel ends
            the process inside the next write past `HALF` bytes; `fill`, a file `filler` beside the file's folder takes
            all that the disk has left; `flip`, one bit of `victim` is another.
        rank: of the process that it happens to.
        victim: a file and the place of a byte in it.
    """

    event: str
    name: str
    count: int = 1
    action: str = "kill"
    rank: int = 0
    victim: tuple[Path, int] | None = None

    def install(self) -> None:
        """From now on in this process."""
        seen = 0

        def look(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event != self.event:
                return
            path = arguments[1] if event == "os.rename" else arguments[0]
            if not isinstance(path, (str, os.PathLike)) or not Path(path).name.startswith(self.name):
                return
            seen += 1
            if seen != self.count:
                return
            if self.action == "fill":
                filler = Path(path).parent.parent / "filler"
                with suppress(OSError), filler.open("wb", buffering=0) as stream:
                    while True:
                        stream.write(bytes(4096))
            elif self.action == "flip":
                flip(*self.victim)
            elif self.action == "half":
                # Python ignores it otherwise, and write() says that the file is too large.
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, resource.RLIM_INFINITY))
            elif self.action == "dawn":
                while time.localtime().tm_hour != 6:
                    time.sleep(0.1)
            else:
                os.kill(os.getpid(), signal.SIGTERM if self.action == "term" else signal.SIGKILL)

        sys.addaudithook(look)


def kill_behind(run: subprocess.Popen, folder: Path, pattern: str) -> None:
    """Kill a run and all that it has started, as soon as a file of such a name is in the folder."""
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started = psutil.Process(run.pid)
    for process in [*started.children(recursive=True), started]:
        process.kill()
    run.wait()


def flip(file: Path, place: int) -> None:
    """Turn one bit of a byte into its opposite, in place; twice is not at all."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def place_of(file: Path, name: str) -> int:
    """Where the first byte of a tensor is in a safetensors file."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        return 8 + header + json.loads(stream.read(header))[name]["data_offsets"][0]


def _child(values: dict, rank: int, world: int, port: int, cut: Cut | None, threads: int | None, log: str) -> None:
    os.environ |= {"HF_PRUNE_QUIET": "1", "OMP_NUM_THREADS": "1"}
    if world > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if threads is not None:
        torch.set_num_threads(threads)
    if cut is not None and cut.action == "dawn":
        # A place on earth where it is 05:59:40.
        west = (time.time() - (6 * 3600 - 20)) % 86400
        os.environ["TZ"] = f"XXX{int(west // 3600)}:{int(west // 60 % 60):02}:{int(west % 60):02}"
        time.tzset()
    if cut is not None and cut.rank == rank:
        cut.install()
    sys.exit(cli.main(["prune", *[f"--{key}={json.dumps(value) if isinstance(value, bool) else value}"
                                  for key, value in values.items()]]))  # fmt: skip


def stopped_early(recipe: dict, folder: Path, **changes: object) -> dict:
    """The recipe on a copy of its model, once its run has been stopped behind dense scores, plan and first block."""
    shutil.copytree(recipe["model_name_or_path"], folder / "model")
    own = {"model_name_or_path": folder / "model", "output_dir": folder / "out", "time_limit": "0.001"}
    values = {**recipe, **own, **changes}
    for _ in range(3):
        codes, log = prune(values, folder)
        assert codes == [STOPPED], log
    return values


def prune(
    values: dict, folder: Path, world: int = 1, cut: Cut | None = None, threads: int | None = None
) -> tuple[Sequence[int | None], str]:
    """Exit codes of the command line in `world` processes, negative for a signal, and all that they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"log-{rank}.txt" for rank in range(world)]
    started = [
        CONTEXT.Process(target=_child, args=(values, rank, world, port, cut, threads, str(logs[rank])))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        process.kill()
    return [process.exitcode for process in started], "".join(log.read_text() for log in logs)
