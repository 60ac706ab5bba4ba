"""Small networks trained here, most units of one group removed: is fusing them better than dropping them?

    python recipes/benchmarks/intra_fusion_digits.py --work_folder FOLDER --readme recipes/benchmarks/DIGITS.md

The experiments of the Intra-Fusion paper (Theus et al., 2024) in shape, on scikit-learn's 8 x 8 digits: an MLP and a
small VGG with its BatchNorm folded, one group of units pruned (l1 importance, exact transport), without and with
fine-tuning; and its PaF and FaP, which train two networks on halves of the data and make them one. Accuracy is over the
450 digits that no training saw. What is finished is kept in FOLDER/intra_fusion_digits.json: the same command goes on;
--networks and --seeds choose a part, which is then what the tables are of.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from digit_networks import (
    BATCH,
    HELD_OUT,
    Digits,
    accuracy,
    fold,
    fuse_networks,
    intra_fusion,
    layers,
    load,
    mlp,
    prune_everywhere,
    train,
    vgg,
)
from torch import nn

from hf_prune.bench.summary import write_between_markers

NETWORKS = {"MLP": mlp, "VGG": vgg}
# Network -> the hidden groups that are pruned, one at a time, by the layer that makes the units.
GROUPS = {"MLP": {"1st layer": 0, "2nd layer": 1}, "VGG": {"2nd convolution": 1, "4th convolution": 3}}
REMOVED, TUNED_REMOVED = (0.4, 0.6, 0.8, 0.9), (0.4, 0.6, 0.8)
# Rule -> normalisation and solver; where the normalisation is empty, nothing is fused.
RULES = {
    "dropped": ("", "emd"),
    "preserve": ("preserve", "emd"),
    "code": ("code", "emd"),
    "target": ("target", "emd"),
    "preserve, nearest": ("preserve", "nearest"),
}
TUNED_RULES = ("dropped", "preserve", "code", "target")
TRAINING_STEPS, TRAINING_RATE, TUNING_RATE = 600, 0.05, 0.01
SHOWN_STEPS = (0, 50, 200, 500)
# PaF and FaP: epochs, the share of every group's units that is removed, and how many samples align two networks.
EPOCHS, TUNING_EPOCHS, REMOVED_EVERYWHERE, SAMPLES = 20, 10, 0.6, 200
COSTS = {"steps": ".0f", "seconds": ".1f"}


class Results:
    """What is finished, in one file that is replaced in one step.

    Two kinds of rows, "group" and "split", each under the words that name it; a file of other settings is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = {
            "training": [TRAINING_STEPS, TRAINING_RATE],
            "tuning": [SHOWN_STEPS[-1], TUNING_RATE],
            "split": [EPOCHS, TUNING_EPOCHS, REMOVED_EVERYWHERE, SAMPLES],
        }
        self.rows: dict[str, dict[str, dict]] = {"group": {}, "split": {}}
        if path.exists():
            content = json.loads(path.read_text())
            if content["settings"] != self.settings:
                raise SystemExit(f"{path} was made with other settings; give another --work_folder.")
            self.rows = content["rows"]
            for row in self.rows["group"].values():
                row["curve"] = {int(step): value for step, value in row["curve"].items()}

    def missing(self, kind: str, **words: object) -> bool:
        """Whether such a row is yet to be made."""
        return self._key(words) not in self.rows[kind]

    def add(self, kind: str, words: dict, measured: dict) -> None:
        """Note a row and save all."""
        self.rows[kind][self._key(words)] = words | measured
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
        temporary.replace(self.path)

    def of(self, kind: str, networks: list[str], seeds: list[int]) -> list[dict]:
        """The rows of a kind, oldest first."""
        return [row for row in self.rows[kind].values() if row["network"] in networks and row["seed"] in seeds]

    @staticmethod
    def _key(words: dict) -> str:
        return ", ".join(map(str, words.values()))


def prune_one_group(name: str, seed: int, results: Results) -> None:
    """Rows of one trained network, a line for each group, share and rule."""
    cells = [
        {"network": name, "group": group, "removed": removed, "rule": rule, "seed": seed}
        for group in GROUPS[name]
        for removed in REMOVED
        for rule in RULES
    ]
    cells = [words for words in cells if results.missing("group", **words)]
    if not cells:
        return
    training, held_out = load(seed)
    torch.manual_seed(seed)
    dense = NETWORKS[name]()
    train(dense, training, TRAINING_STEPS, TRAINING_RATE, seed)
    dense = fold(dense)
    for words in cells:
        number, removed, rule = GROUPS[name][words["group"]], words["removed"], words["rule"]
        units = layers(dense)[number].weight.shape[0]
        start = time.perf_counter()
        pruned = intra_fusion(dense, number, units - round(removed * units), *RULES[rule])
        measured = {"pruning_seconds": time.perf_counter() - start, "dense": accuracy(dense, held_out)}
        measured["curve"] = {0: accuracy(pruned, held_out)}
        if removed in TUNED_REMOVED and rule in TUNED_RULES:
            measured |= tune(pruned, training, held_out, seed)
        results.add("group", words, measured)


