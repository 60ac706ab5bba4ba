"""The search's decisions on candidates whose figures are known in closed form, and storage lost or foreign."""

import ast
import itertools
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("optuna")

from hf_prune.cli.search import without_flag
from hf_prune.errors import BadInputError, RunError
from hf_prune.search.arguments import SearchRecipe, make_search_recipe
from hf_prune.search.candidates import Look, Measurement, SpectrumSetting
from hf_prune.search.run import help_search, own_gpu, run_search, show_search  # noqa: F401  # the helper calls it
from hf_prune.search.searching import Search
from hf_prune.search.space import Choice, elimination_rounds, label, make_space
from hf_prune.search.study import StudyFolder, attributes_on_disk

AXES = {"a": [0, 1, 3, 4], "b": ["x", "y", "z"]}


class Bowl:
    """Candidates of a bowl: loss 1 + (a - 3)^2 + place of b, blurred at small budgets; b = z fails where a is 0."""

    unit = "epochs"
    max_budget = 9
    setting = None

    def __init__(self, die_after: int | None = None, seconds: float = 0.0) -> None:
        self.space = make_space(AXES, self._check)
        self.measured: list[tuple[str, list[int]]] = []
        self.finished: Choice | None = None
        self.die_after = die_after
        self.seconds = seconds

    @staticmethod
    def _check(choice: Choice) -> None:
        if choice == {"a": 4, "b": "z"}:
            raise BadInputError("b: z does not go with 4.")

    @staticmethod
    def loss(choice: Choice, budget: int) -> float:
        if choice == {"a": 0, "b": "z"}:
            return math.nan
        return 1 + (choice["a"] - 3) ** 2 + "yxz".index(choice["b"]) / 2 + math.sin(7 * choice["a"]) / budget

    def dense(self, budgets: list[int]) -> dict[int, Measurement]:
        return {budget: Measurement(1.0, self.spectrum(0.0), spent=budget) for budget in budgets}

    @staticmethod
    def spectrum(away: float) -> torch.Tensor:
        return torch.tensor([1.0, -1.0, -3.0 - away], dtype=torch.float64)

    @staticmethod
    def cost(budgets: list[int]) -> int:
        return max(budgets)

    def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
        dies = self.die_after is not None and len(self.measured) >= self.die_after
        time.sleep(self.seconds)
        self.measured.append((label(choice), budgets))
        for budget in budgets:
            loss = self.loss(choice, budget)
            look(budget, Measurement(loss, self.spectrum(2 * loss), spent=budget, spectrum_seconds=0.001))
            if dies:
                raise KeyboardInterrupt

    def finish(self, choice: Choice, notes: dict[str, Any]) -> dict[str, Any]:
        self.finished = choice
        return notes


def recipe(folder: Path, **values: Any) -> SearchRecipe:
    own = {"search_dir": str(folder), "output_dir": f"{folder}-out", "first_budget": 3, "budget_step": 3}
    own |= {"objective": "ls_distance"}
    return make_search_recipe({**own, **values})


def every_choice() -> list[Choice]:
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


BEST = {"a": 3, "b": "y"}


def test_the_published_schedule_costs_the_published_epochs() -> None:
    rounds = elimination_rounds(26, 3, 3)
    assert rounds == [(14, 6), (8, 9), (5, 12), (3, 15), (2, 18)]
    assert 40 * 3 + sum(kept * budget for kept, budget in rounds) == 417


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_every_round_is_smaller_and_two_are_left(candidates: int) -> None:
    kept = [candidates, *(own for own, _ in elimination_rounds(candidates, 3, 3))]
    assert all(later < before for before, later in itertools.pairwise(kept))
    assert kept[-1] == min(candidates, 2)


