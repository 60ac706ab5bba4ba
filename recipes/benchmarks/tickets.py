"""Layerwise lottery tickets, five measures of importance: what they cost, what collapses, what they share.

    python recipes/benchmarks/tickets.py --config recipes/benchmarks/tickets.yaml --work_folder WORK \\
        --readme recipes/benchmarks/TICKETS.md

A small Llama from scratch, and a small VGG on scikit-learn's digits, where the paper's shape (Vandersmissen & Oramas,
2023) is expected. Rounds prune 37 % of what is left. Every round is kept in WORK: a run that was cut, by --max_minutes
too, goes on. Seeds, measures and the dense training share what they can.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas
import torch
from digit_networks import BATCH, Digits, accuracy, load, vgg
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_prune.bench.summary import write_between_markers
from hf_prune.methods.lottery_ticket import LotteryTicketConfig
from hf_prune.recipe import read_recipe
from hf_prune.tickets import prepare_tickets
from hf_prune.training.arguments import make_train_recipe, make_training_arguments
from hf_prune.training.checkpoints import fingerprint
from hf_prune.training.tickets import Round, TicketSearch

MEASURES = ("magnitude", "l1", "l2", "softmax", "minmax")
ALIKE = ("magnitude", "l1", "l2")
RATE, MODEL_ROUNDS, SHOWN_MODEL = 0.37, 10, (1, 4, 6, 8, 10)
CONTROLLED, CONTROLS = ("4", "10"), ["fresh_initialization", "random_mask"]
FLOORED, FLOOR = ("magnitude", "softmax"), 0.001
# 0.63^15 leaves 0.1 %.
DIGIT_ROUNDS, SHOWN_DIGITS, DIGIT_STEPS = 15, (4, 8, 10, 12, 13, 15), 200


class DigitData(torch.utils.data.Dataset):
    """Digits as a Trainer takes them."""

    def __init__(self, digits: Digits) -> None:
        self.digits = digits

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"images": self.digits.images[number], "labels": self.digits.labels[number]}


class Classifier(nn.Module):
    """A network with the loss that a Trainer asks for."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = vgg()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def search_digits(config: LotteryTicketConfig, seed: int, folder: Path) -> TicketSearch:
    """The procedure on digits: every convolution and the classifier are pruned."""
    training, held_out = load(seed)
    options = {
        "max_steps": DIGIT_STEPS, "learning_rate": 0.05, "lr_scheduler_type": "cosine", "optim": "sgd",
        "optim_args": "momentum=0.9", "weight_decay": 5e-4, "per_device_train_batch_size": BATCH,
        "save_strategy": "no", "logging_steps": 100,
    }  # fmt: skip

    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        arguments = make_training_arguments(options, output_dir, seed, "cpu")
        return Trainer(model=model, args=arguments, train_dataset=DigitData(training), callbacks=callbacks)

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        found = accuracy(model.network, held_out)  # type: ignore[arg-type]
        model.train()
        return {"accuracy": found}

    names = [name for name, parameter in Classifier(0).named_parameters() if parameter.ndim > 1]
    return TicketSearch(
        lambda other: Classifier(seed if other is None else seed + other),
        names,
        make_trainer,
        evaluate,
        config,
        folder,
        fingerprint=fingerprint([options, seed], {}),
        seed=seed,
    )


def search_model(recipe: Path, own: dict[str, Any], seed: int, folder: Path) -> TicketSearch:
    """The procedure on the language model."""
    values, _ = read_recipe(recipe, {**own, "seed": seed, "rounds_folder": str(folder), "output_dir": "unused"})
    return prepare_tickets(make_train_recipe(values, LotteryTicketConfig)).search


def rows_of(search: TicketSearch, seed: int, floor: float) -> list[dict[str, Any]]:
    """A row for each round, its masks' place among them."""
    _, rounds = search.run()
    own = search.ticket_folder
    return [
        {
            "measure": search.config.importance, "seed": seed, "floor": floor, "kind": found.kind,
            "round": found.number, "sparsity": found.sparsity, "seconds": found.seconds,
            "figure": figure(found), "collapsed": len(found.collapsed), "held": len(found.held),
            "masks": str((own if found.number else search.folder) / place(found) / "masks.safetensors"),
        }
        for found in rounds
    ]  # fmt: skip


