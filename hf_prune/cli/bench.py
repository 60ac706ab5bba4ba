"""hf-prune bench: a grid of recipes and peers, run in turn."""

from __future__ import annotations

import math
from pathlib import Path

from hf_prune.cli.arguments import console, quiet_libraries, split_positional, take_text
from hf_prune.errors import BadInputError, RunError
from hf_prune.fields import coerce

TEXT = """usage: hf-prune bench GRID.yaml --work_folder FOLDER [--results FILE.json] [--readme README.md]
           [--rows NAME ...] [--settings NAME ...] [--seeds N ...] [--at_once N] [--max_minutes N] [--key value ...]

Runs every row of the grid under every setting, each in a process of its own, and scores all of them with one
evaluator. What is finished is kept in the work folder, or in --results, a file to keep and take along: start again to
go on. Writes NAME.csv, NAME.md and NAME.png into the work folder, and the table into the README between its lines
<!-- benchmark:NAME:start --> and <!-- benchmark:NAME:end -->.

--rows and --settings take names, --seeds numbers: only those are run this time; the tables hold everything that is
finished. After --max_minutes no further run is begun. --at_once N prunes N side by side, each with its share of the
processors: more in the same time, where seconds do not count; the table marks them.
A flag that is a recipe key is laid over the grid's common keys; any other fills the {word} of the same name in a peer's
command, which may also name {model}, {token_ids}, {output}, {report} and every recipe key.
"""


def help_text() -> str:
    return TEXT


def main(arguments: list[str]) -> None:
    path, flags = split_positional(arguments, "the benchmark's file")
    work_folder, readme = take_text(flags, "work_folder") or "bench", take_text(flags, "readme")
    results = take_text(flags, "results")
    chosen = [set(coerce(key, flags.pop(key, []), list[str])) for key in ("rows", "settings")]
    seeds = [coerce("seeds", seed, int) for seed in coerce("seeds", flags.pop("seeds", []), list[str])]
    max_minutes = coerce("max_minutes", flags.pop("max_minutes"), float) if "max_minutes" in flags else math.inf
    at_once = max(coerce("at_once", flags.pop("at_once", 1), int), 1)
    from hf_prune.bench import summary
    from hf_prune.bench.grid import load_grid
    from hf_prune.bench.runner import Bench
    from hf_prune.compose import is_recipe_key

    quiet_libraries()
    own = {key: value for key, value in flags.items() if is_recipe_key(key)}
    grid = load_grid(path, own)
    variables = {key: str(value) for key, value in flags.items() if key not in own}
    for key in variables.keys() - grid.words:
        raise BadInputError(f"{key}: neither a key of a recipe nor a word of a peer's command in {path}.")
    bench = Bench(grid, Path(work_folder), variables, results=Path(results) if results else None)
    for names, known_names in zip(chosen, ({row["name"] for row in grid.rows}, set(grid.settings)), strict=True):
        if names - known_names:
            raise BadInputError(f"{min(names - known_names)!r} is neither a row nor a setting of {path}.")
    failures = bench.run(chosen[0], chosen[1], seeds, at_once=at_once, max_minutes=max_minutes)
    lines = summary.summarise(grid, bench.results)
    table = summary.markdown(grid, bench.results, lines)
    folder = Path(work_folder)
    summary.write_csv(folder / f"{grid.name}.csv", lines)
    (folder / f"{grid.name}.md").write_text(table + "\n", encoding="utf-8")
    summary.plot(folder / f"{grid.name}.png", grid, lines)
    if readme:
        summary.write_between_markers(Path(readme), grid.name, table)
    console().print(table, markup=False, soft_wrap=True)
    if failures:
        raise RunError(f"{len(failures)} of {len(grid.cells)} runs failed: {failures[0]}")
