"""Two language models fine-tuned on halves of a text, made one and narrower: Intra-Fusion's PaF and FaP.

    python recipes/benchmarks/intra_fusion_halves.py --work_folder WORK --dataset_name WIKITEXT_TRAIN \\
        --eval_dataset_name WIKITEXT_TEST --readme recipes/benchmarks/TRIALS.md

WIKITEXT_TRAIN and WIKITEXT_TEST are local copies or left out, which takes WikiText-2 from the Hub. Both models start
from SmolLM2-135M-Instruct, so that their residual streams are one: what is matched between them are each block's MLP
neurons, by exact transport of their activations (OTFusion, Singh and Jaggi, 2020, as the paper uses it), and then all
weights are averaged. Units are removed by Wanda's score with a refit, the best rows of structured.yaml, in every
contestant. A contestant that is finished stands in WORK/halves.json; the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import IntraFusionConfig, prune
from hf_prune.bench.summary import write_between_markers
from hf_prune.checkpoint.files import write_whole
from hf_prune.data.builtin import resolve_model
from hf_prune.data.text import load_text
from hf_prune.data.windows import calibration_windows, evaluation_windows
from hf_prune.evaluation.perplexity import perplexity, window_nll
from hf_prune.structure.fusion import from_transport
from hf_prune.structure.groups import MLP, Group, block_shape, find_groups, rewrite
from hf_prune.structure.transport import transport, unit_features
from hf_prune.weights import find_blocks

HUB, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
MODEL, REMOVED = "builtin:smollm2-135m-instruct", 0.2
# Windows of one half are trained on once; as many as half of them are what fine-tuning behind a change takes.
LENGTH, BATCH, STEPS, TUNING_STEPS, RATE, TUNING_RATE = 128, 4, 24, 12, 5e-5, 5e-5
# Windows whose activations match two models: 4 x 128 tokens (the paper: 200 samples).
MATCHED = 4
EVALUATED, EVALUATED_LENGTH = 8, 1024


@dataclass(frozen=True)
class Trained:
    """A model with the steps that it took one after the other, and its perplexity where each part of its way ended."""

    model: Any
    steps: int = 0
    way: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Texts:
    """int64 windows: both halves [2, windows, tokens], and those of the test text."""

    halves: Tensor
    test: Tensor

    @property
    def whole(self) -> Tensor:
        """Both halves, in turn."""
        return self.halves.transpose(0, 1).flatten(0, 1)


class Workshop:
    """What is done to models, each step with the perplexity behind it."""

    def __init__(self, texts: Texts, base: Any) -> None:
        self.texts = texts
        self.base = base
        self._halves: list[Trained] = []

    def measured(self, own: Trained, what: str) -> Trained:
        """With its perplexity on the test text."""
        score = perplexity(window_nll(own.model, self.texts.test))
        print(f"  {what}: {score:.2f}", flush=True)
        return Trained(own.model, own.steps, (*own.way, (what, score)))

    def train(self, own: Trained, windows: Tensor, steps: int, rate: float, what: str) -> Trained:
        """Trained on, in place: AdamW without weight decay, a linear rate, the windows in order and again."""
        model = own.model.train()
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        return self.measured(Trained(model, own.steps + steps, own.way), what)

    def fresh(self) -> Trained:
        """The base model."""
        return Trained(copy.deepcopy(self.base))

    def half(self, number: int) -> Trained:
        """One trained on its half, made once."""
        while len(self._halves) <= number:
            windows = self.texts.halves[len(self._halves)]
            self._halves.append(self.train(self.fresh(), windows, STEPS, RATE, "trained"))
        own = self._halves[number]
        return Trained(copy.deepcopy(own.model), own.steps, own.way)

    def tune(self, own: Trained, windows: Tensor, steps: int = TUNING_STEPS) -> Trained:
        """Fine-tuned."""
        return self.train(own, windows, steps, TUNING_RATE, "tuned")

    def pruned(self, own: Trained, windows: Tensor) -> Trained:
        """With fewer neurons, decided and refitted on the text it was trained on."""
        config = IntraFusionConfig(sparsity=REMOVED, fusion="refit", importance="wanda")
        prune(own.model, config, input_ids=windows)
        return self.measured(own, "pruned")

    def fused(self, one: Trained, other: Trained) -> Trained:
        """One of two that were trained side by side: the first one's way and the longer one's steps."""
        stayed = fuse(one.model, other.model, self.texts.whole[:MATCHED])
        steps = max(one.steps, other.steps)
        return self.measured(Trained(one.model, steps, one.way), f"fused ({stayed:.1%} of the neurons stay in place)")


def fuse(one: Any, other: Any, input_ids: Tensor) -> float:
    """Make `one` the mean of both in place, the other's neurons put in its order; the share of those already there.

    Between equally many units of equal mass exact transport is a permutation, which changes nothing of `other`.
    """
    shape, stayed = block_shape(one), []
    for block in range(len(find_blocks(one)[1])):
        (own,), (its,) = (find_groups(model, block, MLP, shape) for model in (one, other))
        cost = torch.cdist(_activations(other, its, input_ids), _activations(one, own, input_ids))
        mass = torch.ones(own.units)
        plan, _ = transport(cost, mass, mass, "emd")
        stayed.append(float((plan.argmax(dim=1) == torch.arange(own.units)).double().mean()))
        rewrite([its], [from_transport(plan, torch.arange(own.units), "preserve")], keep=frozenset())
    with torch.no_grad():
        for mean, its_own in zip(one.parameters(), other.parameters(), strict=True):
            mean.copy_((mean + its_own) / 2)
    return sum(stayed) / len(stayed)


@torch.no_grad()
def _activations(model: Any, group: Group, input_ids: Tensor) -> Tensor:
    """What a block's neurons hand over, each of length one: float32 [units, tokens]."""
    seen: list[Tensor] = []
    module = group.consumer.view.module
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    model(input_ids=input_ids)
    handle.remove()
    return unit_features([torch.cat(seen).T[:, None]])


