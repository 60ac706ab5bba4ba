"""Rounds of a search: the better ones of those that are left get more, until the last are compared by loss."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from hf_prune.search.searching import Search
from hf_prune.search.space import elimination_rounds, label
from hf_prune.search.study import best_first, found

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)
# The round of those that are left, with the whole budget.
FINAL = 1000


class Rounds:
    """What the process that leads does once candidates are drawn."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.folder = search.folder
        self.arguments = search.arguments
        self.max_budget = search.candidates.max_budget

    def eliminate(self, helpers: list[Any]) -> list[FrozenTrial]:
        """The best two or fewer, best first, after the rounds that there are."""
        survivors = self.search.best_drawn()
        if self.arguments.pruner != "elimination":
            return _last_two(survivors, [])
        before = survivors
        for number, (kept, budget) in enumerate(
            elimination_rounds(len(survivors), self.arguments.first_budget, self.arguments.budget_step), start=1
        ):
            before, survivors = survivors, survivors[:kept]
            budget = min(budget, self.max_budget)
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
        budget = self.max_budget
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
        if missing and not self.search.may_spend(budget * len(missing), self.folder.trials()):
            logger.info("What may be spent is: no further round.")
            return None
        self.folder.study.set_user_attr("rounds", True)
        for own in missing:
            self.folder.enqueue(own.params, round=number, budget=budget)
        self.search.settle(helpers)
        done = [own for own in self._round(number) if own.state == TrialState.COMPLETE and label(own.params) in names]
        # A candidate that was measured at this budget before stands there with its figures.
        earlier = {own.number: own for own in self.folder.trials()}
        return [earlier[own.user_attrs.get("duplicate_of", own.number)] for own in done]

    def _budget(self, trial: FrozenTrial) -> int:
        """What a trial was measured with."""
        return int(found(trial).get("reached") or trial.user_attrs.get("budget", self.arguments.first_budget))

    def _round(self, number: int) -> list[FrozenTrial]:
        return [trial for trial in self.folder.trials() if trial.user_attrs.get("round") == number]


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
