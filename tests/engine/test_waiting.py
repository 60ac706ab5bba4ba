"""How long processes wait for one that writes: as long as the engine says, and not the backend's own while."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
from datetime import timedelta
from hf_prune.engine import distributed

if sys.argv[1] != "as it is":
    distributed.LONGEST_WAIT = timedelta(seconds=float(sys.argv[1]))
distributed.initialise("cpu")
distributed.barrier()
if distributed.rank() == 0:
    time.sleep(6)
distributed.barrier()
print("together")
"""


def wait(longest: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Two processes of which one comes six seconds late."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (folder / "program.py").write_text(PROGRAM)
    started = []
    for rank in ("0", "1"):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(folder / "program.py"), longest]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **places, "OMP_NUM_THREADS": "1"}, **options))
    texts = [process.communicate(timeout=120) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *text)
        for process, text in zip(started, texts, strict=True)
    ]


@pytest.mark.slow
def test_the_engine_says_how_long(tmp_path: Path) -> None:
    # Two seconds are too short for six, in the very call that waits through a save; the engine's own hours are not.
    impatient = wait("2", tmp_path)
    assert impatient[1].returncode and "together" not in impatient[1].stdout, impatient[1].stderr
    assert [(done.returncode, done.stdout.strip()) for done in wait("as it is", tmp_path)] == [(0, "together")] * 2
