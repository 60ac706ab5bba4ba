"""What is finished of a benchmark, in one file that may be taken along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_prune.bench.grid import Cell
from hf_prune.errors import BadInputError


class Results:
    """{"runs": {cell: [report, ...]}, "quality": {identity: {digest of the weights: figures}}}, always saved whole.

    `identity` is that of the dense model and the evaluation: the folder may have served others.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.content: dict[str, Any] = {"runs": {}, "quality": {}}
        self.read()

    def read(self) -> None:
        """Take over what the file holds, if there is one."""
        if not self.path.exists():
            return
        try:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            self.content = {}
        if not isinstance(self.content, dict) or self.content.keys() != {"runs", "quality"}:
            raise BadInputError(
                f"results: {self.path} is no file of benchmark results; name another, or remove it to begin anew."
            )

    def runs(self, cell: Cell) -> list[dict[str, Any]]:
        """Reports of a cell's finished runs, oldest first; those that this evaluation has not scored do not count."""
        return [run for run in self.content["runs"].get(cell.key, []) if run["weights"] in self.quality]

    def add(self, cell: Cell, run: dict[str, Any]) -> None:
        """Note one more run of a cell."""
        self.content["runs"].setdefault(cell.key, []).append(run)
        self.save()

    @property
    def quality(self) -> dict[str, dict[str, Any]]:
        """What was measured by the digest of the weights, and `dense`; add to it and save."""
        return self.content["quality"].setdefault(self.identity, {})

    def save(self) -> None:
        """Replace the file in one step."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(_lines(self.content) + "\n")
        temporary.replace(self.path)


def _lines(content: dict[str, Any]) -> str:
    """JSON with a line for each run and each model's figures: a file that is kept changes where it was added to."""

    def write(value: Any, depth: int) -> str:
        if depth == 4 or not value:
            return json.dumps(value)
        opened, closed = "[]" if isinstance(value, list) else "{}"
        names = [""] * len(value) if isinstance(value, list) else [f"{json.dumps(name)}: " for name in value]
        held = value if isinstance(value, list) else value.values()
        lines = [" " * depth + name + write(own, depth + 1) for name, own in zip(names, held, strict=True)]
        return f"{opened}\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}{closed}"

    return write(content, 1)
