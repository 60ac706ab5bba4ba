"""Each rule against its formula, computed the slow way on a tiny model; budgets and floors by property tests."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_ids, tiny_model
from torch import nn

from hf_prune.allocation import ALLOCATIONS
from hf_prune.allocation.base import meet_budget, whole_rows
from hf_prune.allocation.histogram import Histogram, shares_above
from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.methods.magnitude import MagnitudeConfig
from hf_prune.plan import Plan
from hf_prune.pruning import plan_pruning, prune
from hf_prune.weights import find_views


def uneven_model(family: str = "llama") -> nn.Module:
    """Blocks of unlike scale and tail, so that every rule has something to tell apart."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for number, view in enumerate(find_views(model)):
            noise = torch.randn(view.parameter.shape, generator=generator)
            view.parameter.mul_(1 + 0.3 * number).add_(0.02 * noise * noise.abs() ** (1 + view.block))
    return model


def plan(allocation: str, sparsity: float = 0.6, **options: object) -> Plan:
    config = MagnitudeConfig(sparsity=sparsity, allocation=allocation, **options)
    return plan_pruning(uneven_model(), config, input_ids=tiny_ids())


def weights() -> dict[str, numpy.ndarray]:
    model = uneven_model()
    return {view.name: view.read().double().numpy() for view in find_views(model) if view.block < 3}


def input_norms(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norm over all tokens of each input of each layer, in the dense model's own forward."""
    model = uneven_model()
    norms = {}
    for view in find_views(model)[:-1]:
        view.module.register_forward_pre_hook(
            lambda module, args, name=view.name: norms.__setitem__(name, args[0].flatten(0, -2).double().norm(dim=0))
        )
    with torch.no_grad():
        model(input_ids)
    return norms


def kept_share(plan: Plan) -> float:
    return sum(view.density * view.numel for view in plan.views) / sum(view.numel for view in plan.views)


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_every_rule_meets_the_budget_above_the_floor(allocation: str, sparsity: float, floor: float) -> None:
    made = plan(allocation, sparsity, min_keep_ratio=floor)
    assert kept_share(made) == pytest.approx(1 - sparsity, abs=1e-6)
    assert made.allocation == allocation
    for view in made.views:
        assert floor <= view.density <= 1
        # Whole weights a row, as far as the budget goes.
        least = min(math.ceil(floor * view.shape[1]) / view.shape[1], 1 - sparsity)
        assert view.floor == (floor > 0 and view.density == pytest.approx(least, abs=1e-12))


def test_the_layers_that_the_floor_holds_are_marked() -> None:
    # Scales that differ hundredfold leave the global threshold nothing of the small layers.
    model = tiny_model("llama")
    with torch.no_grad():
        for view in find_views(model):
            view.parameter.mul_(100.0**view.block)
    made = plan_pruning(model, MagnitudeConfig(sparsity=0.8, allocation="global", min_keep_ratio=0.05))
    assert {view.block for view in made.views if view.floor} == {0, 1}
    assert all(view.density == math.ceil(0.05 * view.shape[1]) / view.shape[1] for view in made.views if view.floor)
    assert kept_share(made) == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize(("allocation", "power"), [("global", 0), ("layerwise_l1", 1), ("layerwise_l2", 2)])
def test_thresholds_keep_what_one_sort_of_everything_keeps(allocation: str, power: int) -> None:
    scores = {}
    for name, weight in weights().items():
        norm = {0: 1.0, 1: numpy.abs(weight).sum(), 2: numpy.sqrt((weight**2).sum())}[power]
        scores[name] = numpy.abs(weight) / norm
    everything = numpy.sort(numpy.concatenate([score.ravel() for score in scores.values()]))[::-1]
    limit = everything[round(0.4 * len(everything)) - 1]
    for view in plan(allocation).views:
        assert view.density == pytest.approx((scores[view.name] >= limit).mean(), abs=2e-3)


def test_a_wanda_threshold_weighs_by_the_inputs_of_the_dense_model() -> None:
    norms = input_norms(tiny_ids())
    scores = {name: numpy.abs(weight) * norms[name].numpy() for name, weight in weights().items()}
    limit = numpy.sort(numpy.concatenate([score.ravel() for score in scores.values()]))[::-1]
    limit = limit[round(0.4 * len(limit)) - 1]
    config = make_config({"method": "magnitude", "sparsity": 0.6, "allocation": "global", "allocation_score": "wanda"})
    for view in plan_pruning(uneven_model(), config, input_ids=tiny_ids()).views:
        assert view.density == pytest.approx((scores[view.name] >= limit).mean(), abs=2e-3)


def test_erk_is_in_proportion_to_the_sum_over_the_product() -> None:
    made = plan("erk")
    ratios = {view.density / ((view.shape[0] + view.shape[1]) / view.numel) for view in made.views if view.density < 1}
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6) and len({view.density for view in made.views}) > 1
    # A model without weights gets the same plan.
    with torch.device("meta"):
        empty = tiny_model("llama")
    assert plan_pruning(empty, MagnitudeConfig(sparsity=0.6, allocation="erk")) == made


