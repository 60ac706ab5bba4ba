"""Our masks on a fixed matrix are those of the authors' own code, which was run once on the same numbers.

What is recorded is a hash of each input and each mask (SparseGPT at commit 147d215, Wanda at 8e8fc87, torch 2.13 on a
CPU). The authors' SparseGPT threshold drops one weight more than its share of a block, so that it was given half a
weight less than 50 %.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from hf_prune.compose import make_config, make_solver
from hf_prune.engine.statistics import Statistics
from hf_prune.masks import MaskRule
from hf_prune.patterns import Pattern

ROWS, COLUMNS, TOKENS = 48, 256, 1024
RECORDED = {
    "weight": "aae5ede14f02238d",
    "inputs": "d5be13c630c7e31c",
    ("sparsegpt", "unstructured"): "beedd3ee0227506f",
    ("sparsegpt", "2:4"): "261f4d7196b8890c",
    ("sparsegpt", "1:4"): "6a2886577e2c55d7",
    ("wanda", "unstructured"): "0b413330eca10c83",
    ("wanda", "2:4"): "03dd1150edbe60c3",
    ("wanda", "1:4"): "26286e9ac35c7994",
}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def numbers(count: int, state: int) -> Tensor:
    """The same on every machine: a linear congruential generator in whole numbers, exact in float32."""
    values = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append((state >> 40) - 2**23)
    return torch.tensor(values, dtype=torch.float32) / 2**20


@pytest.fixture(scope="module")
def fixed() -> tuple[Tensor, Statistics]:
    weight = numbers(ROWS * COLUMNS, 1).reshape(ROWS, COLUMNS)
    noise = numbers(TOKENS * COLUMNS, 2).reshape(TOKENS, COLUMNS)
    inputs = (noise + noise.roll(1, 1) / 2 + noise.roll(5, 1) / 4) * (1 + torch.arange(COLUMNS) % 7) / 4
    assert (digest(weight), digest(inputs)) == (RECORDED["weight"], RECORDED["inputs"])
    statistics = Statistics({"gram"}, COLUMNS, inputs.device)
    for chunk in inputs.split(256):
        statistics.add(chunk)
    statistics.finish(lambda tensor: None)
    return weight, statistics


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_masks_are_the_authors(fixed: tuple[Tensor, Statistics], method: str, pattern: str) -> None:
    weight, statistics = fixed
    parsed = Pattern.parse(pattern)
    solver = make_solver(make_config({"method": method, "pattern": pattern}))
    _, mask = solver.solve(weight, statistics, MaskRule(parsed.density or 0.5, parsed))
    assert digest(mask) == RECORDED[method, pattern]
