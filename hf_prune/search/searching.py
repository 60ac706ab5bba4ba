"""What each process of a search does: draw a candidate and have it measured, within what may be spent.

Everything that is decided follows from what stands in the study's folder, so that several processes share the work and
a search that was killed goes on where it was.
"""

from __future__ import annotations

import logging
import math
import time
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_prune.errors import RunError
from hf_prune.search.arguments import SearchRecipe
from hf_prune.search.candidates import Candidates
from hf_prune.search.measuring import Measuring, measure_of
from hf_prune.search.space import Choice, label
from hf_prune.search.stability import rank_stability_if_any
from hf_prune.search.study import StudyFolder, best_first, counted, drawn, found
from hf_prune.search.summary import summarise

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)
# Seconds between two looks at what the others are doing.
PAUSE = 0.5
# Seconds to wait for another process to say what it has drawn; one that was killed in between never will.
LONGEST_DRAW = 5


class Search:
    """What each process does with the study."""

    def __init__(self, recipe: SearchRecipe, candidates: Candidates) -> None:
        self.arguments = recipe.search
        self.candidates = candidates
        # Before anything is written: there may be nothing that an embedding can be fitted to.
        distance = measure_of(recipe, candidates)
        self.folder = StudyFolder(recipe.folder, recipe.search, candidates.space, candidates.max_budget)
        self.measuring = Measuring(recipe, candidates, self.folder, distance)

    # What has been spent.

    def spent(self, trials: list[FrozenTrial]) -> tuple[int, float]:
        """Budget and seconds of everything measured so far, the dense model and the stability table included."""
        nothing = {"spent": 0, "seconds": 0.0}
        beside = [self.folder.study.user_attrs.get(what) or nothing for what in ("dense", "stability")]
        return (
            sum(own["spent"] for own in beside) + sum(found(trial).get("spent", 0) for trial in trials),
            sum(own["seconds"] for own in beside) + sum(found(trial).get("seconds", 0.0) for trial in trials),
        )

    def may_spend(self, budget: int, trials: list[FrozenTrial]) -> bool:
        """Whether so much more is within the limits, beside what other processes are measuring."""
        from optuna.trial import TrialState

        own = self.arguments
        if own.total_budget is None and own.max_minutes is None:
            return True
        used, seconds = self.spent(trials)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING and not found(trial)]
        used += sum(self.candidates.cost(self.measuring.budgets_of(trial)) for trial in running)
        within = own.total_budget is None or used + budget <= own.total_budget
        return within and (own.max_minutes is None or seconds < 60 * own.max_minutes)

    # Measuring.

    def draw(self, helpers: list[Any]) -> None:
        """Draw candidates until there are enough, or what may be spent is."""
        while True:
            while self.step():
                pass
            self.settle(helpers)
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
        budgets = self.measuring.budgets if own.pruner == "hyperband" else [own.first_budget]
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
        self.measuring.candidate(trial, choice)

    def _known(self, name: str, budget: int, before: list[FrozenTrial]) -> FrozenTrial | None:
        """An earlier trial of the same candidate at the same budget, which may still run."""
        first = self.arguments.first_budget
        for other in before:
            same = label(other.params) == name and other.user_attrs.get("budget", first) == budget
            if same and "duplicate_of" not in other.user_attrs:
                return other
        return None

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

    # Other processes.

    def settle(self, helpers: list[Any]) -> None:
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


def _queued(trials: list[FrozenTrial]) -> bool:
    return any(_waits(trial) for trial in trials)


def _waits(trial: FrozenTrial) -> bool:
    """Whether a trial is in the queue."""
    from optuna.trial import TrialState

    return trial.state == TrialState.WAITING
