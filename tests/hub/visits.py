"""Clients of the Hub in fresh processes, and the two users they act for."""

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TOKEN = "hf_" + secrets.token_hex(16)  # of the user `me`
OTHER_TOKEN = "hf_" + secrets.token_hex(16)  # of the user `you`
TOKEN_IDS = [1, 2, 3, 4, 5, 6, 3, 7]  # what every model is asked


@dataclass(frozen=True)
class Visit:
    """A client process that has ended: what its function returned, and its streams."""

    returned: object
    stdout: str
    stderr: str


def client_environment(**settings: str) -> dict[str, str]:
    """This process' environment without any setting of the Hub, with `settings`, and with hf_prune importable."""
    ours = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    defaults = {
        "HF_HUB_DISABLE_XET": "1",
        "HF_PRUNE_QUIET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    return {**kept, **defaults, **settings}


def command_line(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess:
    """Run `python -m hf_prune` with these environment variables, however it ends."""
    command = [sys.executable, "-m", "hf_prune", *map(str, arguments)]
    environment = client_environment(**settings)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def visit(function: str, *arguments: str | Path, **settings: str) -> Visit:
    """Run a function of client.py in a fresh process with these environment variables; it must end well."""
    command = [sys.executable, str(HERE / "client.py"), function, *map(str, arguments)]
    environment = client_environment(**settings)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Visit(json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr)