@pytest.mark.parametrize(
    ("pruner", "objective"), [("elimination", "ls_distance"), ("hyperband", "loss"), ("none", "both")]
)
def test_the_best_is_found_by_every_pruner_and_objective(tmp_path: Path, pruner: str, objective: str) -> None:
    bowl = Bowl()
    summary = run_search(
        recipe(tmp_path / "s", pruner=pruner, objective=objective, num_candidates=36, sampler="random"), bowl
    )
    assert bowl.finished == BEST and summary["chosen"] == label(BEST)
    assert summary["drawn"] == 36 and summary["refused_drawn"] > 0 and len(summary["refused"]) == 1
    # What cannot be run was never measured, and nothing twice with the same budget.
    assert label({"a": 4, "b": "z"}) not in {name for name, _ in bowl.measured}
    assert len({(name, max(budgets)) for name, budgets in bowl.measured}) == len(bowl.measured)
    first = summary["candidates"][0]
    assert first["loss"] == pytest.approx(Bowl.loss(BEST, 9)) and first["distance"] == pytest.approx(2 * first["loss"])
    # Not finite: last, and named.
    worst = summary["candidates"][-1]
    assert worst["candidate"] == label({"a": 0, "b": "z"}) and worst["value"] is None and worst["why"]


def test_a_report_says_what_the_search_said(tmp_path: Path) -> None:
    """Early on the order of the candidates is the reverse of what it is in the end."""

    class Deceptive(Bowl):
        @staticmethod
        def loss(choice: Choice, budget: int) -> float:
            end = Bowl.loss(choice, 10**9)
            return end if budget == Bowl.max_budget else 50 - end

    own = recipe(tmp_path / "s", pruner="none", objective="loss", num_candidates=36, sampler="random")
    unborn = recipe(tmp_path / "t", pruner="none", objective="loss", num_candidates=36, sampler="random")
    summary = run_search(own, Deceptive())
    del summary["report"]
    shown = show_search(own, Deceptive())
    assert shown == summary and json.loads((tmp_path / "s" / "search.json").read_text()) == shown
    # Before anything was measured there is a report as well.
    Search(unborn, Deceptive()).folder.begin(unborn.identity)
    empty = show_search(unborn, Deceptive())
    assert (empty["chosen"], empty["spent"], empty["candidates"]) == (None, 0, [])


@pytest.mark.parametrize("said", [["--resume"], ["--resume", "true"], ["--resume=true"]])
def test_helpers_are_not_told_to_resume(said: list[str]) -> None:
    command = ["--config", "a.yaml", *said, "--num_processes", "2"]
    assert without_flag(command, "resume") == ["--config", "a.yaml", "--num_processes", "2"]


def test_what_only_the_model_refuses_is_named_and_the_search_goes_on(tmp_path: Path) -> None:
    class Picky(Bowl):
        def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
            if choice == {"a": 1, "b": "x"}:
                raise BadInputError("pattern: 32 inputs do not divide into groups of 5.")
            super().measure(choice, budgets, look)

    summary = run_search(recipe(tmp_path / "s", num_candidates=36, sampler="random"), Picky())
    assert summary["chosen"] == label(BEST)
    refused = next(row for row in summary["candidates"] if row["candidate"] == label({"a": 1, "b": "x"}))
    assert refused["value"] is None and "groups of 5" in refused["why"]


def test_other_words_for_one_candidate_do_not_take_a_second_place(tmp_path: Path) -> None:
    class Twins(Bowl):
        @staticmethod
        def loss(choice: Choice, budget: int) -> float:
            return Bowl.loss({**choice, "b": choice["b"].replace("z", "y")}, budget)

    bowl = Twins()
    summary = run_search(
        recipe(tmp_path / "s", objective="loss", pruner="none", num_candidates=40, sampler="random"), bowl
    )
    last = [name for name, budgets in bowl.measured if budgets == [9]]
    # y and z are the same at 3; the runner-up is another one.
    assert len(last) == 2 and {name.split("b=")[0] + "b=y" for name in last if "b=x" not in name} == {label(BEST)}
    assert bowl.finished is not None and Twins.loss(bowl.finished, 9) == Twins.loss(BEST, 9)
    assert summary["candidates"][1]["loss"] > summary["candidates"][0]["loss"]


def test_candidates_that_are_still_the_same_all_go_on(tmp_path: Path) -> None:
    """As before masks have moved for the first time."""

    class Slow(Bowl):
        @staticmethod
        def loss(choice: Choice, budget: int) -> float:
            return 5.0 if budget == 3 else Bowl.loss(choice, budget)

    bowl = Slow()
    run_search(recipe(tmp_path / "s", objective="loss", num_candidates=40, sampler="random"), bowl)
    assert len({name for name, budgets in bowl.measured if budgets == [6]}) == 11 // 2 + 1


