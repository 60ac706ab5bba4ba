"""The search's decisions on candidates whose figures are known in closed form."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("optuna")

from bowl import BEST, Bowl, every_choice, recipe

from hf_prune.errors import BadInputError, RunError
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.candidates import Look, Measurement, SpectrumSetting
from hf_prune.search.run import run_search, show_search
from hf_prune.search.searching import Search
from hf_prune.search.space import Choice, elimination_rounds, label, make_space


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


def test_one_finalist_is_taken_as_it_is_and_costs_nothing_more(tmp_path: Path) -> None:
    class Late(Bowl):
        """What is second at first is best in the end."""

        @staticmethod
        def loss(choice: Choice, budget: int) -> float:
            found = Bowl.loss(choice, 10**9)
            return found + 1 if choice == BEST and budget == Bowl.max_budget else found

    options: dict[str, Any] = {"objective": "loss", "num_candidates": 36, "sampler": "random", "pruner": "none"}
    one, two = (run_search(recipe(tmp_path / str(n), **options, finalists=n), Late()) for n in (1, 2))
    assert one["chosen"] == label(BEST) != two["chosen"]
    assert one["spent"] == two["spent"] - 2 * Bowl.max_budget
    texts = [(tmp_path / str(n) / "search.md").read_text() for n in (1, 2)]
    assert [", the last two by loss" in text for text in texts] == [False, True]


def test_what_is_looked_at_unless_said_depends_on_the_candidates() -> None:
    given = {"search_dir": "s"}
    assert make_search_recipe(given).search.objective == "layer_error"
    assert make_search_recipe({**given, "search": "dynamic_sparse"}).search.objective == "loss"


def test_hyperband_stops_the_worse_ones_early_and_counts_what_they_had(tmp_path: Path) -> None:
    bowl = Bowl()
    options: dict[str, Any] = {"objective": "loss", "num_candidates": 36, "sampler": "random"}
    summary = run_search(recipe(tmp_path / "s", pruner="hyperband", **options), bowl)
    rows = {row["candidate"]: row for row in summary["candidates"]}
    assert {row["budget"] for row in rows.values()} == {3, 9} and rows[label(BEST)]["budget"] == 9
    # A candidate costs the last budget it reached; beside the dense model that is all there is.
    assert summary["spent"] == 9 + sum(row["budget"] for row in rows.values())
    stopped = [row["value"] for row in rows.values() if row["budget"] == 3 and row["value"] is not None]
    finished = [Bowl.loss(own, 3) for own in every_choice() if rows.get(label(own), {}).get("budget") == 9]
    assert len(stopped) > len(rows) / 4 and min(finished) < min(stopped)
    assert sum(stopped) / len(stopped) > sum(finished) / len(finished)


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


def test_a_stability_table_is_made_once_and_paid_for(tmp_path: Path) -> None:
    class Steady(Bowl):
        setting = SpectrumSetting(k=3, sequences=2, length=16)
        least_length = 8
        asked = 0

        def spectra(self, choice: Choice | None, budget: int, settings: list[SpectrumSetting]) -> list[Any]:
            type(self).asked += 1
            loss = 0.0 if choice is None else self.loss(choice, budget)
            return [(self.spectrum(2 * loss), 0.5) for _ in settings]

    options: dict[str, Any] = {"objective": "loss", "num_candidates": 16, "sampler": "random"}
    plain = run_search(recipe(tmp_path / "plain", **options), Steady())
    own = recipe(tmp_path / "s", **options, stability_candidates=4)
    summary = run_search(own, Steady())
    assert summary["stability"][0]["correlation"] == pytest.approx(1) and summary["stability"][0]["seconds"] == 0.5
    # Four candidates and the dense model, three epochs each.
    assert summary["spent"] == plain["spent"] + 5 * 3 and Steady.asked == 5
    again = run_search(own, Steady(), resume=True)
    assert again["spent"] == summary["spent"] and Steady.asked == 5
    # Where nothing is left for it there is none.
    tight = recipe(tmp_path / "t", **options, stability_candidates=4, total_budget=plain["spent"])
    assert "stability" not in run_search(tight, Steady()) and Steady.asked == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "grid"}, "sampler: 'grid' is unknown"),
        ({"pruner": "median"}, "pruner: 'median' is unknown"),
        ({"objective": "beauty"}, "objective: 'beauty' is unknown"),
        ({"num_candidates": 1}, "num_candidates: 1 is too few"),
        ({"finalists": 3}, "finalists: 3 is no choice"),
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


def test_an_embedding_is_not_fitted_to_what_it_judges_or_to_spectra_of_another_length(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pruner": "none", "sampler": "random", "num_candidates": 6}
    run_search(recipe(tmp_path / "first", **options), Bowl())
    fitted: dict[str, Any] = {**options, "distance": "pca", "distance_runs": str(tmp_path / "first")}
    with pytest.raises(BadInputError, match="measured these very candidates; name one of another search_seed"):
        run_search(recipe(tmp_path / "s", **fitted), Bowl())

    class Wide(Bowl):
        setting = SpectrumSetting(k=4, sequences=1, length=16)

    with pytest.raises(BadInputError, match=r"have 3 exponents and these 4; take the num_exponents"):
        run_search(recipe(tmp_path / "s", **fitted, search_seed=1), Wide())
    assert not (tmp_path / "s").exists()


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
