"""Windowed exponents against a plain loop, and against maps whose exponents are known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_exponents import plain
from torch import Tensor

from hf_prune.dynamics.exponents import changes_abruptly, largest_exponents, window_starts, windowed_exponents


@settings(max_examples=40)
@given(
    steps=st.integers(3, 30),
    kind=st.sampled_from(["noise", "ties", "walk"]),
    seed=st.integers(0, 1000),
)
def test_exponents_are_those_of_a_plain_loop(steps: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randn(5, steps, generator=generator, dtype=torch.float64)
    # Ties have distances of zero, also one step later.
    windows = {"noise": windows, "ties": windows.round(), "walk": windows.cumsum(1)}[kind]
    wanted = [plain(window) for window in windows.tolist()]
    np.testing.assert_allclose(largest_exponents(windows).numpy(), wanted, rtol=1e-10, atol=1e-12)


def logistic(steps: int) -> Tensor:
    value, series = 0.3141, []
    for _ in range(steps):
        value = 4 * value * (1 - value)
        series.append(value)
    return torch.tensor(series, dtype=torch.float64)


def henon(steps: int) -> Tensor:
    x, y, series = 0.1, 0.1, []
    for _ in range(steps):
        x, y = 1 - 1.4 * x * x + y, 0.3 * x
        series.append(x)
    return torch.tensor(series[100:], dtype=torch.float64)


@pytest.mark.parametrize(
    ("system", "exponent", "first"), [(logistic, math.log(2), 0), (henon, 0.419, 1)], ids=["logistic", "henon"]
)
def test_known_systems_have_their_exponents(system: Callable[[int], Tensor], exponent: float, first: int) -> None:
    """In one long window; in two dimensions neighbours turn into the growing direction within a step."""
    found = windowed_exponents(system(3100)[None], window=3000, first=first, last=first + 6)
    assert float(found[0, 0]) == pytest.approx(exponent, abs=0.01)
    if first == 0:
        assert float(windowed_exponents(system(3100)[None], window=3000)[0, 0]) == pytest.approx(exponent, abs=0.01)


def test_windows_are_where_they_should_be() -> None:
    series = torch.randn(7, 137, generator=torch.Generator().manual_seed(0))
    found = windowed_exponents(series, window=20)
    starts = list(window_starts(137, 20, 18))
    assert starts[-1] + 20 <= 137 < starts[-1] + 18 + 20 and found.shape == (7, len(starts))
    for place, start in enumerate(starts):
        torch.testing.assert_close(found[:, place], largest_exponents(series[:, start : start + 20]))


def test_flat_and_abrupt_windows_have_none() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = 0.05 * torch.randn(3, 50, generator=generator)
    flat = 1 + 1e-7 * noise[0]
    jump = noise[1] + (torch.arange(50) >= 17)
    drift = noise[2] + torch.linspace(0, 1, 50)
    found = windowed_exponents(torch.stack([flat, jump, drift]), window=50)
    assert found[0, 0] == 0 and found[1, 0] == 0 and found[2, 0] != 0
    # A split of a straight line in two explains 3/4 of it.
    assert changes_abruptly(torch.stack([jump, drift])).tolist() == [True, False]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_prune.dynamics import exponents

    series = torch.randn(9, 200, generator=torch.Generator().manual_seed(2)).cumsum(1)
    whole = windowed_exponents(series)
    monkeypatch.setattr(exponents, "CHUNK_BYTES", 3 * 50 * 50 * 4)
    assert torch.equal(windowed_exponents(series), whole)