def test_a_saved_plan_can_be_chosen(tmp_path: Path) -> None:
    class Planned(Bowl):
        def __init__(self) -> None:
            super().__init__()
            self.space = make_space({"a": [1, 3], "b": ["x", "somewhere/plan.json"]}, lambda _: None)

        @staticmethod
        def loss(choice: Choice, budget: int) -> float:
            return Bowl.loss({**choice, "b": "x" if choice["b"] == "x" else "y"}, budget)

    bowl = Planned()
    own = recipe(tmp_path / "s", objective="loss", pruner="none", num_candidates=16, sampler="random")
    assert run_search(own, bowl)["chosen"] == "a=3, b=plan.json"
    assert bowl.finished == {"a": 3, "b": "somewhere/plan.json"}


def test_a_folder_that_was_removed_is_begun_anew(tmp_path: Path) -> None:
    own = recipe(tmp_path / "s", objective="loss", num_candidates=3, sampler="random")
    first = run_search(own, Bowl())
    shutil.rmtree(tmp_path / "s")
    assert run_search(own, Bowl())["chosen"] == first["chosen"]


def test_who_fails_late_is_not_followed_by_one_that_nobody_finished(tmp_path: Path) -> None:
    class Late(Bowl):
        @staticmethod
        def loss(choice: Choice, budget: int) -> float:
            return math.nan if budget == 9 else Bowl.loss(choice, budget)

    bowl = Late()
    own = recipe(tmp_path / "s", objective="loss", pruner="none", num_candidates=12, sampler="random")
    with pytest.raises(RunError, match="none of the candidates left"):
        run_search(own, bowl)
    assert bowl.finished is None and json.loads((tmp_path / "s" / "search.json").read_text())["chosen"] is None


def test_what_failed_on_its_way_was_paid_for(tmp_path: Path) -> None:
    class Diverging(Bowl):
        def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
            self.measured.append((label(choice), budgets))
            raise RunError("the loss is NaN.")

    bowl = Diverging()
    with pytest.raises(RunError):
        run_search(recipe(tmp_path / "s", num_candidates=36, total_budget=9 + 3 * 4, sampler="random"), bowl)
    assert len(bowl.measured) == 4


@pytest.mark.parametrize("pruner", ["hyperband", "none"])
def test_a_candidate_is_begun_only_where_all_of_it_may_be_spent(tmp_path: Path, pruner: str) -> None:
    class Anew(Bowl):
        @staticmethod
        def cost(budgets: list[int]) -> int:
            return sum(budgets)

        def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
            spent = 0
            for budget in budgets:
                spent += budget
                loss = self.loss(choice, budget)
                look(budget, Measurement(loss, self.spectrum(2 * loss), spent=spent))

    own = recipe(tmp_path / "s", objective="loss", pruner=pruner, num_candidates=36, total_budget=50, sampler="random")
    summary = run_search(own, Anew())
    assert 9 < summary["spent"] <= 50


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

    with pytest.raises(BadInputError, match="200 of a state"):
        run_search(recipe(tmp_path / "s", sampler="random"), Mistaken())
    assert not list((tmp_path / "s").iterdir())
    assert run_search(recipe(tmp_path / "s", sampler="random", num_candidates=36), Bowl())["chosen"] == label(BEST)


