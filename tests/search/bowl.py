"""A search space whose losses are known in closed form."""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch

from hf_prune.errors import BadInputError
from hf_prune.search.arguments import SearchRecipe, make_search_recipe
from hf_prune.search.candidates import Look, Measurement
from hf_prune.search.space import Choice, label, make_space

AXES = {"a": [0, 1, 3, 4], "b": ["x", "y", "z"]}
BEST = {"a": 3, "b": "y"}


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
