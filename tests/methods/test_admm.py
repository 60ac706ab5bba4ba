"""ADMM and the least squares refit against numpy: the published iteration with explicit inverses, row by row solves."""

import numpy
import pytest
import torch
from test_criteria_and_updates import IN, OUT, layer, observe
from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.compose import make_config, make_solver
from hf_prune.errors import BadInputError
from hf_prune.least_squares import refit, scaled_gram
from hf_prune.masks import MaskRule
from hf_prune.methods.admm import FACTORIZATIONS, AdmmConfig
from hf_prune.patterns import Pattern


def damped_gram(inputs: Tensor, damping: float = 0.01) -> numpy.ndarray:
    gram = inputs.double().numpy().T @ inputs.double().numpy()
    return gram + damping * numpy.mean(numpy.diag(gram)) * numpy.eye(len(gram))


def best_on(weight: Tensor, gram: numpy.ndarray, mask: Tensor) -> numpy.ndarray:
    """Each row's normal equations on its own support."""
    result = numpy.zeros(weight.shape)
    for row in range(len(weight)):
        kept = mask[row].numpy()
        right = gram[kept] @ weight[row].double().numpy()
        result[row, kept] = numpy.linalg.solve(gram[numpy.ix_(kept, kept)], right)
    return result


def error(weight: numpy.ndarray, dense: Tensor, gram: numpy.ndarray) -> float:
    change = weight - dense.double().numpy()
    return float(numpy.trace(change @ gram @ change.T))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("started", [False, True])
def test_the_refit_solves_every_row_on_its_support(density: float, started: bool) -> None:
    weight, inputs = layer()
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(2)) < density
    mask[3] = False
    start = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4)) if started else None
    gram = scaled_gram(observe(inputs, "gram"), 0.01)
    found = refit(weight, gram, mask, start, max_steps=200, tolerance=1e-7)
    numpy.testing.assert_allclose(found, best_on(weight, damped_gram(inputs), mask), atol=2e-3)
    assert not found[~mask].any()


def reference_alps(weight: Tensor, gram: numpy.ndarray, keep: int, iterations: int) -> numpy.ndarray:
    """The authors' iteration on one matrix, unstructured, with a fresh inverse for every rho; B before the refit."""
    scale = numpy.sqrt(numpy.diag(gram))
    matrix = gram / scale / scale[:, None]
    dense = (weight.double().numpy() * scale).T
    right = matrix @ dense

    def largest(values: numpy.ndarray) -> numpy.ndarray:
        kept = numpy.zeros(values.size, dtype=bool)
        kept[numpy.argsort(-numpy.abs(values).T.ravel(), kind="stable")[:keep]] = True
        return kept.reshape(values.T.shape).T

    rho, started, first = 0.1, False, largest(dense)
    before, sparse, dual = first, dense * first, numpy.zeros_like(dense)
    for iteration in range(iterations):
        smooth = numpy.linalg.solve(matrix + rho * numpy.eye(len(matrix)), right - dual + rho * sparse)
        support = largest(smooth + dual / rho)
        sparse = (smooth + dual / rho) * support
        dual = dual + rho * (smooth - sparse)
        if (iteration + 1) % 3 == 0:
            changed = (support != before).sum()
            before = support
            if changed / keep > 0.1:
                started, rho = True, rho * 1.3
            elif changed / keep > 0.005:
                started, rho = True, rho * 1.2
            elif changed and started:
                rho *= 1.1
            elif changed:
                rho, before, sparse, dual = rho / 5, first, dense * first, numpy.zeros_like(dense)
            elif started:
                break
            else:
                rho /= 5
            if iteration >= 30 and started and changed / keep < 3e-4:
                break
    return (smooth / scale[:, None]).T


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("iterations", [7, 300])
def test_admm_is_the_published_iteration(sparsity: float, iterations: int) -> None:
    weight, inputs = layer(seed=3)
    gram = damped_gram(inputs)
    keep = round(weight.numel() * (1 - sparsity))
    near = reference_alps(weight, gram, keep, iterations)
    scaled = numpy.abs(near * numpy.sqrt(numpy.diag(gram))).ravel()
    support = numpy.zeros(weight.numel(), dtype=bool)
    support[numpy.argsort(-scaled, kind="stable")[:keep]] = True
    support = torch.from_numpy(support.reshape(weight.shape))
    pruned, mask = make_solver(AdmmConfig(sparsity=sparsity, iterations=iterations)).solve(
        weight, observe(inputs, "gram"), MaskRule(1 - sparsity)
    )
    assert int((mask != support).sum()) <= 2  # float32 against float64 at the threshold
    assert error(pruned.numpy(), weight, gram) < 1.02 * error(best_on(weight, gram, support), weight, gram)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_admm_leaves_less_error_than_sparsegpt(pattern: str) -> None:
    weight, inputs = layer(seed=1)
    gram = damped_gram(inputs)
    rule = MaskRule(0.5, Pattern.parse(pattern))
    errors = {}
    for name in ("sparsegpt", "admm", "balanced"):
        config = make_config({"method": name, "pattern": pattern})
        pruned, mask = make_solver(config).solve(weight, observe(inputs, "gram"), rule)
        assert torch.equal(pruned != 0, mask)
        errors[name] = error(pruned.numpy(), weight, gram)
    assert errors["admm"] < 0.97 * errors["sparsegpt"]
    assert errors["balanced"] < errors["sparsegpt"]


