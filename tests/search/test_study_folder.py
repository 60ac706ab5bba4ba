"""Searches that are cut, gone on with, shared between processes, and storage that is lost or foreign."""

import ast
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from bowl import BEST, Bowl, recipe

from hf_prune.cli.search import without_flag
from hf_prune.errors import BadInputError, RunError
from hf_prune.search.candidates import Measurement
from hf_prune.search.run import own_gpu, run_search
from hf_prune.search.space import label
from hf_prune.search.study import StudyFolder, attributes_on_disk


@pytest.mark.parametrize("said", [["--resume"], ["--resume", "true"], ["--resume=true"]])
def test_helpers_are_not_told_to_resume(said: list[str]) -> None:
    command = ["--config", "a.yaml", *said, "--num_processes", "2"]
    assert without_flag(command, "resume") == ["--config", "a.yaml", "--num_processes", "2"]


def test_a_folder_that_was_removed_is_begun_anew(tmp_path: Path) -> None:
    own = recipe(tmp_path / "s", objective="loss", num_candidates=3, sampler="random")
    first = run_search(own, Bowl())
    shutil.rmtree(tmp_path / "s")
    assert run_search(own, Bowl())["chosen"] == first["chosen"]


def test_spectra_that_are_lost_are_computed_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sampler": "random", "num_candidates": 4}
    run_search(recipe(tmp_path / "s", **options), Bowl())
    before = json.loads((tmp_path / "s" / "search.json").read_text())["candidates"]
    (tmp_path / "s" / "dense.safetensors").unlink()
    again = run_search(recipe(tmp_path / "s", **{**options, "num_candidates": 6}), Bowl(), resume=True)
    values = {row["candidate"]: row["first_value"] for row in again["candidates"]}
    assert values.items() >= {row["candidate"]: row["first_value"] for row in before}.items() and len(values) > 3


KILLED = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE study_user_attributes SET value_json = 1")
connection.execute("CREATE TABLE filler (x)")
for _ in range(300):
    connection.execute("INSERT INTO filler VALUES (randomblob(2000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_it_wrote_leaves_a_search_that_can_be_read(tmp_path: Path) -> None:
    run_search(recipe(tmp_path / "s", objective="loss", num_candidates=3), Bowl())
    file = tmp_path / "s" / "search.db"
    before = attributes_on_disk(file)
    subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert (tmp_path / "s" / "search.db-journal").stat().st_size > 0
    assert attributes_on_disk(file) == before and before["finished"] is True


def test_each_process_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(device: str, count: int, seen: str | None) -> list[str | None]:
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen) if seen else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
        return [own_gpu(device, number).get("CUDA_VISIBLE_DEVICES") for number in range(3)]

    assert visible("auto", 2, None) == ["0", "1", "0"]
    assert visible("cuda", 2, "3,7") == ["3", "7", "3"]
    assert visible("auto", 1, None) == visible("auto", 0, None) == visible("cuda:1", 2, None) == [None] * 3


def test_a_mistake_that_the_dense_model_shows_leaves_the_folder_to_the_next_recipe(tmp_path: Path) -> None:
    class Mistaken(Bowl):
        def dense(self, budgets: list[int]) -> dict[int, Measurement]:
            raise BadInputError("num_exponents: 200 of a state of 64.")

    class Diverging(Bowl):
        def dense(self, budgets: list[int]) -> dict[int, Measurement]:
            raise RunError("dense: the loss is nan at step 10.")

    for candidates, error in ((Mistaken(), BadInputError), (Diverging(), RunError)):
        with pytest.raises(error, match=r"200 of a state|nan at step 10"):
            run_search(recipe(tmp_path / "s", sampler="random"), candidates)
        assert not list((tmp_path / "s").iterdir())
    assert run_search(recipe(tmp_path / "s", sampler="random", num_candidates=36), Bowl())["chosen"] == label(BEST)


@pytest.mark.parametrize(("pruner", "cuts"), [("elimination", (4, 5)), ("hyperband", (3, 2))])
def test_the_same_seed_is_the_same_search_whole_or_cut(pruner: str, cuts: tuple[int, int], tmp_path: Path) -> None:
    options: dict[str, Any] = {"objective": "loss", "num_candidates": 13, "search_seed": 5, "pruner": pruner}

    def figures(summary: dict) -> list[tuple]:
        return [(row["candidate"], row["value"], row["budget"]) for row in summary["candidates"]]

    whole = run_search(recipe(tmp_path / "whole", **options), Bowl())
    # Cut twice: while the first are drawn at random, and when the sampler has learnt something or a round has begun.
    for turn, cut in enumerate(cuts):
        with pytest.raises(KeyboardInterrupt):
            run_search(recipe(tmp_path / "cut", **options), Bowl(die_after=cut), resume=turn > 0)
    assert figures(run_search(recipe(tmp_path / "cut", **options), Bowl(), resume=True)) == figures(whole)
    other = run_search(recipe(tmp_path / "other", **{**options, "num_candidates": 4, "search_seed": 6}), Bowl())
    assert [row["candidate"] for row in other["candidates"]] != [row["candidate"] for row in whole["candidates"]][:4]


