"""The verifying process of a save, forked from one that has torch and transformers imported already.

It is a process of its own, runs the same script and knows as little of hf_prune as a fresh one; the imports, four
seconds of a core each time, are shared. tests/checkpoint/test_verify.py starts fresh ones, as users do.

    python -P verifier.py       # a line of JSON for each process on standard input, its exit code on standard output
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Verifier:
    """Starts the process that is forked from, when the first one is needed."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def __call__(self, arguments: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        """What hf_prune.checkpoint.verify.in_fresh_process does, with the imports done before."""
        if self.server is None:
            command = [sys.executable, "-P", __file__]
            self.server = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            said = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
            asked = {"arguments": arguments, "environment": environment, "folder": str(Path.cwd()), **said}
            self.server.stdin.write(json.dumps(asked) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            texts = [Path(said[name]).read_text(errors="replace") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, code, *texts)

    def close(self) -> None:
        """End the process that is forked from."""
        if self.server is not None:
            self.server.communicate()


def serve() -> None:
    """Fork a process for each line of standard input, one after the other."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    for line in sys.stdin:
        process = os.fork()
        if not process:
            _become(**json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(arguments: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    """Run a script in this process and end it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, place in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(place, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    sys.argv = arguments
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
