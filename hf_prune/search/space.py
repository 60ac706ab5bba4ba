"""What is searched: the lists of a recipe, every choice checked before anything is measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import BadInputError

Choice = dict[str, Any]
"""One value for each key that is searched."""


@dataclass(frozen=True)
class Space:
    """Every combination of the axes' values; `refused` are the labels of the impossible ones, each with a sentence."""

    axes: dict[str, list[Any]]
    refused: dict[str, str]

    @property
    def possible(self) -> int:
        """Combinations that can be measured."""
        return len(self.combinations()) - len(self.refused)

    def combinations(self) -> list[Choice]:
        """All of them, impossible ones included."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]


def make_space(axes: Mapping[str, list[Any]], check: Callable[[Choice], None]) -> Space:
    """The space of some axes.

    Args:
        check: raises BadInputError for a combination that cannot be run.

    Raises:
        BadInputError: a value is no number, text or truth, or nothing can be run.
    """
    for key, choices in axes.items():
        for value in choices:
            if value is not None and not isinstance(value, (str, int, float, bool)):
                raise BadInputError(f"{key}: {value!r} is no value to choose; list numbers or words.")
    space = Space({key: list(dict.fromkeys(choices)) for key, choices in axes.items()}, {})
    for choice in space.combinations():
        try:
            check(choice)
        except BadInputError as error:
            space.refused[label(choice)] = str(error)
    if not space.possible:
        first = next(iter(space.refused.values()))
        raise BadInputError(f"{next(iter(axes))}: no combination can be run; the first: {first}")
    return space


def label(choice: Choice) -> str:
    """One candidate's name, the same for the same values."""
    return ", ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in sorted(choice.items())
    )


def elimination_rounds(candidates: int, first_budget: int, step: int) -> list[tuple[int, int]]:
    """Survivors and budget of each round after the first: floor(n/2) + 1 are kept until 2 are left.

    As the authors' code does it: 26 candidates become 14, 8, 5, 3 and 2, measured again each time.
    """
    rounds = []
    budget = first_budget
    while candidates > 2:
        candidates, budget = candidates // 2 + 1, budget + step
        rounds.append((candidates, budget))
    return rounds
