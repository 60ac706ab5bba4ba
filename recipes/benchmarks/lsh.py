"""Does the distance of Lyapunov spectra choose better than the early loss? Searches played again on a truth table.

    python recipes/benchmarks/lsh.py --truth FOLDER --readme recipes/benchmarks/LSH.md --block lsh --json FILE

FOLDER holds a run for the dense model and for every candidate, as lsh_runs.py describes them and lsh_truth.py trains
them. Nothing is trained here. FILE gets the truth table as text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lsh_replay import METRICS, looks_to_markdown, replay, to_markdown
from lsh_runs import DENSE, RECIPE, figures, is_there, load_truth

from hf_prune.bench.summary import write_between_markers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--block", default="lsh", help="between whose markers of the readme the tables go")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    given = parser.parse_args()
    if not is_there(given.truth, DENSE):
        raise SystemExit(f"{given.truth} holds no {DENSE}.safetensors: the truth table has to be trained first")
    if not (given.truth / RECIPE).is_file():
        raise SystemExit(f"{given.truth} holds no {RECIPE}: its runs are of another release; train them again")
    dense, candidates = load_truth(given.truth)
    if len(candidates) < 9:
        raise SystemExit(f"{given.truth} holds {len(candidates)} candidates; a replay wants 9 or more")
    seeds = range(given.seeds)
    searches = to_markdown(replay(dense, candidates, seeds, given.metrics), dense, candidates)
    text = f"{searches}\n\n{looks_to_markdown(dense, candidates, seeds, given.metrics)}"
    print(text)
    if given.readme:
        write_between_markers(given.readme, given.block, text)
    if given.json:
        given.json.write_text(json.dumps(figures(dense, candidates), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
