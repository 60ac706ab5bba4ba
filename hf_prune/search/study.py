"""The study on disk: an Optuna study in SQLite, spectra beside it, and what becomes of it when a process dies.

SQLite because it takes several processes and a kill at any moment without repair; Optuna brings it along.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import sqlite3
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_prune.checkpoint.lock import hold, is_held, taking_turns
from hf_prune.errors import BadInputError
from hf_prune.search.arguments import SearchArguments
from hf_prune.search.space import Choice, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

STORAGE, SPECTRA, DENSE, PROCESSES = "search.db", "spectra", "dense.safetensors", "processes"
# Optuna reads that a queued trial waits and writes that it runs in two steps, between which SQLite lets others in.
TURN = f"{PROCESSES}/turn"
NAME = "hf_prune"
# Of a trial: how many were drawn before it, the same when it is measured again after a cut under another number.
PLACE = "place"
# Seconds that a process waits for another to let go of the file.
PATIENCE = 120
# Keeps the seeds of different searches apart: candidate 1 of seed 0 is not candidate 0 of seed 1.
SEED_STRIDE = 100_003
# This process's name in every search, and the locks that it holds.
TOKEN = secrets.token_hex(8)
_signed_in: dict[Path, IO[str]] = {}


def sign_in(folder: Path) -> dict[str, Any]:
    """Who this process is to the others of a search.

    It holds a lock in the folder from now on, which the system lets go of however the process ends. Numbers of
    processes come again, and the times at which they began move with the clock.
    """
    place = folder.resolve()
    if place not in _signed_in or not (place / PROCESSES / TOKEN).exists():
        (place / PROCESSES).mkdir(parents=True, exist_ok=True)
        file = hold(place / PROCESSES / TOKEN)
        assert file is not None  # nobody else has this name
        _signed_in[place] = file
    return {"token": TOKEN, "pid": os.getpid()}


def is_alive(folder: Path, process: dict[str, Any] | None) -> bool:
    """Whether a process that signed in is still there."""
    return is_held(folder / PROCESSES / process["token"]) if process else False


def anyone_alive(folder: Path) -> bool:
    """Whether any process that signed in is still there."""
    return any(is_held(file) for file in (folder / PROCESSES).glob("*"))


def check_storage(folder: Path, resume: bool) -> None:
    """Raise BadInputError where the folder holds a search and should not, or should and does not."""
    file = folder / STORAGE
    if not file.exists():
        if resume:
            raise BadInputError(f"search_dir: {folder} holds no {STORAGE} to go on with; leave --resume out.")
        if folder.is_dir() and any(folder.iterdir()):
            raise BadInputError(f"search_dir: {folder} is not empty and holds no search; name another folder.")
        return
    if not resume:
        raise BadInputError(f"search_dir: {folder} holds a search already; add --resume, or name another folder.")
    attributes_on_disk(file)


def check_identity(folder: Path, identity: str) -> None:
    """Raise BadInputError where the folder's search was made of other settings."""
    if attributes_on_disk(folder / STORAGE)["identity"] != identity:
        raise BadInputError(
            f"search_dir: {folder} holds a search with other settings; take its recipe, or name another folder."
        )


def attributes_on_disk(file: Path) -> dict[str, Any]:
    """What a study says of itself, read without Optuna, which would make its tables in whatever file it is given.

    Raises:
        BadInputError: the file is damaged, or of something else.
    """
    query = (
        "SELECT a.key, a.value_json FROM study_user_attributes AS a JOIN studies AS s ON a.study_id = s.study_id "
        "WHERE s.study_name = ?"
    )
    try:
        # Not read-only: what a process that was killed had half written is undone by whoever opens the file next.
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True, timeout=PATIENCE)
        try:
            attributes = {key: json.loads(value) for key, value in connection.execute(query, (NAME,))}
        finally:
            connection.close()
    except (sqlite3.Error, ValueError) as error:
        raise BadInputError(
            f"search_dir: {file} is not the storage of a search ({error}); name another folder."
        ) from None
    if "identity" not in attributes:
        raise BadInputError(f"search_dir: {file} holds no search of hf_prune; name another folder.")
    return attributes


