"""A small network trained here, 80 % of its weights pruned after training: which allocation keeps its accuracy?

    python recipes/benchmarks/digits.py --work_folder FOLDER --readme README.md

The experiment of the FCPTS paper in shape (Gong et al., 2024: a trained classifier, 80 %, no training afterwards) on a
network that trains in a minute: a Llama of three blocks reads the 64 pixels of a handwritten digit (scikit-learn's
8 x 8 digits, 17 shades) as tokens and says the digit as the next. Three trained networks; accuracy is over the 450
digits that neither training nor pruning saw.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import pandas
import torch
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune.bench.summary import write_between_markers
from hf_prune.compose import make_config
from hf_prune.pruning import prune

SHADES, CLASSES, HELD_OUT = 17, 10, 450
SPARSITY = 0.8
METHODS = {"magnitude": {}, "wanda": {}, "sparsegpt": {}}
ALLOCATIONS = {
    "uniform": {},
    "erk": {},
    # Small: learns longer than a language model's preset, in seconds.
    "fcpts": {"fcpts_steps": 200, "fcpts_batch_size": 8, "fcpts_teacher_tokens": SHADES + CLASSES},
}


def load(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) digits, int64 [digits, 65]: the pixels' shades and then the digit's own token."""
    digits = load_digits()
    tokens = torch.cat([torch.tensor(digits.data).long(), SHADES + torch.tensor(digits.target)[:, None]], dim=1)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    return tokens[HELD_OUT:], tokens[:HELD_OUT]


def train(tokens: torch.Tensor, seed: int, epochs: int) -> LlamaForCausalLM:
    """A network that says the digit; the pixels count for little in its loss."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SHADES + CLASSES, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=80, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(tokens) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(tokens), generator=generator).split(64)[: len(tokens) // 64]:
            logits = model(tokens[batch]).logits
            pixels = torch.nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), tokens[batch, 1:-1].flatten())
            digit = torch.nn.functional.cross_entropy(logits[:, -2], tokens[batch, -1])
            (digit + 0.1 * pixels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Share of digits said right, in %."""
    said = model(tokens[:, :-1]).logits[:, -1, SHADES:].argmax(-1) + SHADES
    return 100 * float((said == tokens[:, -1]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.work_folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        training, held_out = load(seed)
        dense = train(training, seed, arguments.epochs)
        rows.append({"method": "dense", "allocation": "", "seed": seed, "accuracy": accuracy(dense, held_out)})
        for method, own in METHODS.items():
            for allocation, options in ALLOCATIONS.items():
                model = copy.deepcopy(dense)
                start = time.perf_counter()
                config = {"method": method, "sparsity": SPARSITY, "allocation": allocation, **own, **options}
                prune(model, make_config(config), input_ids=training[:512])
                rows.append(
                    {
                        "method": method,
                        "allocation": allocation,
                        "seed": seed,
                        "accuracy": accuracy(model, held_out),
                        "seconds": time.perf_counter() - start,
                    }
                )
                print(rows[-1], flush=True)
    pandas.DataFrame(rows).to_csv(arguments.work_folder / "digits.csv", index=False)
    text = table(rows)
    print(text)
    if arguments.readme:
        write_between_markers(arguments.readme, "digits", text)


def table(rows: list[dict]) -> str:
    """Methods down, allocations across: mean accuracy and the range over the trained networks."""

    def cell(method: str, allocation: str) -> str:
        own = [row["accuracy"] for row in rows if (row["method"], row["allocation"]) == (method, allocation)]
        return f"{statistics.mean(own):.1f} ({min(own):.1f} to {max(own):.1f})"

    lines = ["| method | " + " | ".join(ALLOCATIONS) + " |", "|" + "---|" * (len(ALLOCATIONS) + 1)]
    for method in METHODS:
        lines.append(f"| {method} | " + " | ".join(cell(method, allocation) for allocation in ALLOCATIONS) + " |")
    seconds = statistics.median(row["seconds"] for row in rows if row["allocation"] == "fcpts")
    return "\n".join(
        [
            *lines,
            "",
            f"Accuracy in % at {100 * SPARSITY:.0f} % zeros, {HELD_OUT} held-out digits, mean and range over "
            f"{len({row['seed'] for row in rows})} trained networks; dense {cell('dense', '')}. Learning and pruning "
            f"took {seconds:.0f} s.",
        ]
    )


if __name__ == "__main__":
    main()
