"""What a sweep's winner must satisfy: `ppl_ratio<=1.05, size<=0.6`, and which line that is."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

from hf_prune.errors import BadInputError

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
# What a constraint may name, and what it is.
QUANTITIES = {
    "ppl_ratio": "perplexity over the dense model's",
    "perplexity": "perplexity on the evaluation text",
    "size": "parameters that are not zero over all of the dense model's",
    "sparsity": "share of zeros among the pruned weights",
    "speed": "decoded tokens a second over the dense model's",
}


def parse_constraint(text: str) -> list[tuple[str, str, float]]:
    """`ppl_ratio<=1.05, size<=0.6` as (quantity, comparison, limit).

    Raises:
        BadInputError: a part is no comparison, or names no quantity.
    """
    parsed = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", part)
        if not found or found[1] not in QUANTITIES:
            raise BadInputError(
                f"constraint: {part.strip()!r} is no comparison such as ppl_ratio<=1.05; it may name "
                f"{', '.join(QUANTITIES)}."
            )
        try:
            parsed.append((found[1], found[2], float(found[3])))
        except ValueError:
            raise BadInputError(f"constraint: {found[3]!r} in {part.strip()!r} is no number.") from None
    return parsed


def _distance(line: Mapping[str, Any], constraint: list[tuple[str, str, float]]) -> float:
    """How far a line is from its limits, as shares of them, added up; infinite where something was not measured."""
    away = 0.0
    for name, sign, limit in constraint:
        if line[name] is None:
            return math.inf
        if not COMPARISONS[sign](line[name], limit):
            away += abs(line[name] - limit) / max(abs(limit), 1e-9)
    return away


def choose(lines: list[dict[str, Any]], constraint: list[tuple[str, str, float]]) -> tuple[dict[str, Any] | None, str]:
    """The line with the lowest perplexity among those that fit, and a sentence; None where none fits."""

    def misses(line: Mapping[str, Any]) -> list[str]:
        return [
            f"{name} is {line[name]:.3g}, not {sign}{limit:g}" if line[name] is not None else f"{name} was not measured"
            for name, sign, limit in constraint
            if line[name] is None or not COMPARISONS[sign](line[name], limit)
        ]

    fitting = sorted((line for line in lines if not misses(line)), key=lambda line: (line["perplexity"], line["size"]))
    if fitting:
        best = fitting[0]
        return best, (
            f"Chosen: {best['row']} at {best['setting']}: perplexity {best['perplexity']:.2f} "
            f"({best['ppl_ratio']:.3f} of dense), size {best['size']:.3f}; {len(fitting)} of {len(lines)} fit."
        )
    nearest = min(lines, key=lambda line: (_distance(line, constraint), line["ppl_ratio"]))
    return None, f"None fits. Nearest: {nearest['row']} at {nearest['setting']}: {'; '.join(misses(nearest))}."
