"""What each process of a search does: draw a candidate, measure it, drop most of them round by round.

Everything that is decided follows from what stands in the study's folder, so that several processes share the work and
a search that was killed goes on where it was.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.dynamics.distance import Distance, make_distance, with_loss
from hf_prune.dynamics.names import DISTANCES
from hf_prune.errors import BadInputError, RunError
from hf_prune.search.arguments import SearchRecipe
from hf_prune.search.candidates import Candidates, Measurement
from hf_prune.search.space import Choice, elimination_rounds, label
from hf_prune.search.stability import rank_stability_if_any
from hf_prune.search.study import (
    DENSE,
    STORAGE,
    StudyFolder,
    attributes_on_disk,
    best_first,
    counted,
    drawn,
    found,
    spectra_of,
)
from hf_prune.search.summary import summarise

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)
# Seconds between two looks at what the others are doing.
PAUSE = 0.5
# Seconds to wait for another process to say what it has drawn; one that was killed in between never will.
LONGEST_DRAW = 5
# The round of those that are left, with the whole budget.
FINAL = 1000


def _measure_of(recipe: SearchRecipe, candidates: Candidates) -> Distance:
    """The distance that a search names, fitted to the spectra of the other search where it is to be fitted.

    Raises:
        BadInputError: the other search has no spectra, of another length, or of the very candidates that are judged.
    """
    own = recipe.search
    if not own.distance_runs:
        return make_distance(own.distance, None, own.search_seed)
    folder = Path(own.distance_runs).expanduser()
    others = spectra_of(folder)
    if candidates.setting is not None and others.shape[1] != candidates.setting.k:
        raise BadInputError(
            f"distance_runs: spectra in {folder} have {others.shape[1]} exponents and these {candidates.setting.k}; "
            "take the num_exponents of that search."
        )
    raw = replace(recipe, search=replace(own, distance=DISTANCES[0], distance_runs=None))
    if (folder / STORAGE).is_file() and attributes_on_disk(folder / STORAGE)["identity"] == raw.identity:
        raise BadInputError(
            f"distance_runs: the search in {folder} measured these very candidates; name one of another search_seed, "
            "model or text."
        )
    return make_distance(own.distance, others, own.search_seed)


class Search:
    """What each process does with the study."""

    def __init__(self, recipe: SearchRecipe, candidates: Candidates) -> None:
        self.arguments = recipe.search
        self.candidates = candidates
        # Before anything is written: there may be nothing that an embedding can be fitted to.
        self._measure_distance = _measure_of(recipe, candidates)
        self.folder = StudyFolder(recipe.folder, recipe.search, candidates.space, candidates.max_budget)

    # The dense model.

    @property
    def budgets(self) -> list[int]:
        """Every budget that a candidate may be measured at."""
        last = self.candidates.max_budget
        return [*range(self.arguments.first_budget, last, self.arguments.budget_step), last]

    def measure_dense(self) -> None:
        """Once in the life of a study, and of the file of its spectra."""
        study = self.folder.study
        if "dense" in study.user_attrs and (self.folder.folder / DENSE).is_file():
            return
        start = perf_counter()
        seen = self.candidates.dense(self.budgets)
        self.folder.save_spectra(
            "dense",
            {budget: torch.empty(0) if own.spectrum is None else own.spectrum for budget, own in seen.items()},
        )
        measured = {id(own): own for own in seen.values()}.values()
        study.set_user_attr(
            "dense",
            {
                "loss": {str(budget): own.loss for budget, own in seen.items() if math.isfinite(own.loss)},
                "spent": max((own.spent for own in seen.values()), default=0),
                "seconds": perf_counter() - start,
                "spectrum_seconds": sum(own.spectrum_seconds for own in measured),
            },
        )

    @property
    def dense_spectra(self) -> dict[int, Tensor]:
        return self.folder.spectra("dense")

    # What has been spent.

    def spent(self, trials: list[FrozenTrial]) -> tuple[int, float]:
        """Budget and seconds of everything measured so far, the dense model and the stability table included."""
        nothing = {"spent": 0, "seconds": 0.0}
        beside = [self.folder.study.user_attrs.get(what) or nothing for what in ("dense", "stability")]
        return (
            sum(own["spent"] for own in beside) + sum(found(trial).get("spent", 0) for trial in trials),
            sum(own["seconds"] for own in beside) + sum(found(trial).get("seconds", 0.0) for trial in trials),
        )

    def _budgets_of(self, trial: Trial | FrozenTrial) -> list[int]:
        """What a trial is measured at."""
        if self.arguments.pruner == "hyperband" and "budget" not in trial.user_attrs:
            return self.budgets
        return [int(trial.user_attrs.get("budget", self.arguments.first_budget))]

    def may_spend(self, budget: int, trials: list[FrozenTrial]) -> bool:
        """Whether so much more is within the limits, beside what other processes are measuring."""
        from optuna.trial import TrialState

        own = self.arguments
        if own.total_budget is None and own.max_minutes is None:
            return True
        used, seconds = self.spent(trials)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING and not found(trial)]
        used += sum(self.candidates.cost(self._budgets_of(trial)) for trial in running)
        within = own.total_budget is None or used + budget <= own.total_budget
        return within and (own.max_minutes is None or seconds < 60 * own.max_minutes)

    # Measuring.

    def draw(self, helpers: list[Any]) -> None:
        """Draw candidates until there are enough, or what may be spent is."""
        while True:
            while self.step():
                pass
            self._settle(helpers)
            # What another process was thought to spend may have cost nothing.
            if not self._may_draw(self.folder.trials()):
                return

    def step(self) -> bool:
        """Measure one trial, from the queue or drawn; False where there is nothing to do just now."""
        from optuna.trial import TrialState

        trials = self.folder.trials()
        if not _queued(trials) and not self._may_draw(trials):
            return False
        trial = self.folder.ask(len(drawn(trials)))
        choice = self.folder.suggest(trial)
        before = self._drawn_before(trial.number)
        if "queued" not in trial.user_attrs and not self._may_draw(before):
            # Another process was quicker.
            self.folder.study.tell(trial, state=TrialState.FAIL)
            return False
        self._measure(trial, choice, before)
        return True

    def _drawn_before(self, number: int) -> list[FrozenTrial]:
        """The earlier trials once it is known which candidates they are: two processes may draw the same one."""
        until = perf_counter() + LONGEST_DRAW
        while True:
            before = [own for own in self.folder.trials() if own.number < number]
            known = all(own.params.keys() == self.folder.space.axes.keys() for own in before if not _waits(own))
            if known or perf_counter() > until:
                return before
            time.sleep(PAUSE / 10)

    def _may_draw(self, trials: list[FrozenTrial]) -> bool:
        """Whether another candidate may be drawn when these are there."""
        own = self.arguments
        if self.folder.study.user_attrs.get("rounds"):
            return False
        # A space with hardly anything possible in it is drawn from for a while, and not for ever.
        enough = len(counted(trials)) >= own.num_candidates or len(drawn(trials)) >= 20 * own.num_candidates
        budgets = self.budgets if own.pruner == "hyperband" else [own.first_budget]
        return not enough and self.may_spend(self.candidates.cost(budgets), trials)

    def _measure(self, trial: Trial, choice: Choice, before: list[FrozenTrial]) -> None:
        """Measure a trial's candidate, or say why not; `before` are the trials before it."""
        from optuna.trial import TrialState

        study, name = self.folder.study, label(choice)
        refused = self.candidates.space.refused.get(name)
        if refused is not None:
            trial.set_user_attr("refused", refused)
            study.tell(trial, state=TrialState.PRUNED)
            return
        last = int(trial.user_attrs.get("budget", self.arguments.first_budget))
        known = self._known(name, last, before)
        if known is not None:
            trial.set_user_attr("duplicate_of", known.number)
            if known.state == TrialState.COMPLETE:
                study.tell(trial, known.value)
            else:
                study.tell(trial, state=TrialState.PRUNED)
            return
        self._measure_new(trial, choice, self._budgets_of(trial))

    def _known(self, name: str, budget: int, before: list[FrozenTrial]) -> FrozenTrial | None:
        """An earlier trial of the same candidate at the same budget, which may still run."""
        first = self.arguments.first_budget
        for other in before:
            same = label(other.params) == name and other.user_attrs.get("budget", first) == budget
            if same and "duplicate_of" not in other.user_attrs:
                return other
        return None

    def _measure_new(self, trial: Trial, choice: Choice, budgets: list[int]) -> None:
        import optuna

        start = perf_counter()
        spectra: dict[int, Tensor] = {}
        notes: dict[str, Any] = {"spectrum_seconds": 0.0, "spent": 0}
        value = math.inf

        def look(budget: int, seen: Measurement) -> None:
            nonlocal value
            value = self.value(budget, seen)
            notes["spectrum_seconds"] += seen.spectrum_seconds
            notes.update(spent=seen.spent, loss=seen.loss, layer_error=seen.layer_error, reached=budget)
            if seen.spectrum is not None:
                spectra[budget] = seen.spectrum
                notes["distance"] = self.distance(budget, seen.spectrum)
            if len(budgets) > 1:
                trial.report(value, budget)
                if trial.should_prune():
                    raise optuna.TrialPruned

        state = None
        try:
            self.candidates.measure(choice, budgets, look)
        except optuna.TrialPruned:
            state = optuna.trial.TrialState.PRUNED
        except (BadInputError, RunError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
            # What only the model shows (inputs that do not divide into groups, say) is this candidate's own.
            value = math.inf
            notes["sentence"] = " ".join(str(error).split())
            if not isinstance(error, BadInputError):
                # It failed on its way, nobody knows where.
                notes["spent"] = self.candidates.cost(budgets)
        if not math.isfinite(value):
            notes.setdefault("sentence", "loss or spectrum is not finite.")
        if spectra:
            self.folder.save_spectra(f"trial-{trial.number:05d}", spectra)
        notes["seconds"] = perf_counter() - start
        # JSON knows no NaN.
        notes = {key: None if isinstance(own, float) and not math.isfinite(own) else own for key, own in notes.items()}
        trial.set_user_attr("found", notes)
        if state is None:
            self.folder.study.tell(trial, value)
        else:
            self.folder.study.tell(trial, state=state)
        logger.info("%s: %s %.4g, %.1f s", label(choice), self.arguments.objective, value, notes["seconds"])

    def distance(self, budget: int, spectrum: Tensor) -> float:
        """From the dense model's spectrum at the same budget; NaN where the spectrum is not finite."""
        if not bool(spectrum.isfinite().all()):
            return math.nan
        return self._measure_distance(self.dense_spectra[budget], spectrum)

    def value(self, budget: int, seen: Measurement) -> float:
        """The objective, smaller is better; infinite where it is not a number."""
        objective = self.arguments.objective
        if objective == "loss":
            value = seen.loss
        elif objective == "layer_error":
            value = math.nan if seen.layer_error is None else seen.layer_error
        else:
            assert seen.spectrum is not None
            value = self.distance(budget, seen.spectrum)
            if objective == "both":
                loss = self.folder.study.user_attrs["dense"]["loss"][str(budget)]
                value = with_loss(value, self.dense_spectra[budget], seen.loss, loss)
        return value if math.isfinite(value) else math.inf

    # Rounds.

    def best_drawn(self, whole: bool = True) -> list[FrozenTrial]:
        """Distinct candidates that were measured to the end, best first.

        Raises:
            RunError: there is none (with `whole`).
        """
        from optuna.trial import TrialState

        done = [
            trial
            for trial in counted(self.folder.trials())
            if trial.state == TrialState.COMPLETE and "duplicate_of" not in trial.user_attrs
        ]
        if whole and not done:
            raise RunError(
                "search: no candidate was measured; allow more by num_candidates, total_budget or max_minutes."
            )
        return best_first(done)

    def eliminate(self, helpers: list[Any]) -> list[FrozenTrial]:
        """The best two or fewer, best first, after the rounds that there are."""
        survivors = self.best_drawn()
        if self.arguments.pruner != "elimination":
            return _last_two(survivors, [])
        before = survivors
        for number, (kept, budget) in enumerate(
            elimination_rounds(len(survivors), self.arguments.first_budget, self.arguments.budget_step), start=1
        ):
            before, survivors = survivors, survivors[:kept]
            budget = min(budget, self.candidates.max_budget)
            # With the whole budget nothing more can be found out about them.
            if any(self._budget(own) != budget for own in survivors):
                measured = self._again(survivors, number, budget, helpers)
                if measured is None:
                    break
                survivors = best_first(measured)
        return _last_two(survivors, before)

    def finals(self, finalists: list[FrozenTrial], helpers: list[Any]) -> list[FrozenTrial]:
        """The finalists with the whole budget, the lowest loss first, whatever the objective was.

        Where there is to be one, it is the best so far as it is.
        """
        finalists = finalists[: self.arguments.finalists]
        if self.arguments.finalists == 1:
            return finalists
        budget = self.candidates.max_budget
        if any(self._budget(own) != budget for own in finalists):
            finalists = self._again(finalists, FINAL, budget, helpers) or finalists
        infinite = math.inf
        return sorted(
            finalists,
            key=lambda own: (own.value == infinite, found(own).get("loss") or infinite, own.number),
        )

    def _again(
        self, trials: list[FrozenTrial], number: int, budget: int, helpers: list[Any]
    ) -> list[FrozenTrial] | None:
        """Candidates measured again in a round; None where that may not be spent."""
        from optuna.trial import TrialState

        names = {label(own.params) for own in trials}
        there = {label(own.params) for own in self._round(number)}
        missing = [own for own in trials if label(own.params) not in there]
        if missing and not self.may_spend(budget * len(missing), self.folder.trials()):
            logger.info("What may be spent is: no further round.")
            return None
        self.folder.study.set_user_attr("rounds", True)
        for own in missing:
            self.folder.enqueue(own.params, round=number, budget=budget)
        self._settle(helpers)
        done = [own for own in self._round(number) if own.state == TrialState.COMPLETE and label(own.params) in names]
        # A candidate that was measured at this budget before stands there with its figures.
        earlier = {own.number: own for own in self.folder.trials()}
        return [earlier[own.user_attrs.get("duplicate_of", own.number)] for own in done]

    def _budget(self, trial: FrozenTrial) -> int:
        """What a trial was measured with."""
        return int(found(trial).get("reached") or trial.user_attrs.get("budget", self.arguments.first_budget))

    def _round(self, number: int) -> list[FrozenTrial]:
        return [trial for trial in self.folder.trials() if trial.user_attrs.get("round") == number]

    # Other processes.

    def _settle(self, helpers: list[Any]) -> None:
        """Wait until nothing is being measured any more."""
        from optuna.trial import TrialState

        while any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in self.folder.trials()):
            if not self.step():
                self._wait(helpers)

    def _wait(self, helpers: list[Any]) -> None:
        time.sleep(PAUSE)
        if self.folder.put_back():
            logger.warning("A process is gone; what it was measuring is measured again.")
        if helpers and all(helper.poll() is not None for helper in helpers):
            logger.warning("No helper is left; this process goes on alone.")
            helpers.clear()

    # How far spectra can be trusted.

    def measure_stability(self) -> None:
        """A table of the best candidates' spectra in other ways, where one is wanted and may be paid for.

        It is made once for the same candidates.
        """
        study, own, count = self.folder.study, self.arguments, self.arguments.stability_candidates
        if not count or self.candidates.setting is None:
            return
        best = [trial.params for trial in self.best_drawn() if math.isfinite(trial.value or 0)][:count]
        names = [label(choice) for choice in best]
        known = study.user_attrs.get("stability")
        if known and known["of"] == names:
            return
        study.set_user_attr("stability", None)
        # And the dense model.
        price = self.candidates.cost([own.first_budget]) * (len(best) + 1)
        if len(best) < 3 or not self.may_spend(price, self.folder.trials()):
            logger.info("No stability table: %d candidates, or what may be spent is.", len(best))
            return
        start = perf_counter()
        rows = rank_stability_if_any(self.candidates, best, own.first_budget)
        told = {"of": names, "rows": rows, "spent": price, "seconds": perf_counter() - start}
        study.set_user_attr("stability", told if rows else None)

    # What is said of it.

    def summarise(self) -> dict[str, Any]:
        """Candidates, ranking and cost, plain data."""
        return summarise(self.arguments, self.candidates, self.folder, self.spent(self.folder.trials()))

    def candidate_spectra(self, summary: dict[str, Any]) -> dict[str, Tensor]:
        """Spectra of the best candidates by label, at the first budget."""
        spectra = {}
        for row in summary["candidates"]:
            spectrum = self.folder.spectra(f"trial-{row['trial']:05d}").get(self.arguments.first_budget)
            if spectrum is not None:
                spectra[row["candidate"]] = spectrum
        return spectra


def _last_two(ranked: list[FrozenTrial], before: list[FrozenTrial]) -> list[FrozenTrial]:
    """The best two that differ, or fewer, best first.

    Two with the same figures to the last bit are one candidate in other words; where it holds both places, the next
    best `before` gets the second. Earlier rounds keep them: at first all candidates may be the same.
    """
    different: dict[tuple[Any, ...], FrozenTrial] = {}
    for trial in ranked:
        own = found(trial)
        figures = (trial.value, own.get("loss"), own.get("distance"), own.get("layer_error"))
        different.setdefault(figures if math.isfinite(trial.value or 0) else (trial.number,), trial)
    names = {label(trial.params) for trial in ranked}
    others = [trial for trial in before if label(trial.params) not in names]
    numbers = {trial.number for trial in different.values()}
    return [*different.values(), *others, *(trial for trial in ranked if trial.number not in numbers)][:2]


def _queued(trials: list[FrozenTrial]) -> bool:
    return any(_waits(trial) for trial in trials)


def _waits(trial: FrozenTrial) -> bool:
    """Whether a trial is in the queue."""
    from optuna.trial import TrialState

    return trial.state == TrialState.WAITING
