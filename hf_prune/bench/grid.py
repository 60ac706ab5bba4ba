"""What a benchmark file says: common recipe keys, settings, rows; and the cells that they make."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.recipe import RecipeLoader, make_recipe

# Pruning keys that are younger than results that are kept, with the values that those had in effect.
LATER = {"channel_permutation": False}
KEYS = {"name", "title", "common", "settings", "rows", "reference", "allocation_reference", "repeats", "share_learning"}
# Keys of a row that are not recipe keys.
ROW_KEYS = {"name", "seeds", "settings", "command"}
# What a benchmark decides for all rows alike, so that they can be compared.
EVALUATED_ALIKE = ("eval_dataset_name", "model_name_or_path")


@dataclass(frozen=True)
class Cell:
    """One run: a row under a setting with a seed.

    `values` is its flat recipe (for a peer, what its command may name in braces); `command` is a peer's command line.
    `options` are the pruning keys with every default filled in (but for those of LATER): a preset that changes makes
    other runs of its rows.
    """

    row: str
    setting: str
    seed: int
    values: dict[str, Any]
    command: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for the same run, whatever else changes in the file: finished cells are found by it."""
        content = json.dumps([self.values, self.command, self.seed, self.options], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Grid:
    """A parsed benchmark file. Rows and settings keep the file's order.

    Other rows' excess and seconds are also given as multiples of those of row `reference`, and their allocations are
    compared with that of row `allocation_reference`. With `share_learning` rows with the same learned allocation learn
    it once (side by side they may learn at the same time, to the same end): seconds of later ones hold no learning.
    """

    name: str
    title: str
    common: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    reference: str | None = None
    allocation_reference: str | None = None
    repeats: int = 1
    share_learning: bool = False
    cells: list[Cell] = field(default_factory=list)

    @property
    def words(self) -> set[str]:
        """What the peers' commands name in braces."""
        commands = [cell.command for cell in self.cells if cell.command is not None]
        return {word for command in commands for _, word, _, _ in Formatter().parse(command) if word}


def load_grid(path: str | Path, flags: dict[str, Any] | None = None) -> Grid:
    """Read a benchmark file; `flags` are laid over its common keys.

    Raises:
        BadInputError: the file is missing or broken, a key is unknown, or a row's recipe cannot be used.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)  # a SafeLoader: plain data
    except OSError as error:
        raise BadInputError(f"{path}: the benchmark cannot be read ({error.strerror}); check the path.") from None
    except yaml.YAMLError:
        raise BadInputError(f"{path}: not valid YAML; see recipes/benchmarks/ for one that is.") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise BadInputError(f"{path}: a benchmark has a list of rows; see recipes/benchmarks/ for one that has.")
    for key in content.keys() - KEYS:
        raise BadInputError(f"{key}: unknown key of a benchmark; it knows {', '.join(sorted(KEYS))}.")
    common = {**(content.get("common") or {}), **(flags or {})}
    return make_grid({"name": Path(path).stem, **content, "common": common})


def make_grid(content: dict[str, Any]) -> Grid:
    """A grid from the mapping that a benchmark file holds.

    Raises:
        BadInputError: a row's recipe cannot be used, or rows and names do not fit together.
    """
    common, settings = content["common"], content.get("settings") or {"": {}}
    grid = Grid(
        name=str(content["name"]),
        title=str(content.get("title") or ""),
        common=common,
        settings=settings,
        rows=content["rows"],
        reference=content.get("reference"),
        allocation_reference=content.get("allocation_reference"),
        repeats=int(content.get("repeats") or 1),
        share_learning=bool(content.get("share_learning")),
    )
    make_recipe(common).require(*EVALUATED_ALIKE)
    names = [row.get("name") for row in grid.rows]
    if None in names or len(set(names)) < len(names):
        raise BadInputError("rows: every row needs a name of its own.")
    for key in ("reference", "allocation_reference"):
        if getattr(grid, key) is not None and getattr(grid, key) not in names:
            listed = ", ".join(map(str, names))
            raise BadInputError(f"{key}: {getattr(grid, key)!r} is no row; choose one of {listed}.")
    cells = [cell for row in grid.rows for cell in _cells(grid, row)]
    # A setting is finished before the next begins, and in it a seed: what is compared runs close together.
    grid.cells.extend(sorted(cells, key=lambda cell: (list(grid.settings).index(cell.setting), cell.seed)))
    return grid


def _cells(grid: Grid, row: dict[str, Any]) -> list[Cell]:
    """A row's runs over its settings and seeds, each recipe checked."""
    wanted = row.get("settings") or list(grid.settings)
    for name in wanted:
        if name not in grid.settings:
            raise BadInputError(f"settings: {row['name']} names {name!r}, which is none; it is {list(grid.settings)}.")
    own = {key: value for key, value in row.items() if key not in ROW_KEYS}
    cells = []
    for setting in wanted:
        for seed in row.get("seeds") or [grid.common.get("seed", 0)]:
            values = {**grid.common, **grid.settings[setting], **own, "seed": seed}
            recipe = make_recipe(values)
            options: dict[str, Any] = {}
            if row.get("command") is None:
                config = make_config(recipe.prune_options)
                everything = {**vars(config), **config.options}
                options = {key: value for key, value in everything.items() if LATER.get(key, ...) != value}
            cells.append(Cell(row["name"], setting, int(seed), values, row.get("command"), options))
    return cells