def figure(found: Round) -> float:
    """Perplexity of the language model, accuracy in % on digits."""
    return found.metrics.get("perplexity", found.metrics.get("accuracy"))


def place(found: Round) -> str:
    """The folder of a round."""
    return f"round-{found.number:02d}" + (f"-{found.kind}" if found.kind != "ticket" else "")


def spread(values: Iterable[float], form: str) -> str:
    """Mean and standard deviation."""
    values = list(values)
    if not values:
        return ""
    text = format(statistics.fmean(values), form)
    return f"{text} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else text


def overlap(files: list[str]) -> tuple[float, float, float]:
    """What all masks keep: as a share of what the first keeps, of all weights, and as a multiple of chance."""
    masks = [load_file(file) for file in files]
    shared = kept = total = 0
    chance = 0.0
    for name, first in masks[0].items():
        both = first.clone()
        density = 1.0
        for mask in masks:
            both &= mask[name]
            density *= float(mask[name].double().mean())
        shared, kept, total = shared + int(both.sum()), kept + int(first.sum()), total + first.numel()
        chance += density * first.numel()
    return shared / kept, shared / total, shared / chance if chance else float("nan")


def by_measure(rows: pandas.DataFrame, shown: Iterable[int], form: str) -> str:
    """Sparsity down, measures across: mean and spread, and in brackets the layers without a path."""
    tickets = rows[(rows.kind == "ticket") & (rows.floor == 0)]
    lines = [f"| zeros | {' | '.join(MEASURES)} |", "|---|" + "---|" * len(MEASURES)]
    for number in (0, *shown):
        cells = []
        for measure in MEASURES:
            own = tickets[(tickets.measure == measure) & (tickets["round"] == number)]
            gone = own.collapsed.mean() if len(own) else 0
            cells.append(spread(own.figure, form) + (f" ({gone:.1f} gone)" if gone else ""))
        lines.append(f"| {100 * (1 - (1 - RATE) ** number):.1f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_overlap(rows: pandas.DataFrame, shown: Iterable[int]) -> str:
    """What the tickets of magnitude, L1 and L2 share."""
    tickets = rows[(rows.kind == "ticket") & (rows.floor == 0)]
    lines = ["| zeros | shared, of kept weights | of all weights | times chance |", "|---|---|---|---|"]
    for number in shown:
        found = []
        for seed in sorted(set(tickets.seed)):
            own = tickets[(tickets.seed == seed) & (tickets["round"] == number)].set_index("measure").masks
            if set(ALIKE) <= set(own.index):
                found.append(overlap([own[measure] for measure in ALIKE]))
        if found:
            kept, everything, chance = zip(*found, strict=True)
            shares = [spread([100 * value for value in values], ".2f") for values in (kept, everything)]
            sparsity = 100 * (1 - (1 - RATE) ** number)
            lines.append(f"| {sparsity:.1f} % | {shares[0]} % | {shares[1]} % | {spread(chance, '.1f')} |")
    return "\n".join(lines)


def by_control(rows: pandas.DataFrame) -> str:
    """The L2 ticket, its mask on other initial weights, and random masks of its densities."""
    own = rows[(rows.measure == "l2") & (rows.floor == 0)]
    kinds = ("ticket", *CONTROLS)
    lines = [f"| zeros | {' | '.join(kind.replace('_', ' ') for kind in kinds)} |", "|---|---|---|---|"]
    for number in map(int, CONTROLLED):
        cells = [spread(own[(own.kind == kind) & (own["round"] == number)].figure, ".1f") for kind in kinds]
        lines.append(f"| {100 * (1 - (1 - RATE) ** number):.1f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_floor(rows: pandas.DataFrame, shown: Iterable[int]) -> str:
    """Without and with a floor, one seed: perplexity, layers without a path, layers held."""
    lines = ["| measure | zeros | floor off | layers gone | floor on | layers gone | layers held |"]
    lines.append("|---|---|---|---|---|---|---|")
    for measure in FLOORED:
        for number in list(shown)[-2:]:
            picked = rows[
                (rows.measure == measure) & (rows["round"] == number) & (rows.kind == "ticket") & (rows.seed == 0)
            ]
            off, on = picked[picked.floor == 0], picked[picked.floor > 0]
            if len(off) and len(on):
                figures = [own for side in (off, on) for own in (f"{side.figure.iloc[0]:.1f}", side.collapsed.iloc[0])]
                cells = [measure, f"{100 * (1 - (1 - RATE) ** number):.1f} %", *figures, on.held.iloc[0]]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="*", default=["digits", "model"])
    parser.add_argument("--max_minutes", type=float, default=75)
    parser.add_argument("--dataset_name")
    parser.add_argument("--eval_dataset_name")
    given = parser.parse_args()
    texts: dict[str, Any] = {
        key: value for key in ("dataset_name", "eval_dataset_name") if (value := getattr(given, key))
    }
    # A file has neither configurations nor splits.
    if given.dataset_name:
        texts["dataset_config"] = None
    if given.eval_dataset_name:
        texts |= {"eval_dataset_config": None, "eval_split": None}
    jobs: list[tuple[str, int, float, str, Callable[[], TicketSearch]]] = []
    for seed in given.seeds:
        for measure in MEASURES:
            common = {"importance": measure, "min_keep_ratio": 0.0, "on_collapse": "record", "pruning_rate": RATE}
            if "digits" in given.parts:
                config = LotteryTicketConfig(**common, rounds=DIGIT_ROUNDS, rewind_step=20)
                folder = given.work_folder / f"digits-{seed}"
                jobs.append(("digits", seed, 0.0, measure, lambda c=config, s=seed, f=folder: search_digits(c, s, f)))
            if "model" in given.parts:
                folder = given.work_folder / f"model-{seed}"
                own = {**texts, **common, "rounds": MODEL_ROUNDS}
                if measure == "l2":
                    own |= {"controls": CONTROLS, "control_rounds": list(CONTROLLED)}
                floors = (0.0, FLOOR) if seed == 0 and measure in FLOORED else (0.0,)
                for floor in floors:
                    setting = {**own, "min_keep_ratio": floor}
                    jobs.append(
                        (
                            "model",
                            seed,
                            floor,
                            measure,
                            lambda o=setting, s=seed, f=folder: search_model(given.config, o, s, f),
                        )
                    )
    rows: dict[str, list[dict[str, Any]]] = {"digits": [], "model": []}
    started, longest = time.monotonic(), 0.0
    for part, seed, floor, measure, make in sorted(jobs, key=lambda job: (job[0], job[1])):
        began = time.monotonic()
        # One in any case, and others as long as one like the longest fits.
        if began - started + longest > 60 * given.max_minutes:
            print("Out of time; the same command goes on. Tables of a part of the runs are not written to the page.")
            given.readme = None
            break
        print(f"{part}, seed {seed}, {measure}" + (", floor on" if floor else ""), flush=True)
        rows[part] += rows_of(make(), seed, floor)
        longest = max(longest, time.monotonic() - began)
    shown = {"digits": SHOWN_DIGITS, "model": SHOWN_MODEL}
    for part, found in rows.items():
        if not found:
            continue
        table = pandas.DataFrame(found)
        table.drop(columns="masks").to_csv(given.work_folder / f"{part}.csv", index=False)
        tables = {
            f"{part}": by_measure(table, shown[part], ".1f"),
            f"{part}_overlap": by_overlap(table, shown[part]),
            **({"controls": by_control(table), "floor": by_floor(table, shown[part])} if part == "model" else {}),
        }
        for name, text in tables.items():
            print(f"\n{name}\n{text}")
            if given.readme:
                write_between_markers(given.readme, name, text)
        dense = table[table["round"] == 0].drop_duplicates("seed").seconds
        print(f"\nA training took {spread(table.seconds, '.1f')} s, the dense one {spread(dense, '.1f')} s.")


if __name__ == "__main__":
    main()