def test_elimination_keeps_who_is_best_in_each_round_and_counts_what_it_spends(tmp_path: Path) -> None:
    bowl = Bowl()
    summary = run_search(recipe(tmp_path / "s", objective="loss", num_candidates=40, sampler="random"), bowl)
    # Played again by hand: 11 can be run, 6 of them have 6 epochs, then 4, 3 and 2 have 9, the whole budget.
    choices = [choice for choice in every_choice() if choice != {"a": 4, "b": "z"}]
    budget, rounds = 3, []
    while len(choices) > 2:
        finite = [choice for choice in choices if not math.isnan(Bowl.loss(choice, budget))]
        choices = sorted(finite, key=lambda choice: Bowl.loss(choice, budget))[: len(choices) // 2 + 1]
        if budget < 9:
            budget += 3
            rounds.append({label(choice) for choice in choices})
    measured = {number: {name for name, own in bowl.measured if own == [number]} for number in (3, 6, 9)}
    assert len(measured[3]) == 11 and [measured[6], measured[9]] == rounds
    wanted = 9 + sum(len(names) * number for number, names in measured.items())
    assert summary["spent"] == wanted
    assert bowl.finished == min(choices, key=lambda choice: Bowl.loss(choice, 9))


def test_the_objective_both_is_what_it_says(tmp_path: Path) -> None:
    summary = run_search(recipe(tmp_path / "s", objective="both", pruner="none", num_candidates=8), Bowl())
    for row in summary["candidates"]:
        if row["value"] is not None:
            length = math.sqrt(1 + 1 + 9)
            assert row["value"] == pytest.approx((row["loss"] - 1) / 1 + row["distance"] / length)


@pytest.mark.parametrize("limits", [{"total_budget": 30}, {"max_minutes": 1e-9}])
def test_nothing_is_begun_beyond_what_may_be_spent(tmp_path: Path, limits: dict) -> None:
    bowl = Bowl()
    if "max_minutes" in limits:
        with pytest.raises(RunError, match="no candidate was measured"):
            run_search(recipe(tmp_path / "s", objective="loss", **limits), bowl)
        assert bowl.measured == []
    else:
        summary = run_search(recipe(tmp_path / "s", objective="loss", num_candidates=40, **limits), bowl)
        # The dense model's 9 epochs count as well.
        assert 9 < summary["spent"] <= 30 and summary["spent"] == 9 + sum(own[-1] for _, own in bowl.measured)


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


def test_a_stability_table_that_fails_costs_no_finished_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Bowl):
        setting = SpectrumSetting(k=3, sequences=1, length=16)
        least_length = 8

        def spectra(self, *given: Any) -> Any:
            raise RunError("the spectra fell out of the bowl.")

    bowl = Failing()
    own = recipe(tmp_path / "s", objective="loss", num_candidates=16, stability_candidates=3)
    summary = run_search(own, bowl)
    assert bowl.finished is not None and summary["chosen"] == label(bowl.finished) and "stability" not in summary
    assert "no table, the spectra fell out of the bowl" in caplog.text


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
import test_study
recipe = test_study.recipe(sys.argv[1], objective="loss", num_candidates=16, sampler="random")
candidates = test_study.Bowl(seconds=0.1)
print("ready", flush=True)
test_study.help_search(recipe, candidates)
print(len(candidates.measured))
"""


TAKER = """
import sys
from pathlib import Path
import test_study
folder = test_study.StudyFolder(Path(sys.argv[1]), test_study.recipe(sys.argv[1]).search, test_study.Bowl().space, 9)
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "grid"}, "sampler: 'grid' is unknown"),
        ({"pruner": "median"}, "pruner: 'median' is unknown"),
        ({"objective": "beauty"}, "objective: 'beauty' is unknown"),
        ({"num_candidates": 1}, "num_candidates: 1 is too few"),
        ({"max_budget": 2}, "max_budget: 2 is less than the 3"),
        ({"distance": "pca"}, "distance_runs: distance pca is fitted to the spectra of another search"),
        ({"distance_runs": "x"}, "distance_runs: distance raw is fitted to nothing"),
        ({"max_minutes": 0}, "max_minutes"),
        ({"search_dir": None}, "search_dir: the recipe does not say"),
    ],
)
def test_bad_settings_are_refused(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        recipe(tmp_path, **{"search_dir": str(tmp_path), **values}) if "search_dir" not in values else (
            make_search_recipe(values)
        )


def test_an_embedding_is_fitted_to_the_spectra_of_another_search(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="holds no spectra"):
        run_search(recipe(tmp_path / "s", distance="pca", distance_runs=str(tmp_path / "first")), Bowl())
    assert not (tmp_path / "s").exists()
    options: dict[str, Any] = {"pruner": "none"}
    run_search(recipe(tmp_path / "first", num_candidates=10, sampler="random", search_seed=1, **options), Bowl())
    own = recipe(tmp_path / "s", distance="pca", distance_runs=str(tmp_path / "first"), num_candidates=8, **options)
    # All that differs lies in one direction, so that the projection keeps every distance.
    for row in run_search(own, Bowl())["candidates"]:
        if row["loss"] is not None:
            assert row["distance"] == pytest.approx(2 * row["loss"], rel=1e-6)