def tune(network: nn.Sequential, training: Digits, held_out: Digits, seed: int) -> dict:
    """Fine-tune in place: accuracy by step, and the seconds of a step."""
    curve: dict[int, float] = {}

    def look(step: int) -> None:
        curve[step] = accuracy(network, held_out)

    seconds = train(network, training, SHOWN_STEPS[-1], TUNING_RATE, seed, look)
    return {"curve": curve, "step_seconds": seconds / SHOWN_STEPS[-1]}


@dataclass(frozen=True)
class Trained:
    """A network with the steps and seconds that it took, one step after the other."""

    network: nn.Sequential
    steps: int = 0
    seconds: float = 0.0

    def trained(self, digits: Digits, epochs: float, rate: float, seed: int) -> "Trained":
        """Trained further, in place."""
        steps = round(epochs * len(digits) / BATCH)
        seconds = train(self.network, digits, steps, rate, seed)
        return Trained(self.network, self.steps + steps, self.seconds + seconds)

    def changed(self, change: Callable[[nn.Sequential], nn.Sequential]) -> "Trained":
        """With another network in its place."""
        start = time.perf_counter()
        network = change(self.network)
        return Trained(network, self.steps, self.seconds + time.perf_counter() - start)

    def fused(self, other: "Trained", training: Digits) -> "Trained":
        """One of two, that were trained side by side: the slower one's time counts."""
        slower = Trained(self.network, max(self.steps, other.steps), max(self.seconds, other.seconds))
        return slower.changed(lambda network: fuse_networks(network, other.network, training.images[:SAMPLES]))


def split_data(name: str, seed: int, results: Results) -> None:
    """Rows of PaF, FaP and what they are measured against; 60 % of the units of every group are removed in each."""
    training, held_out = load(seed)
    half = len(training) // 2
    halves = training[:half], training[half:]

    def fresh(digits: Digits, number: int = 0, epochs: float = EPOCHS) -> Trained:
        torch.manual_seed(100 * seed + number)
        return Trained(NETWORKS[name]()).trained(digits, epochs, TRAINING_RATE, seed).changed(fold)

    def tuned(network: Trained, digits: Digits, epochs: float = TUNING_EPOCHS) -> Trained:
        return network.trained(digits, epochs, TUNING_RATE, seed)

    def pruned(network: Trained, normalization: str = "preserve") -> Trained:
        return network.changed(lambda own: prune_everywhere(own, REMOVED_EVERYWHERE, normalization))

    def paf() -> Trained:
        one, other = (tuned(pruned(fresh(own, number)), own) for number, own in enumerate(halves))
        return tuned(one.fused(other, training), training)

    def fap() -> Trained:
        one, other = (fresh(own, number) for number, own in enumerate(halves))
        return tuned(pruned(tuned(one.fused(other, training), training, TUNING_EPOCHS / 2)), training)

    contestants = {
        "whole data, dropped": lambda: tuned(pruned(fresh(training), ""), training),
        "whole data": lambda: tuned(pruned(fresh(training)), training),
        "PaF": paf,
        "FaP": fap,
        # What the second network and its fusion add, and what the steps that are saved would have cost.
        "FaP with the first network alone": lambda: tuned(
            pruned(tuned(fresh(halves[0]), training, TUNING_EPOCHS / 2)), training
        ),
        "whole data, as many steps as FaP": lambda: tuned(
            pruned(fresh(training, epochs=(EPOCHS + TUNING_EPOCHS) / 2)), training
        ),
    }
    for contestant, work in contestants.items():
        words = {"network": name, "contestant": contestant, "seed": seed}
        if results.missing("split", **words):
            done = work()
            measured = {"accuracy": accuracy(done.network, held_out), "steps": done.steps, "seconds": done.seconds}
            results.add("split", words, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    arguments.work_folder.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.work_folder / "intra_fusion_digits.json")
    start = time.perf_counter()
    for name in arguments.networks:
        for seed in arguments.seeds:
            prune_one_group(name, seed, results)
            split_data(name, seed, results)
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    groups, halves = (results.of(kind, arguments.networks, arguments.seeds) for kind in ("group", "split"))
    text = "\n\n".join([at_once_table(groups), tuned_table(groups), split_table(halves)])
    print(text)
    if arguments.readme:
        write_between_markers(arguments.readme, "intra_fusion_digits", text)


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def lines(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)])


