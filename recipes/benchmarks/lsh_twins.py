"""One way of dynamic sparse training against its dense twin, over seeds and sparsities.

    python recipes/benchmarks/lsh_twins.py --config recipes/benchmarks/lsh.yaml --runs FOLDER --sparsities 0.67 0.8 \
        --death global_magnitude --redistribution magnitude --death_rate '[0.5]' --readme recipes/benchmarks/LSH.md

Every key of the recipe that holds a list has to be given one value, the last of them as a list of one. A seed decides
the first weights, the first masks and the order of the batches, alike for a sparse run and its twin. What is finished
is not trained again. Each training is left at its best epoch by the validation text (`--validation`, as for
lsh_truth.py); perplexity is of the evaluation text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lsh_replay import spread
from lsh_runs import DENSE, Run, claim, is_there, load_run, save_run
from lsh_truth import Texts, identity, trained

from hf_prune.bench.summary import write_between_markers
from hf_prune.cli.arguments import quiet_libraries
from hf_prune.recipe import parse_flags, read_recipe
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.trained import TrainedCandidates

Runs = dict[tuple[str, int], Run]
"""By `dense` or a sparsity, and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--sparsities", nargs="+", default=["0.67", "0.8"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation")
    parser.add_argument("--readme", type=Path)
    given, others = parser.parse_known_args()
    quiet_libraries()
    values, text = read_recipe(given.config, parse_flags(others))
    runs: Runs = {}
    for kind in (DENSE, *given.sparsities):
        for seed in range(given.seeds):
            name = f"{kind}, seed={seed}"
            own = {"seed": seed, "objective": "loss"} | ({} if kind == DENSE else {"sparsity": kind})
            candidates = TrainedCandidates(make_search_recipe({**values, **own}, text))
            choice, *more = candidates.space.combinations()
            if more:
                raise SystemExit(f"{', '.join(candidates.space.axes)}: give each one value")
            texts = Texts.of(candidates, given.validation)
            claim(given.runs, {**identity(candidates, texts, ("seed", "sparsity")), **choice})
            if not is_there(given.runs, name):
                run = trained(candidates, texts, None if kind == DENSE else candidates.config(choice))
                save_run(given.runs, name, run)
                print(f"{name}: perplexity {run.perplexity:.2f}", flush=True)
            runs[kind, seed] = load_run(given.runs, name)
    table = to_markdown(runs)
    print(table)
    if given.readme:
        write_between_markers(given.readme, "lsh-twins", table)


def to_markdown(runs: Runs) -> str:
    """A row for each sparsity, mean ± standard deviation over the seeds; the change is that from a seed's own twin."""
    lines = ["| sparsity | perplexity | change from dense | seeds better than dense |", "|---|---|---|---|"]
    for kind in dict.fromkeys(kind for kind, _ in runs):
        own = {seed: run.perplexity for (name, seed), run in runs.items() if name == kind}
        changes = [perplexity - runs[DENSE, seed].perplexity for seed, perplexity in own.items()]
        cells = [spread(list(own.values()), ".2f")]
        cells += ["", ""] if kind == DENSE else [
            spread(changes, "+.2f"),
            f"{sum(change < 0 for change in changes)} of {len(changes)}",
        ]  # fmt: skip
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