def contestants(shop: Workshop) -> dict[str, Callable[[], Trained]]:
    """What is measured, by name."""
    whole, halves = shop.texts.whole, shop.texts.halves

    def fap() -> Trained:
        both = shop.tune(shop.fused(shop.half(0), shop.half(1)), whole, TUNING_STEPS // 2)
        return shop.tune(shop.pruned(both, whole), whole)

    def paf() -> Trained:
        one, other = (shop.tune(shop.pruned(shop.half(own), halves[own]), halves[own]) for own in (0, 1))
        return shop.tune(shop.fused(one, other), whole)

    def one_half() -> Trained:
        return shop.tune(shop.pruned(shop.tune(shop.half(0), whole, TUNING_STEPS // 2), whole), whole)

    def all_of_it(steps: int) -> Trained:
        return shop.tune(shop.pruned(shop.train(shop.fresh(), whole, steps, RATE, "trained"), whole), whole)

    return {
        "whole text": lambda: all_of_it(2 * STEPS),
        "whole text, as many steps as FaP": lambda: all_of_it(STEPS + TUNING_STEPS // 2),
        "PaF": paf,
        "FaP": fap,
        "FaP with the first model alone": one_half,
    }


def to_markdown(finished: dict[str, Any], dense: float) -> str:
    """A line for each contestant."""
    lines = ["| | steps | perplexity on its way | perplexity |", "|---|---|---|---|"]
    for name, own in finished.items():
        *way, (_, last) = own["way"]
        lines.append(
            f"| {name} | {own['steps']} | {', '.join(f'{what} {score:.2f}' for what, score in way)} | {last:.2f} |"
        )
    seconds = sum(own["seconds"] for own in finished.values())
    lines += [
        "",
        f"WikiText-2 test, {EVALUATED} windows of {EVALUATED_LENGTH:,}; the model as it came has {dense:.2f}. "
        f"{REMOVED:.0%} of the blocks' parameters removed; a step is {BATCH} windows of {LENGTH} tokens, each half "
        f"{STEPS} steps long. Two models of halves count as trained side by side. One seed; all of it took "
        f"{seconds:.0f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--dataset_name", default=HUB)
    parser.add_argument("--eval_dataset_name", default=HUB)
    parser.add_argument("--readme", type=Path)
    given = parser.parse_args()
    given.work_folder.mkdir(parents=True, exist_ok=True)
    folder = resolve_model(MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = load_text(given.dataset_name, config=CONFIG if given.dataset_name == HUB else None, tokenizer=tokenizer)
    windows = calibration_windows(read, tokenizer, 2 * STEPS * BATCH, LENGTH, seed=0)
    scored = load_text(
        given.eval_dataset_name,
        config=CONFIG if given.eval_dataset_name == HUB else None,
        tokenizer=tokenizer,
        evaluation=True,
    )
    test = evaluation_windows(scored, tokenizer, EVALUATED_LENGTH, EVALUATED, None).input_ids
    shop = Workshop(Texts(windows.reshape(2, STEPS * BATCH, LENGTH), test), base)
    results = given.work_folder / "halves.json"
    finished: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for name, work in contestants(shop).items():
        if name not in finished:
            print(name, flush=True)
            began = time.perf_counter()
            done = work()
            finished[name] = {"steps": done.steps, "way": done.way, "seconds": time.perf_counter() - began}
            write_whole(results, json.dumps(finished, indent=1) + "\n")
    table = to_markdown(finished, perplexity(window_nll(base, test)))
    print(table)
    if given.readme:
        write_between_markers(given.readme, "intra_fusion_halves", table)


if __name__ == "__main__":
    main()