def test_owl_follows_the_outlier_ratios_of_the_blocks() -> None:
    norms = input_norms(tiny_ids())
    ratios = []
    for block in range(3):
        scores = numpy.concatenate(
            [
                (numpy.abs(weight) * norms[name].numpy()).ravel()
                for name, weight in weights().items()
                if f".{block}." in name
            ]
        )
        ratios.append((scores > 5 * scores.mean()).mean())
    spread = numpy.array(ratios)
    spread = (spread - spread.min()) / (spread.max() - spread.min()) * 0.16
    expected = spread - spread.mean() + 0.4
    made = plan("owl")
    for view in made.views:
        assert view.density == pytest.approx(expected[view.block], abs=3e-3)


def test_alpha_prunes_heavy_tails_less() -> None:
    exponents = []
    for block in range(3):
        own = []
        for name, weight in weights().items():
            if f".{block}." in name:
                values = numpy.sort(numpy.linalg.svd(weight, compute_uv=False) ** 2)
                tail = len(values) // 2
                own.append(1 + tail / numpy.log(values[-tail:] / values[-tail - 1]).sum())
        exponents.append(numpy.mean(own))
    place = (numpy.array(exponents) - min(exponents)) / (max(exponents) - min(exponents))
    mapped = 0.7 + 0.6 * place
    expected = 1 - mapped / mapped.mean() * 0.6
    for view in plan("alpha").views:
        assert view.density == pytest.approx(expected[view.block], rel=1e-3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 10**6)), min_size=1, max_size=30),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_the_budget_is_met_whatever_was_wished(wishes: list[tuple[float, int]], density: float, share: float) -> None:
    floor = density * share
    wanted, sizes = zip(*wishes, strict=True)
    met = meet_budget(wanted, sizes, density, floor)
    assert all(floor - 1e-12 <= value <= 1 for value in met)
    assert sum(v * n for v, n in zip(met, sizes, strict=True)) == pytest.approx(density * sum(sizes), rel=1e-6)
    # The order of the wishes survives.
    ranked = [value for _, value in sorted(zip(wanted, met, strict=True))]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(ranked))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 700), st.floats(0, 1)), min_size=1, max_size=30),
    st.floats(0.05, 0.95),
)
def test_rows_of_whole_weights_meet_the_budget(layers: list[tuple[int, int, float]], density: float) -> None:
    shapes, sizes = [own[:2] for own in layers], [own[0] * own[1] for own in layers]
    met = meet_budget([own[2] for own in layers], sizes, density, 0.0)
    whole = whole_rows(met, shapes, density, [0.0] * len(layers))
    for value, before, (_, columns) in zip(whole, met, shapes, strict=True):
        assert value * columns == pytest.approx(round(value * columns), abs=1e-6)
        assert -1e-9 <= value <= 1 and abs(value - before) * columns <= 1 + 1e-6
    missed = abs(sum(own * size for own, size in zip(whole, sizes, strict=True)) - density * sum(sizes))
    assert missed <= max(rows for rows, _ in shapes) / 2 + 1e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95), st.floats(1e-3, 1e3))
def test_histograms_find_the_threshold_of_a_sort(seed: int, share: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(4000, generator=generator).abs() * factor for factor in (1.0, scale)]
    exact = torch.cat([scores[0], scores[1] / scale]).sort(descending=True).values[round(share * 8000) - 1]
    found = shares_above([Histogram.of(own) for own in scores], [1.0, scale], share)
    assert found[0] == pytest.approx(float((scores[0] >= exact).float().mean()), abs=3e-3)
    assert sum(found) / 2 == pytest.approx(share, abs=1e-6)
    assert Histogram.of(scores[0]).total == pytest.approx(float(scores[0].double().sum()))


@pytest.mark.parametrize("allocation", sorted(set(ALLOCATIONS) - {"uniform"}))
def test_the_plan_is_carried_out_and_reused(allocation: str, tmp_path) -> None:
    input_ids = tiny_ids()
    config = MagnitudeConfig(sparsity=0.6, allocation=allocation, min_keep_ratio=0.05)
    model = uneven_model()
    result = prune(model, config, input_ids=input_ids)
    for view, outcome in zip(result.plan.views, result.views, strict=True):
        # The floor rounds up in every row.
        assert abs(outcome.kept - view.density * view.numel) <= view.shape[0]
    result.plan.save(tmp_path / "plan.json")
    again = uneven_model()
    prune(again, replace(config, allocation=str(tmp_path / "plan.json"), sparsity=None))
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocation", ["owl", "alpha", "layerwise_l2"])
def test_allocations_work_on_every_family(family: str, allocation: str) -> None:
    config = make_config({"method": "wanda", "sparsity": 0.6, "allocation": allocation})
    model = tiny_model(family)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    made = plan_pruning(model, config, input_ids=tiny_ids(4, 32))
    assert kept_share(made) == pytest.approx(0.4, abs=1e-6)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_what_makes_no_sense_is_refused_with_the_reason() -> None:
    with pytest.raises(BadInputError, match="nothing to decide"):
        make_config({"method": "wanda", "pattern": "2:4", "allocation": "owl"})
    with pytest.raises(BadInputError, match="outlier_range"):
        make_config({"method": "wanda", "allocation": "owl", "outlier_range": 0.9})
    with pytest.raises(BadInputError, match="alpha_range: this key belongs to allocation: alpha"):
        make_config({"method": "wanda", "allocation": "owl", "alpha_range": 0.3})
    with pytest.raises(BadInputError, match="needs calibration text"):
        plan_pruning(uneven_model(), MagnitudeConfig(sparsity=0.5, allocation="owl"))
    assert math.isclose(kept_share(plan("uniform")), 0.4)