def at_once_table(rows: list[dict]) -> str:
    """Accuracy without fine-tuning: groups and shares down, rules across."""
    body = []
    for name, group, removed in unique(rows, "network", "group", "removed"):
        own = [row for row in rows if (row["network"], row["group"], row["removed"]) == (name, group, removed)]
        cells = [spread([row["curve"][0] for row in own if row["rule"] == rule]) for rule in RULES]
        body.append([f"{name}, {group}", f"{100 * removed:.0f} %", *cells])
    dense = "; ".join(
        f"{name} {spread([row['dense'] for row in unique_networks(rows) if row['network'] == name])}"
        for (name,) in unique(rows, "network")
    )
    seeds = len({row["seed"] for row in rows})
    return lines(["group", "units removed", *RULES], body) + (
        f"\n\nAccuracy in % without fine-tuning, {HELD_OUT} held-out digits, mean and standard deviation over {seeds} "
        f"trained networks; dense: {dense}."
    )


def tuned_table(rows: list[dict]) -> str:
    """Accuracy by steps of fine-tuning, and when each rule reaches dropping's last accuracy."""
    rows = [row for row in rows if len(row["curve"]) > 1]
    last = SHOWN_STEPS[-1]
    case = ("network", "group", "removed")
    goals = {(*(row[key] for key in case), row["seed"]): row["curve"][last] for row in rows if row["rule"] == "dropped"}
    body = []
    for name, group, removed, rule in unique(rows, *case, "rule"):
        own = [row for row in rows if tuple(row[key] for key in (*case, "rule")) == (name, group, removed, rule)]
        steps = [first_reached(row["curve"], goals[name, group, removed, row["seed"]]) for row in own]
        reached = [(row, step) for row, step in zip(own, steps, strict=True) if step is not None]
        seconds = [row["pruning_seconds"] + step * row["step_seconds"] for row, step in reached]
        body.append(
            [
                f"{name}, {group}",
                f"{100 * removed:.0f} %",
                rule,
                *(spread([row["curve"][step] for row in own]) for step in SHOWN_STEPS),
                f"{statistics.median(step for _, step in reached):.0f}" if reached else "",
                f"{statistics.median(seconds):.2f}" if reached else "",
                f"{len(reached)} of {len(own)}",
            ]
        )
    shown = [f"{step} steps" for step in SHOWN_STEPS]
    head = ["group", "units removed", "rule", *shown, "steps to it", "seconds to it", "reached it"]
    return lines(head, body) + (
        f"\n\nAccuracy in % with fine-tuning. 'It' is dropping's accuracy after {last} steps on the same network, "
        "looked for every 10 steps: medians of the networks that reached it, with pruning in the seconds."
    )


def split_table(rows: list[dict]) -> str:
    """Accuracy, steps and seconds of what was trained on halves and on the whole."""
    names = [name for (name,) in unique(rows, "network")]
    body = []
    for (contestant,) in unique(rows, "contestant"):
        cells = []
        for name in names:
            own = [row for row in rows if (row["network"], row["contestant"]) == (name, contestant)]
            cells += [spread([row["accuracy"] for row in own])]
            cells += [f"{statistics.median(row[key] for row in own):{form}}" for key, form in COSTS.items()]
        body.append([contestant, *cells])
    head = ["", *(f"{name} {what}" for name in names for what in ("accuracy", *COSTS))]
    return lines(head, body) + (
        f"\n\n{100 * REMOVED_EVERYWHERE:.0f} % of every group's units removed, after {EPOCHS} epochs of training and "
        f"with {TUNING_EPOCHS} of fine-tuning. Networks of two halves count as trained side by side: the slower one's "
        "steps and seconds. Units are fused (preserve) but where they are dropped."
    )


def first_reached(curve: dict[int, float], goal: float) -> int | None:
    """The first step at which an accuracy is reached."""
    return next((step for step, value in sorted(curve.items()) if value >= goal), None)


def unique(rows: list[dict], *keys: str) -> list[tuple]:
    """The combinations of values that occur, in their order."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def unique_networks(rows: list[dict]) -> list[dict]:
    """One row of each trained network."""
    return list({(row["network"], row["seed"]): row for row in rows}.values())


if __name__ == "__main__":
    main()
