"""Sparsity patterns as words: `unstructured`, and `n:m` (at most n of m consecutive inputs are kept)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_prune.errors import BadInputError


@dataclass(frozen=True)
class Pattern:
    """`n` of `m` consecutive inputs kept; both None for unstructured."""

    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `unstructured` or `n:m`; BadInputError for anything else."""
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise BadInputError(f'pattern: {text!r} is neither unstructured nor n:m; write it as "2:4".')
        n, m = int(match[1]), int(match[2])
        if not 1 <= n <= m or m < 2:
            raise BadInputError(f"pattern: {text} must keep between 1 and {max(m, 2)} of at least 2 inputs; try 2:4.")
        return cls(n, m)

    @property
    def density(self) -> float | None:
        """Share of weights kept, None where the pattern leaves it open."""
        return None if self.n is None or self.m is None else self.n / self.m

    def __str__(self) -> str:
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


UNSTRUCTURED = Pattern()
