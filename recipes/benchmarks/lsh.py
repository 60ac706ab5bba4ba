"""Does the distance of Lyapunov spectra choose better than the early loss? Searches played again on a truth table.

    python recipes/benchmarks/lsh.py --truth FOLDER --readme recipes/benchmarks/LSH.md

FOLDER holds a run for the dense model and for every candidate, as lsh_replay.py describes them. Nothing is trained
here: whatever trains the candidates saves them with `save_run`, one file a run, so that it can be cut and goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lsh_replay import DENSE, load_truth, replay, to_markdown

from hf_prune.bench.summary import write_between_markers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    if not (given.truth / f"{DENSE}.safetensors").is_file():
        raise SystemExit(f"{given.truth} holds no {DENSE}.safetensors: the truth table has to be trained first")
    dense, candidates = load_truth(given.truth)
    if len(candidates) < 9:
        raise SystemExit(f"{given.truth} holds {len(candidates)} candidates; a replay wants 9 or more")
    text = to_markdown(replay(dense, candidates, range(given.seeds)), dense, candidates)
    print(text)
    if given.readme:
        write_between_markers(given.readme, "lsh", text)


if __name__ == "__main__":
    main()