class StudyFolder:
    """An open study with its spectra."""

    def __init__(self, folder: Path, arguments: SearchArguments, space: Space, max_budget: int) -> None:
        """Open a study, or create it with its identity missing: `begin` adds that."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder = folder
        self.arguments = arguments
        self.space = space
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPECTRA).mkdir(exist_ok=True)
        self.process = sign_in(folder)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{(folder / STORAGE).resolve()}", engine_kwargs={"connect_args": {"timeout": PATIENCE}}
        )
        self.study: Study = optuna.create_study(
            storage=storage, study_name=NAME, load_if_exists=True, pruner=_make_pruner(arguments, max_budget)
        )

    def discard(self) -> None:
        """Leave the folder as empty as it was: nothing has been measured."""
        import shutil

        _signed_in.pop(self.folder.resolve()).close()
        for own in (SPECTRA, PROCESSES):
            shutil.rmtree(self.folder / own, ignore_errors=True)
        for file in self.folder.glob(f"{STORAGE}*"):
            file.unlink()

    def begin(self, identity: str) -> None:
        """Become the one process that leads.

        Raises:
            BadInputError: another process leads.
        """
        leader = self.study.user_attrs.get("leader")
        if leader and leader != self.process and is_alive(self.folder, leader):
            raise BadInputError(
                f"search_dir: process {leader['pid']} is searching in {self.folder}; wait for it, or give it more "
                "processes by num_processes."
            )
        self.study.set_user_attr("identity", identity)
        # Before the others, for whom a search that is finished and begun just now is one that they came too late for.
        self.study.set_user_attr("finished", False)
        self.study.set_user_attr("leader", self.process)
        self.study.set_user_attr("begun", time.time())
        # More candidates may be wanted than last time.
        self.study.set_user_attr("rounds", False)
        self.study.set_user_attr("finalists", [])

    def trials(self) -> list[FrozenTrial]:
        """Every trial but those that came to nothing, oldest first."""
        from optuna.trial import TrialState

        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]

    def ask(self, drawn: int) -> Trial:
        """The next trial of the queue, or a new one after so many that were drawn: the same one after the same history,
        whatever was cut in between.
        """
        # A sampler's random numbers are not in the storage: each trial gets its own by its place.
        self.study.sampler = make_sampler(self.arguments, drawn)
        with taking_turns(self.folder / TURN):
            trial = self.study.ask()
            trial.set_user_attr("process", self.process)
            if PLACE not in trial.user_attrs:
                trial.set_user_attr(PLACE, drawn)
        return trial

    def suggest(self, trial: Trial) -> Choice:
        """The trial's candidate."""
        return {key: trial.suggest_categorical(key, choices) for key, choices in self.space.axes.items()}

    def enqueue(self, choice: Choice, **attributes: Any) -> None:
        """Put a candidate into the queue, for whichever process asks next."""
        self.study.enqueue_trial(choice, user_attrs={"queued": True, **attributes})

    def put_back(self, at_start: bool = False) -> int:
        """Queue again what processes that are gone were measuring; how many.

        `at_start` also what this process left behind when it was interrupted.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        count = 0
        with taking_turns(self.folder / TURN):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                owner = trial.user_attrs.get("process")
                if owner == self.process and not at_start:
                    continue
                if owner != self.process and is_alive(self.folder, owner):
                    continue
                try:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                except UpdateFinishedTrialError:
                    # The last thing that its process did was to finish it.
                    continue
                count += 1
                kept = {key: trial.user_attrs[key] for key in ("round", "budget", PLACE) if key in trial.user_attrs}
                choice = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
                # One that died before it was drawn will be drawn again.
                if choice.keys() == self.space.axes.keys():
                    self.enqueue(choice, **kept)
        return count

    def save_spectra(self, name: str, spectra: dict[int, Tensor]) -> None:
        """Keep spectra by budget, float64 [k]; complete or absent."""
        file = self.folder / (DENSE if name == "dense" else f"{SPECTRA}/{name}.safetensors")
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({str(budget): spectrum.clone().contiguous() for budget, spectrum in spectra.items()}, partial)
        partial.replace(file)

    def spectra(self, name: str) -> dict[int, Tensor]:
        """What `save_spectra` kept; empty where nothing was."""
        file = self.folder / (DENSE if name == "dense" else f"{SPECTRA}/{name}.safetensors")
        return {int(budget): spectrum for budget, spectrum in load_file(file).items()} if file.is_file() else {}


def drawn(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Trials of the first round: those that a sampler drew."""
    return [trial for trial in trials if "round" not in trial.user_attrs]


def counted(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those of them that count as candidates: what cannot be run costs nothing and does not."""
    return [trial for trial in drawn(trials) if "refused" not in trial.user_attrs]


def found(trial: FrozenTrial) -> dict[str, Any]:
    """What was measured of a trial; empty while it runs."""
    return trial.user_attrs.get("found", {})


def spectra_of(folder: Path) -> Tensor:
    """Every spectrum of another search, at all budgets, float64 [spectra, k], those that are not finite left out.

    Raises:
        BadInputError: there are none.
    """
    files = sorted((folder / SPECTRA).glob("*.safetensors"))
    every = [spectrum for file in files for spectrum in load_file(file).values()]
    finite = [spectrum for spectrum in every if bool(spectrum.isfinite().all())]
    if not finite or len({len(spectrum) for spectrum in finite}) > 1:
        raise BadInputError(
            f"distance_runs: {folder} holds no spectra, all of one length; name the search_dir of a search with an "
            "objective that looks at spectra."
        )
    return torch.stack(finite)


def make_sampler(arguments: SearchArguments, place: int) -> BaseSampler:
    """The sampler of the trial that comes `place`-th."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = arguments.search_seed * SEED_STRIDE + place
    if arguments.sampler == "random":
        return RandomSampler(seed=seed)
    # constant_liar: what other processes are measuring right now is not drawn a second time.
    return TPESampler(seed=seed, constant_liar=True)


def _make_pruner(arguments: SearchArguments, max_budget: int) -> Any:
    from optuna.pruners import HyperbandPruner, NopPruner
    from optuna.trial import TrialState

    class Hyperband(HyperbandPruner):
        """Optuna draws a trial's bracket by its number, and counts what was measured of trials that were cut."""

        def _get_bracket_id(self, study: Any, trial: Any) -> int:
            if not self._pruners:
                # Otherwise at the first trial that is measured, whether or not earlier ones have brackets.
                self._try_initialization(study)
            if trial.state == TrialState.FAIL:
                return -1
            own = copy.copy(trial)
            own.number = trial.user_attrs.get(PLACE, trial.number)
            return super()._get_bracket_id(study, own)

    if arguments.pruner != "hyperband":
        return NopPruner()
    return Hyperband(min_resource=arguments.first_budget, max_resource=max_budget, reduction_factor=3)


def best_first(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """By value, what is not finite last; ties in the order they were drawn."""
    return sorted(trials, key=lambda trial: (trial.value if trial.value is not None else float("inf"), trial.number))