def test_what_was_finished_is_not_measured_again_and_more_candidates_can_be_had(tmp_path: Path) -> None:
    options: dict[str, Any] = {"objective": "loss", "sampler": "random"}
    first, again, more = Bowl(), Bowl(), Bowl()
    summary = run_search(recipe(tmp_path / "s", num_candidates=4, **options), first)
    repeated = run_search(recipe(tmp_path / "s", num_candidates=4, **options), again, resume=True)
    assert again.measured == [] and repeated["candidates"] == summary["candidates"]
    larger = run_search(recipe(tmp_path / "s", num_candidates=7, **options), more, resume=True)
    assert more.measured and larger["drawn"] == 7


HELPER = """
import sys
from bowl import Bowl, recipe
from hf_prune.search.run import help_search
candidates = Bowl(seconds=0.1)
print("ready", flush=True)
help_search(recipe(sys.argv[1], objective="loss", num_candidates=16, sampler="random"), candidates)
print(len(candidates.measured))
"""


TAKER = """
import sys
from pathlib import Path
from bowl import Bowl, recipe
from hf_prune.search.study import StudyFolder
folder = StudyFolder(Path(sys.argv[1]), recipe(sys.argv[1]).search, Bowl().space, 9)
print("ready", flush=True)
sys.stdin.readline()
print(*(folder.ask(0).number for _ in range(int(sys.argv[2]))))
"""


@pytest.mark.slow
def test_no_queued_candidate_is_taken_twice(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s", recipe(tmp_path / "s").search, Bowl().space, 9)
    choice = {key: choices[0] for key, choices in folder.space.axes.items()}
    for _ in range(60):
        folder.enqueue(choice)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", TAKER, str(tmp_path / "s"), "20"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    takers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for taker in takers:
        assert taker.stdout is not None and taker.stdout.readline() == "ready\n"
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("go\n")
        taker.stdin.flush()
    taken = [int(number) for taker in takers for number in taker.communicate(timeout=300)[0].split()]
    assert sorted(taken) == list(range(60))


@pytest.mark.slow
def test_two_processes_share_a_search_and_lose_nothing(tmp_path: Path) -> None:
    places = [str(Path(__file__).parent), *sys.path]
    helper = subprocess.Popen(
        [sys.executable, "-c", HELPER, str(tmp_path / "s")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert helper.stdout is not None and helper.stdout.readline() == "ready\n"
    bowl = Bowl(seconds=0.1)
    own = recipe(tmp_path / "s", objective="loss", num_candidates=16, sampler="random")
    summary = run_search(own, bowl)
    helped = int(helper.communicate(timeout=60)[0])
    assert helper.returncode == 0 and helped > 0 and bowl.measured
    trials = StudyFolder(tmp_path / "s", own.search, bowl.space, 9).study.get_trials()
    assert all(trial.state.is_finished() for trial in trials)
    assert summary["drawn"] == 16
    # Each candidate is measured once at each budget, by one or the other, and has the value it has by itself.
    measured = [trial for trial in trials if "found" in trial.user_attrs]
    assert len(measured) == helped + len(bowl.measured)
    places_of = {(label(trial.params), trial.user_attrs.get("budget", 3)) for trial in measured}
    assert len(places_of) == len(measured)
    for trial in measured:
        loss = Bowl.loss(trial.params, trial.user_attrs.get("budget", 3))
        assert trial.value == (pytest.approx(loss) if math.isfinite(loss) else math.inf)


@pytest.mark.slow
def test_another_process_that_leads_is_not_disturbed(tmp_path: Path) -> None:
    run_search(recipe(tmp_path / "s", objective="loss", num_candidates=3), Bowl())
    folder = StudyFolder(tmp_path / "s", recipe(tmp_path / "s").search, Bowl().space, 9)
    script = "import sys; from pathlib import Path; from hf_prune.search.study import sign_in; "
    script += f"print(sign_in(Path({str(tmp_path / 's')!r})), flush=True); sys.stdin.readline()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    leader = ast.literal_eval(other.stdout.readline())
    folder.study.set_user_attr("leader", leader)
    own = recipe(tmp_path / "s", objective="loss", num_candidates=3)
    with pytest.raises(BadInputError, match=f"process {other.pid} is searching"):
        run_search(own, Bowl(), resume=True)
    other.kill()
    other.wait()
    assert run_search(own, Bowl(), resume=True)["drawn"] == 3


def test_storage_that_is_lost_or_foreign_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def refused(folder: Path, resume: bool, **values: Any) -> str:
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        with pytest.raises(BadInputError) as caught:
            run_search(recipe(folder, objective="loss", num_candidates=3, **values), Bowl(), resume=resume)
        after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert before == after and "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no search.db to go on with" in refused(tmp_path / "none", True)
    assert not (tmp_path / "none").exists()
    run_search(recipe(tmp_path / "s", objective="loss", num_candidates=3), Bowl())
    assert "holds a search already; add --resume" in refused(tmp_path / "s", False)
    assert "a search with other settings" in refused(tmp_path / "s", True, search_seed=9)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "search.db").write_text("not a database, but long enough to be read as one" * 40)
    assert "is not the storage of a search" in refused(tmp_path / "text", True)
    (tmp_path / "other").mkdir()
    connection = sqlite3.connect(tmp_path / "other" / "search.db")
    connection.execute("CREATE TABLE people (name TEXT)")
    connection.commit()
    connection.close()
    assert "is not the storage of a search" in refused(tmp_path / "other", True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("words")
    assert "is not empty and holds no search" in refused(tmp_path / "full", False)
