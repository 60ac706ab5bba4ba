"""The measures against their formulas in plain loops, and the masks of a round against what they promise."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_prune.errors import BadInputError
from hf_prune.methods.lottery_ticket import MEASURES, LotteryTicketConfig, next_masks, random_masks


def by_formula(measure: str, weights: list[float]) -> list[float]:
    """The paper's section 3, and LAMP's equation 3, one weight at a time."""
    sizes = [abs(weight) for weight in weights]
    if measure == "magnitude":
        return sizes
    if measure == "l1":
        return [size / math.fsum(sizes) for size in sizes]
    if measure == "l2":
        return [size**2 / math.fsum(own**2 for own in sizes) for size in sizes]
    if measure == "softmax":
        return [math.exp(size) / math.fsum(math.exp(own) for own in sizes) for size in sizes]
    if measure == "minmax":
        return [(size - min(sizes)) / (max(sizes) - min(sizes)) for size in sizes]
    return [size**2 / math.fsum(own**2 for own in sizes if own >= size) for size in sizes]


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_measures_are_their_formulas(measure: str) -> None:
    weights = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = MEASURES[measure](weights.abs())
    assert found.tolist() == pytest.approx(by_formula(measure, weights.tolist()), rel=1e-12)


@pytest.mark.parametrize(("measure", "norm"), [("l1", 1), ("l2", 2)])
def test_layer_norms_are_one_threshold_on_normalised_weights(measure: str, norm: int) -> None:
    """A measure only sets the layers' ratios: L1 is a threshold on |w| / ||W||_1, L2 on |w| / ||W||_2."""
    generator = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(30, 20, generator=generator), "b": 5 * torch.randn(50, 4, generator=generator)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    found, _ = next_masks(weights, masks, measure, 0.3, 0.0)
    scores = {name: weight.abs() / torch.linalg.vector_norm(weight, norm) for name, weight in weights.items()}
    together = torch.cat([score.flatten() for score in scores.values()])
    threshold = together.sort(descending=True).values[round(0.3 * len(together)) - 1]
    for name, score in scores.items():
        assert torch.equal(found[name], score >= threshold)


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_one_threshold_goes_through_all_layers(measure: str) -> None:
    """Every measure's formula over each layer's own weights, and the largest of them all together."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        "a": torch.randn(30, generator=generator, dtype=torch.float64),
        "b": 5 * torch.randn(50, generator=generator, dtype=torch.float64),
        "c": 0.2 * torch.randn(20, generator=generator, dtype=torch.float64),
    }
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    found, _ = next_masks(weights, masks, measure, 0.3, 0.0)
    scores = sorted(
        (
            (score, name, place)
            for name, own in weights.items()
            for place, score in enumerate(by_formula(measure, own.tolist()))
        ),
        reverse=True,
    )
    wanted = {(name, place) for _, name, place in scores[:30]}
    assert {(name, int(place)) for name, own in found.items() for place in own.nonzero()} == wanted


@settings(max_examples=60, deadline=None)
# The floor asks for three and the budget has two.
@example(sizes=[1, 51], measure="l1", rates=[0.0625, 0.875, 0.75], floor=0.02, seed=0)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    measure=st.sampled_from(sorted(MEASURES)),
    rates=st.lists(st.floats(0.05, 0.9), min_size=1, max_size=4),
    floor=st.sampled_from([0.0, 0.001, 0.02]),
    seed=st.integers(0, 1000),
)
def test_rounds_keep_exactly_the_budget(
    sizes: list[int], measure: str, rates: list[float], floor: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {str(place): torch.ones(size, dtype=torch.bool) for place, size in enumerate(sizes)}
    kept = 1.0
    for rate in rates:
        kept *= 1 - rate
        # Rounded weights tie.
        weights = {name: torch.randn(len(mask), generator=generator).round(decimals=1) for name, mask in masks.items()}
        before, (masks, held) = masks, next_masks(weights, masks, measure, kept, floor)
        least = {name: max(math.ceil(floor * len(mask) - 1e-9), 1) if floor else 0 for name, mask in masks.items()}
        alive = sum(int(mask.sum()) for mask in before.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == min(round(kept * sum(sizes)), alive)
        for name, mask in masks.items():
            assert not bool((mask & ~before[name]).any())
            stays, goes = weights[name].abs()[mask], weights[name].abs()[before[name] & ~mask]
            assert not len(stays) or not len(goes) or stays.min() >= goes.max()
        if floor and sum(least.values()) <= round(kept * sum(sizes)):
            assert all(int(mask.sum()) >= min(least[name], int(before[name].sum())) for name, mask in masks.items())
            free, _ = next_masks(weights, before, measure, kept, 0.0)
            assert set(held) == {name for name in masks if int(masks[name].sum()) > int(free[name].sum())}
            # The floor gives no layer more than itself.
            assert all(int(masks[name].sum()) == least[name] for name in held)


def test_random_masks_have_the_same_densities() -> None:
    masks = {"a": torch.rand(30, 20) < 0.1, "b": torch.rand(7) < 0.5}
    found = random_masks(masks, seed=3)
    assert {name: int(mask.sum()) for name, mask in found.items()} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    assert torch.equal(found["a"], random_masks(masks, seed=3)["a"])
    assert not torch.equal(found["a"], random_masks(masks, seed=4)["a"])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"importance": "l3"}, "importance"),
        ({"rounds": 0}, "rounds"),
        ({"pruning_rate": 1.0}, "pruning_rate"),
        ({"rewind_step": -1}, "rewind_step"),
        ({"min_keep_ratio": 0.5}, "min_keep_ratio"),
        ({"on_collapse": "shrug"}, "on_collapse"),
        ({"controls": ["nothing"]}, "controls"),
        ({"control_rounds": ["9"]}, "control_rounds"),
    ],
)
def test_bad_settings_are_named(values: dict, key: str) -> None:
    with pytest.raises(BadInputError, match=f"^{key}: "):
        LotteryTicketConfig(**values)


def test_weights_that_are_no_numbers_are_refused() -> None:
    weights = {"layer": torch.tensor([1.0, float("nan")])}
    with pytest.raises(BadInputError, match="layer: holds NaN"):
        next_masks(weights, {"layer": torch.ones(2, dtype=torch.bool)}, "magnitude", 0.5, 0.0)
