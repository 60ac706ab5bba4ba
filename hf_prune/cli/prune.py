"""hf-prune prune: recipe in, verified folder out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hf_prune.cli.arguments import console, quiet_libraries, read_recipe, recipe_help, split_launch_flags
from hf_prune.errors import RELAUNCHED, BadInputError, Stopped
from hf_prune.recipe import Recipe

# Seconds between two looks at whether there is a signal to hand on.
_PAUSE = 0.5
# And how long one may find nobody to take it.
_PATIENCE = 60.0


def help_text() -> str:
    return recipe_help("prune", "Prune a model, evaluate it, save and verify it, and push it if asked.")


def main(arguments: list[str]) -> int:
    own, launch = split_launch_flags(arguments)
    return execute(read_recipe(own), ["prune", *own], launch)


def execute(recipe: Recipe, command: list[str], launch: Sequence[str] = ()) -> int:
    """Run the recipe here, or `command` once per process where the recipe asks for several.

    Args:
        launch: more flags of `accelerate launch`.

    Raises:
        BadInputError: there are some, and one process to start.
    """
    if launch and recipe.model.num_processes == 1:
        raise BadInputError(f"{launch[0][2:]}: is a flag of accelerate launch; set num_processes to more than 1.")
    if recipe.model.num_processes > 1 and "RANK" not in os.environ:
        from hf_prune.preparation import check_feasible, prepare
        from hf_prune.unfinished import is_finished, work_folder

        # What can be refused is refused here, in one sentence: the launcher would wrap it in a traceback.
        quiet_libraries()
        recipe.require("output_dir")
        if not is_finished(recipe):
            check_feasible(prepare(recipe))
            work, pushes = work_folder(str(recipe.output.output_dir)), recipe.output.push_to_hub
            return relaunch(recipe.model.num_processes, command, work, launch, pushes)
    run_and_show(recipe)
    return 0


def relaunch(
    num_processes: int,
    arguments: list[str],
    work: Path | None = None,
    more: Sequence[str] = (),
    pushes: bool = False,
) -> int:
    """The same command once per process, through accelerate; its exit code.

    The launcher knows of failures alone: whether the run has stopped to go on later is seen from its folder.

    Args:
        work: the run's working folder, whose processes are handed SIGTERM; the launcher, which would give them 30
            seconds, never sees it, whoever sends it.
        more: flags of the launcher; they win over those that are set here.
        pushes: the run ends with an upload, which SIGTERM interrupts.
    """
    # --multi_gpu is accelerate's word for several processes; without it (and with --cpu) it starts one only.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += more
    environment = {**os.environ, RELAUNCHED: "1"}
    command = [*launch, "-m", "hf_prune", *arguments]
    noted: list[float] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(time.monotonic()))
    try:
        # Launcher and processes are born with SIGTERM held back; the processes take it once they can stop.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if work is not None else set())
        try:
            launcher = subprocess.Popen(command, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = _wait(launcher, work, noted, pushes)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Stopped.exit_code if code == 0 and work is not None and work.exists() else code


def _wait(launcher: subprocess.Popen[bytes], work: Path | None, noted: list[float], pushes: bool) -> int:
    """The launcher's exit code; signals that are `noted` meanwhile are handed on, early ones as soon as they can be."""
    begun = False
    with launcher:
        while True:
            begun = begun or (work is not None and work.exists())
            if noted and _hand_on(launcher, work, begun, pushes):
                noted.pop(0)
            elif noted and time.monotonic() - noted[0] > _PATIENCE:
                # Nobody has come to listen, and perhaps nobody will.
                launcher.send_signal(signal.SIGINT)
                noted.clear()
            with suppress(subprocess.TimeoutExpired):
                return launcher.wait(_PAUSE)


def _hand_on(launcher: subprocess.Popen[bytes], work: Path | None, begun: bool, pushes: bool) -> bool:
    """Hand SIGTERM on; whether there was anyone to take it."""
    # Late: it brings torch.
    from hf_prune.checkpoint.work import holders

    if work is None:
        launcher.terminate()
        return True
    own = holders(work)
    for process in own:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    # The folder is finished: what is left takes a moment, or hours where it is pushed.
    finished = begun and not own and not work.exists()
    if finished and pushes:
        launcher.send_signal(signal.SIGINT)
    return bool(own) or finished


def run_and_show(recipe: Recipe) -> None:
    """Run a recipe and print what a person wants to know of it."""
    from hf_prune.pipeline import run
    from hf_prune.report import tables
    from hf_prune.report.findings import next_step
    from hf_prune.report.gains import gained

    quiet_libraries()
    report = run(recipe)
    out = console()
    for entry, table in (
        ("verification", tables.verification_table),
        ("evaluation", tables.evaluation_table),
        ("efficiency", tables.efficiency_table),
    ):
        if report.get(entry):
            out.print(table(report))
    if report.get("samples"):
        out.print(tables.samples_table(report["samples"]))
    for sentence in [*gained(report), "", *next_step(report, str(recipe.output.output_dir))]:
        out.print(sentence, markup=False)
