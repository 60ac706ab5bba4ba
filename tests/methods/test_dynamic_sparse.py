"""Dynamic sparse training's arithmetic: the number of weights never changes, and who dies and grows is who should."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import chisquare
from torch import Tensor

from hf_prune.errors import BadInputError, RunError
from hf_prune.methods.dynamic_sparse import (
    DEATHS,
    GROWTHS,
    INITIALIZATIONS,
    REDISTRIBUTIONS,
    DynamicSparseConfig,
    dying,
    initial_masks,
    share_out,
    updated_masks,
)

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


def layers(shapes: list[tuple[int, int]], sparsity: float, how: str, seed: int) -> tuple[dict, dict, torch.Generator]:
    """(weights, masks, generator) of random layers."""
    generator = torch.Generator().manual_seed(seed)
    masks = initial_masks({str(n): shape for n, shape in enumerate(shapes)}, sparsity, how, generator)
    weights = {name: torch.randn(mask.shape, generator=generator) * mask for name, mask in masks.items()}
    return weights, masks, generator


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@settings(max_examples=300)
@given(
    SHAPES,
    st.floats(0.02, 0.98),
    st.sampled_from(INITIALIZATIONS),
    st.sampled_from(DEATHS),
    st.sampled_from(GROWTHS),
    st.sampled_from(REDISTRIBUTIONS),
    st.floats(0, 1),
    st.floats(0, 3),
    st.integers(0, 99),
)
def test_the_number_of_weights_never_changes(
    shapes: list[tuple[int, int]],
    sparsity: float,
    how: str,
    death: str,
    growth: str,
    redistribution: str,
    rate: float,
    threshold: float,
    seed: int,
) -> None:
    weights, masks, generator = layers(shapes, sparsity, how, seed)
    assert count(masks) == round((1 - sparsity) * sum(rows * columns for rows, columns in shapes))
    config = DynamicSparseConfig(death=death, growth=growth, redistribution=redistribution)
    dense = {
        kind: {name: torch.randn(mask.shape, generator=generator) for name, mask in masks.items()}
        for kind in ("gradient", "momentum")
    }
    for _ in range(3):
        new, threshold = updated_masks(weights, masks, config, rate, threshold, generator, dense)
        die, _ = dying(weights, masks, death, rate, threshold)
        assert count(new) == count(masks)
        if redistribution == "none":
            assert {name: int(own.sum()) for name, own in new.items()} == {n: int(m.sum()) for n, m in masks.items()}
        if death != "threshold":
            # Who was not to die is there.
            assert all(not bool((masks[name] & ~die[name] & ~new[name]).any()) for name in masks)
        weights = {name: weight * new[name] for name, weight in weights.items()}
        masks = new


@given(st.integers(0, 60), st.lists(st.tuples(st.floats(0, 5), st.integers(0, 20)), min_size=1, max_size=5))
def test_shares_add_up_within_their_room(total: int, layers: list[tuple[float, int]]) -> None:
    wanted = {str(n): own for n, (own, _) in enumerate(layers)}
    room = {str(n): own for n, (_, own) in enumerate(layers)}
    given_out = share_out(total, wanted, room)
    assert sum(given_out.values()) == min(total, sum(room.values()))
    assert all(0 <= given_out[name] <= room[name] for name in room)
    together = sum(wanted.values())
    if together and all(own * total / together <= room[name] - 1 for name, own in wanted.items()):
        # Nothing is full: largest remainders, as counted by hand.
        exact = {name: total * own / together for name, own in wanted.items()}
        assert all(abs(given_out[name] - own) < 1 + 1e-9 for name, own in exact.items())


def test_er_densities_are_those_of_the_bisection() -> None:
    shapes = {"a": (512, 512), "b": (128, 512), "c": (16, 16), "d": (2000, 128)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}

    def densities(epsilon: float) -> dict[str, float]:
        return {name: min(1.0, epsilon * sum(shapes[name]) / sizes[name]) for name in shapes}

    total = sum(sizes.values())
    epsilon = brentq(lambda e: sum(d * sizes[n] for n, d in densities(e).items()) - 0.33 * total, 0, 1000)
    masks = initial_masks(shapes, 0.67, "er", torch.Generator().manual_seed(0))
    for name, density in densities(epsilon).items():
        assert int(masks[name].sum()) == pytest.approx(density * sizes[name], abs=2)
    assert bool(masks["c"].all()), "a small layer is full"


def test_uniform_gives_every_layer_the_same_density() -> None:
    shapes = {"a": (512, 512), "b": (128, 512), "c": (16, 16)}
    masks = initial_masks(shapes, 0.67, "uniform", torch.Generator().manual_seed(0))
    for name, (rows, columns) in shapes.items():
        assert int(masks[name].sum()) == pytest.approx(0.33 * rows * columns, abs=1)


def by_hand(death: str, weights: dict[str, Tensor], masks: dict[str, Tensor], rate: float) -> set[tuple[str, int]]:
    """Who dies, by sorting lists of numbers."""
    alive = {
        name: [(float(weights[name].flatten()[place]), place) for place in range(mask.numel()) if mask.flatten()[place]]
        for name, mask in masks.items()
    }
    if death == "global_magnitude":
        everyone = sorted((abs(value), name, place) for name, own in alive.items() for value, place in own)
        return {(name, place) for _, name, place in everyone[: math.ceil(rate * len(everyone))]}
    dead = set()
    for name, own in alive.items():
        number = math.ceil(rate * len(own))
        if death == "magnitude":
            chosen = sorted(own, key=lambda one: abs(one[0]))[:number]
        else:
            positive = sorted(one for one in own if one[0] > 0)[: number - number // 2]
            negative = sorted((one for one in own if one[0] < 0), reverse=True)[: number // 2]
            chosen = positive + negative
        dead |= {(name, place) for _, place in chosen}
    return dead


@pytest.mark.parametrize("death", ["magnitude", "set", "global_magnitude"])
def test_those_die_who_should(death: str) -> None:
    weights, masks, _ = layers([(20, 30), (5, 40)], 0.5, "uniform", 4)
    die, _ = dying(weights, masks, death, 0.3, 0.0)
    found = {(name, int(place)) for name, own in die.items() for place in own.flatten().nonzero()}
    assert found == by_hand(death, weights, masks, 0.3)


def test_set_takes_from_the_other_sign_where_one_has_too_few() -> None:
    weights = {"a": torch.tensor([[3.0, 1.0, 2.0, -5.0]])}
    die, _ = dying(weights, {"a": torch.ones(1, 4, dtype=torch.bool)}, "set", 1.0, 0.0)
    assert bool(die["a"].all())
    die, _ = dying({"a": weights["a"].abs()}, {"a": torch.ones(1, 4, dtype=torch.bool)}, "set", 0.5, 0.0)
    assert die["a"].tolist() == [[False, True, True, False]]


def test_the_threshold_moves_until_as_many_die_as_are_wanted() -> None:
    weights, masks, _ = layers([(40, 50)], 0.5, "uniform", 1)
    threshold, gone = 1e-3, 0
    for _ in range(60):
        die, threshold = dying(weights, masks, "threshold", 0.3, threshold)
        gone = int(die["0"].sum())
    assert gone == pytest.approx(300, rel=0.25)
    assert dying(weights, masks, "threshold", 0.3, 0.5)[0]["0"].equal(masks["0"] & (weights["0"].abs() <= 0.5))


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("redistribution", ["magnitude", "momentum", "nonzeros"])
def test_weights_grow_where_they_should_and_layers_get_their_part(growth: str, redistribution: str) -> None:
    weights, masks, generator = layers([(10, 10), (10, 30)], 0.5, "uniform", 2)
    weights["1"] *= 3
    dense = {
        kind: {name: torch.randn(mask.shape, generator=generator) for name, mask in masks.items()}
        for kind in ("gradient", "momentum")
    }
    dense["momentum"]["1"] *= 3
    config = DynamicSparseConfig(growth=growth, redistribution=redistribution, death="magnitude")
    new, _ = updated_masks(weights, masks, config, 0.4, 0.0, generator, dense)
    die, _ = dying(weights, masks, "magnitude", 0.4, 0.0)
    left = {name: masks[name] & ~die[name] for name in masks}
    values = weights if redistribution == "magnitude" else dense["momentum"]
    means = {name: float(values[name][left[name]].abs().mean()) for name in masks}
    if redistribution == "nonzeros":
        means = {name: float(own.sum()) for name, own in left.items()}
    freed = count(masks) - count(left)
    assert freed == 80
    for name in masks:
        grown = (new[name] & ~left[name]).flatten()
        assert int(grown.sum()) == pytest.approx(freed * means[name] / sum(means.values()), abs=1)
        sizes = dense[growth][name].abs().flatten()
        rest = ~left[name].flatten() & ~grown
        assert float(sizes[grown].min()) >= float(sizes[rest].max())


def test_random_growth_favours_no_place() -> None:
    """Of 60 free places 12 are taken each time, in one draw as in another: chi-square over 2,000 draws."""
    weights, masks, _ = layers([(8, 10)], 0.6, "uniform", 3)
    config = DynamicSparseConfig(growth="random", death="magnitude")
    die, _ = dying(weights, masks, "magnitude", 0.375, 0.0)
    left = masks["0"] & ~die["0"]
    assert int(die["0"].sum()) == 12 and int((~left).sum()) == 60
    taken = torch.zeros(8, 10)
    for seed in range(2000):
        new, _ = updated_masks(weights, masks, config, 0.375, 0.0, torch.Generator().manual_seed(seed), {})
        taken += new["0"] & ~left
    assert chisquare(taken[~left].numpy()).pvalue > 0.001


@pytest.mark.parametrize("kind", ["weights", "momentum"])
def test_numbers_that_are_none_are_named(kind: str) -> None:
    weights, masks, generator = layers([(6, 6), (6, 6)], 0.5, "uniform", 2)
    dense = {"momentum": {name: torch.ones(6, 6) for name in masks}}
    own = weights if kind == "weights" else dense["momentum"]
    own["1"][0, 0] = math.nan
    config = DynamicSparseConfig(redistribution="momentum" if kind == "momentum" else "magnitude")
    with pytest.raises(RunError, match=f"1: its {kind} are not finite where masks are to move; lower learning_rate"):
        updated_masks(weights, masks, config, 0.4, 0.0, generator, dense)


def test_the_death_rate_falls_as_a_cosine() -> None:
    config = DynamicSparseConfig(death_rate=0.6)
    assert [config.rate(step, 100) for step in (0, 50, 100)] == pytest.approx([0.6, 0.3, 0.0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"death": "old age"}, "death: 'old age' is unknown; choose magnitude, set, threshold, global_magnitude"),
        ({"growth": "fast"}, "growth: 'fast' is unknown"),
        ({"sparsity": 1.0}, "sparsity: 1.0 is outside"),
        ({"death_rate": 0.0}, "death_rate: 0.0 is outside"),
        ({"update_steps": 0}, "update_steps: 0 is too few"),
    ],
)
def test_wrong_words_and_numbers_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        DynamicSparseConfig(**wrong)
