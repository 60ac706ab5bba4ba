"""HF_HUB_OFFLINE=1 means no connection attempt at all, in this process and in those that it starts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from visits import HERE, client_environment

DOCUMENTS = [f"once upon a time there was a model {number}" for number in range(200)]
RECIPE = """
model_name_or_path: {model}
method: sparsegpt
sparsity: 0.5
dataset_name: {text}
num_calibration_samples: 4
seq_length: 32
eval_dataset_name: {text}
eval_seq_length: 32
eval_max_windows: 4
output_dir: {output}
"""
# Command lines that must work from local files alone; {recipe}, {model}, {text} and {output} are filled in.
COMMANDS = [
    pytest.param(["plan", "--config", "{recipe}"], id="plan"),
    pytest.param(["prune", "--config", "{recipe}"], id="prune"),
]


@dataclass(frozen=True)
class Run:
    """An ended process; `attempts` lists what it and its children tried to reach."""

    code: int
    stdout: str
    stderr: str
    attempts: list[str]


@pytest.fixture(scope="session")
def isolation() -> list[str]:
    """The command that starts a process without any network, on systems where an ordinary user may have one."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


@pytest.fixture
def without_network(tmp_path: Path, isolation: list[str]) -> Callable[..., Run]:
    """Runs a Python command line with sockets forbidden."""

    def run(*arguments: str | Path, offline: bool = True) -> Run:
        attempts = tmp_path / "attempts.txt"
        attempts.write_text("")
        environment = client_environment(
            HF_ENDPOINT="https://hub.invalid",
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="1" if offline else "0",
            NETWORK_ATTEMPTS=str(attempts),
        )
        environment["PYTHONPATH"] = f"{HERE / 'no_network'}:{environment['PYTHONPATH']}"
        command = [*isolation, sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        return Run(done.returncode, done.stdout, done.stderr, attempts.read_text().splitlines())

    return run


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Text enough for the windows of a tiny model."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return file


def test_the_guard_sees_an_attempt(without_network: Callable[..., Run], model_folder: Path) -> None:
    done = without_network(HERE / "client.py", "push_once", model_folder, "hf_unused", offline=False)
    assert any("hub.invalid" in attempt for attempt in done.attempts)
    code, message = json.loads(done.stdout.splitlines()[-1])
    assert code == 2 and "not reachable" in message


def test_local_files_need_no_connection(
    without_network: Callable[..., Run], model_folder: Path, text_file: Path
) -> None:
    done = without_network(HERE / "client.py", "offline_work", text_file, model_folder)
    assert done.code == 0, done.stderr
    assert done.attempts == []
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["documents"] == DOCUMENTS
    assert seen["words"] == "once upon"
    for what in ("push", "text on the Hub"):
        code, message = seen[what]
        assert code == 2 and "HF_HUB_OFFLINE" in message and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_need_no_connection(
    without_network: Callable[..., Run],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    command: list[str],
) -> None:
    paths = {
        "model": model_folder,
        "text": text_file,
        "output": tmp_path / "pruned",
        "recipe": tmp_path / "recipe.yaml",
    }
    paths["recipe"].write_text(RECIPE.format(**paths))
    done = without_network("-m", "hf_prune", *(word.format(**paths) for word in command))
    assert done.code == 0, done.stderr
    assert done.attempts == []
