"""hf-prune sweep: every combination of a recipe's choices on one's own model, and the one that fits."""

from __future__ import annotations

from pathlib import Path

from hf_prune.cli.arguments import console, quiet_libraries, recipe_help, take_text
from hf_prune.errors import BadInputError, RunError
from hf_prune.fields import coerce
from hf_prune.recipe import dump_yaml, parse_flags, read_values

TEXT = """Tries every combination of the keys that hold a list, as in sparsity: [0.5, 0.6] or
allocation: [uniform, fcpts] or seed: [0, 1, 2], each in a process of its own on the same windows, and scores
all with one evaluator. What is finished is kept in --work_folder (sweep unless given): start again to go on. Writes
NAME.csv, NAME.md and NAME.png (the Pareto frontier) there.

--constraint "ppl_ratio<=1.05, size<=0.6" chooses the lowest perplexity that fits and writes its recipe, chosen.yaml,
there, or says that none does (exit code 1). It may name ppl_ratio, perplexity, size, sparsity and speed. Weights are
deleted once they are scored; masks, a bit a weight, stay for the overlaps. --at_once N runs N combinations side by
side, each with its share of the processors or a GPU of its own; speeds are then those of a busy machine. Dense
scores, calibration windows and what was learned are shared; with propagate: false the inputs' statistics as well,
which no other choice leaves alike."""


def help_text() -> str:
    return recipe_help("sweep", TEXT)


def main(arguments: list[str]) -> None:
    flags = parse_flags(arguments)
    constraint, work_folder = take_text(flags, "constraint"), take_text(flags, "work_folder") or "sweep"
    at_once = coerce("at_once", flags.pop("at_once", 1), int)
    config = take_text(flags, "config")
    from hf_prune.bench import sweep
    from hf_prune.bench.constraint import choose, parse_constraint
    from hf_prune.bench.runner import Bench
    from hf_prune.bench.summary import write_csv

    quiet_libraries()
    wanted = parse_constraint(constraint) if constraint else []
    name = Path(config).stem if config else "sweep"
    grid, refused = sweep.make_sweep(read_values(config, flags), name)
    folder = Path(work_folder)
    bench = Bench(grid, folder, {})
    model, evaluation = bench.recipe.model, bench.recipe.evaluation
    if not evaluation.eval_efficiency and any(name == "speed" for name, _, _ in wanted):
        raise BadInputError("constraint: speed is not measured; set eval_efficiency to true.")
    options = {
        "dtype": model.dtype,
        "device": model.device,
        "revisions": {"dense": bench.revision} if bench.revision else None,
        "trust_remote_code": model.trust_remote_code,
    }
    bench.look = sweep.Look(folder, str(bench.source.path), options, evaluation.eval_efficiency)
    out = console()
    for sentence in refused:
        out.print(f"Left out: {sentence}", markup=False, soft_wrap=True)
    failures = bench.run(at_once=max(at_once, 1))
    lines = sweep.table(grid, bench.results, folder)
    if not lines:
        raise RunError(f"all {len(grid.cells)} runs failed: {failures[0]}")
    table = sweep.markdown(grid, bench.results, lines)
    write_csv(folder / f"{name}.csv", lines)
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    sweep.plot_pareto(folder / f"{name}.png", lines)
    out.print(table, markup=False, soft_wrap=True)
    if failures:
        raise RunError(f"{len(failures)} of {len(grid.cells)} runs failed: {failures[0]}")
    if wanted:
        chosen, sentence = choose(lines, wanted)
        if chosen is None:
            raise RunError(sentence)
        recipe = folder / "chosen.yaml"
        recipe.write_text(dump_yaml(sweep.recipe_of(grid, chosen)), encoding="utf-8")
        out.print(
            f"\n{sentence}\nhf-prune prune --config {recipe} --output_dir OUT makes it.", markup=False, soft_wrap=True
        )