@pytest.mark.parametrize("update", ["none", "sparsegpt"])
def test_linear_reconstruction_ends_at_the_best_weights_of_any_support(update: str) -> None:
    weight, inputs = layer(seed=5)
    gram = damped_gram(inputs)
    config = make_config(
        {"criterion": "wanda", "update": update, "sparsity": 0.6, "reconstruct": "linear", "reconstruct_steps": 300}
    )
    solver = make_solver(config)
    assert solver.statistics >= {"gram"}
    pruned, mask = solver.solve(weight, observe(inputs, "gram", "sum_of_squares"), MaskRule(0.4))
    best = error(best_on(weight, gram, mask), weight, gram)
    assert error(pruned.numpy(), weight, gram) == pytest.approx(best, rel=1e-3)


def test_admm_refits_a_support_that_another_criterion_chose() -> None:
    weight, inputs = layer(seed=6)
    gram = damped_gram(inputs)
    solver = make_solver(PruneConfig(criterion="magnitude", update="admm", sparsity=0.5))
    pruned, mask = solver.solve(weight, observe(inputs, "gram"), MaskRule(0.5))
    assert torch.equal(mask, MaskRule(0.5).select(weight.abs()))
    best = error(best_on(weight, gram, mask), weight, gram)
    assert error(pruned.numpy(), weight, gram) == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("rho", [0.004, 0.1, 30.0])
def test_both_factorizations_solve_the_damped_system(factorization: str, rho: float) -> None:
    weight, inputs = layer(seed=3)
    gram = scaled_gram(observe(inputs, "gram"), 0.01)
    inverse = FACTORIZATIONS[factorization](gram)
    # Another rho before, as the search has it.
    inverse.solve(weight, 1.0)
    system = gram.matrix.double().numpy() + rho * numpy.eye(IN)
    expected = numpy.linalg.solve(system, weight.double().numpy().T).T
    numpy.testing.assert_allclose(inverse.solve(weight, rho).numpy(), expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_both_factorizations_find_the_same_support(pattern: str) -> None:
    weight, inputs = layer(seed=4)
    masks = [
        make_solver(make_config({"method": "balanced", "pattern": pattern, "factorization": factorization})).solve(
            weight, observe(inputs, "gram"), MaskRule(0.5, Pattern.parse(pattern))
        )[1]
        for factorization in FACTORIZATIONS
    ]
    assert float((masks[0] == masks[1]).float().mean()) > 0.995


def test_dead_inputs_do_no_harm() -> None:
    weight, inputs = layer(dead=(3, 20))
    for name in ("admm", "balanced"):
        pruned, mask = make_solver(make_config({"method": name, "sparsity": 0.5})).solve(
            weight, observe(inputs, "gram"), MaskRule(0.5)
        )
        assert torch.isfinite(pruned).all() and int(mask.sum()) == OUT * IN // 2
    nothing = torch.zeros(64, IN)
    pruned, mask = make_solver(AdmmConfig(sparsity=0.5)).solve(weight, observe(nothing, "gram"), MaskRule(0.5))
    assert torch.isfinite(pruned).all()


def test_senseless_combinations_are_refused_with_the_reason() -> None:
    with pytest.raises(BadInputError, match="selects weights only while it updates"):
        make_config({"criterion": "admm", "update": "none"})
    with pytest.raises(BadInputError, match="what the update admm ends with already"):
        make_config({"method": "admm", "reconstruct": "linear"})
    with pytest.raises(BadInputError, match="does not change weights; choose none or"):
        make_config({"criterion": "magnitude", "update": "wanda"})
    with pytest.raises(BadInputError, match="iterations"):
        make_config({"method": "admm", "iterations": 0})
    with pytest.raises(BadInputError, match="rho_growth"):
        AdmmConfig(rho_growth=0)


@pytest.mark.parametrize("density", [1e-12, 1.0])
def test_a_layer_that_keeps_everything_or_nothing_needs_no_search(density: float) -> None:
    """Allocations may ask for either; no rho moves such a support."""
    weight, inputs = layer(seed=5)
    for name in ("admm", "balanced"):
        solver = make_solver(make_config({"method": name, "sparsity": 0.5}))
        pruned, mask = solver.solve(weight, observe(inputs, "gram"), MaskRule(density))
        assert int(mask.sum()) == round(density * weight.numel())
        torch.testing.assert_close(pruned, weight * density, atol=1e-4, rtol=1e-3)
