"""Each method's arithmetic against an independent computation on small matrices."""

import numpy
import pytest
import torch
from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.compose import make_solver
from hf_prune.engine.statistics import Statistics
from hf_prune.masks import MaskRule
from hf_prune.methods import methods
from hf_prune.methods.ria import RIAConfig
from hf_prune.methods.sparsegpt import SparseGPTConfig, inverse_cholesky
from hf_prune.methods.wanda import WandaConfig
from hf_prune.patterns import Pattern

OUT, IN, TOKENS = 12, 32, 200


def layer(seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weights [out, in] and inputs [tokens, in] whose columns are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    inputs[:, list(dead)] = 0
    return torch.randn(OUT, IN, generator=generator), inputs


def observe(inputs: Tensor, *kinds: str) -> Statistics:
    statistics = Statistics(kinds, inputs.shape[1], inputs.device)
    for chunk in inputs.split(64):
        statistics.add(chunk)
    statistics.finish(lambda tensor: None)
    return statistics


def test_statistics_are_the_sums_over_all_tokens() -> None:
    _, inputs = layer()
    statistics = observe(inputs[:, :20], "gram", "sum")
    exact = inputs[:, :20].double().numpy()
    assert statistics.count == TOKENS
    numpy.testing.assert_allclose(statistics.gram, exact.T @ exact, rtol=1e-4, atol=1e-3)
    numpy.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-4, atol=1e-4)
    numpy.testing.assert_allclose(statistics.variance, exact.var(axis=0), rtol=1e-4)


def test_a_wide_gram_matrix_is_whole_although_only_panels_are_multiplied() -> None:
    inputs = torch.randn(50, 1100, generator=torch.Generator().manual_seed(3))
    numpy.testing.assert_allclose(observe(inputs, "gram").gram, (inputs.double().T @ inputs.double()), atol=1e-3)


@pytest.mark.parametrize("power", [0.5, 0.0, 1.0])
def test_ria_is_shares_of_row_and_column_times_a_power_of_the_input_norm(power: float) -> None:
    weight, inputs = layer()
    weight[3], weight[:, 5] = 0, 0
    pruned, mask = make_solver(RIAConfig(activation_power=power)).solve(
        weight, observe(inputs, "sum_of_squares"), MaskRule(0.5)
    )
    size, norms = weight.double().abs().numpy(), inputs.double().norm(dim=0).numpy()
    scores = numpy.zeros((OUT, IN))
    for row in range(OUT):
        for column in range(IN):
            own = size[row, column]
            shares = own / (size[row].sum() or 1) + own / (size[:, column].sum() or 1)
            scores[row, column] = shares * norms[column] ** power
    kept = numpy.zeros(OUT * IN, dtype=bool)
    kept[numpy.argsort(-scores.reshape(-1), kind="stable")[: OUT * IN // 2]] = True
    assert numpy.array_equal(mask.numpy(), kept.reshape(OUT, IN))
    assert torch.equal(pruned, weight * mask)


def test_wanda_is_weight_times_input_norm_row_by_row() -> None:
    weight, inputs = layer()
    pruned, mask = make_solver(WandaConfig(sparsity=0.5)).solve(
        weight, observe(inputs, "sum_of_squares"), MaskRule(0.5)
    )
    for row in range(OUT):
        score = [abs(float(weight[row, column])) * float(inputs[:, column].double().norm()) for column in range(IN)]
        dropped = numpy.argsort(score, kind="stable")[: IN // 2]
        expected = weight[row].clone()
        expected[list(dropped)] = 0
        assert torch.equal(pruned[row], expected)
    assert torch.equal(pruned != 0, mask)


def reference_sparsegpt(weight: Tensor, inputs: Tensor, density: float, block: int, damping: float) -> numpy.ndarray:
    """The paper's algorithm the slow way: the remaining inverse Hessian by Gaussian elimination, one row at a time."""
    hessian = inputs.double().numpy().T @ inputs.double().numpy() / len(inputs)
    hessian += damping * numpy.mean(numpy.diag(hessian)) * numpy.eye(len(hessian))
    width = len(hessian)
    inverses = []
    inverse = numpy.linalg.inv(hessian)
    for column in range(width):
        inverses.append(inverse.copy())
        pivot = inverse[column, column]
        inverse = inverse - numpy.outer(inverse[:, column], inverse[column]) / pivot
    result = weight.double().numpy().copy()
    for start in range(0, width, block):
        stop = min(start + block, width)
        cost = numpy.stack([result[:, j] ** 2 / inverses[j][j, j] for j in range(start, stop)], axis=1)
        dropped = numpy.zeros(cost.size, dtype=bool)
        dropped[numpy.argsort(cost, axis=None, kind="stable")[: round(cost.size * (1 - density))]] = True
        dropped = dropped.reshape(cost.shape)
        for j in range(start, stop):
            for row in range(len(result)):
                if dropped[row, j - start]:
                    step = result[row, j] / inverses[j][j, j]
                    result[row, j:] -= step * inverses[j][j, j:]
                    result[row, j] = 0.0
    return result


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_sparsegpt_equals_the_elimination_it_stands_for(block: int, sparsity: float) -> None:
    weight, inputs = layer()
    solver = make_solver(SparseGPTConfig(sparsity=sparsity, block_size=block))
    pruned, mask = solver.solve(weight, observe(inputs, "gram"), MaskRule(1 - sparsity))
    expected = reference_sparsegpt(weight, inputs, 1 - sparsity, block, 0.01)
    assert torch.equal(mask, torch.from_numpy(expected != 0))
    numpy.testing.assert_allclose(pruned, expected, atol=2e-4)


def test_the_factor_is_the_upper_cholesky_of_the_damped_inverse() -> None:
    _, inputs = layer()
    factor, dead = inverse_cholesky(observe(inputs, "gram"), 0.01)
    hessian = inputs.double().T @ inputs.double() / TOKENS
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(IN)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    numpy.testing.assert_allclose(factor, expected, rtol=1e-3, atol=1e-5)
    assert not dead.any()


def test_the_update_makes_up_for_a_mask_that_was_given() -> None:
    weight, inputs = layer(seed=5)
    statistics = observe(inputs, "gram", "sum_of_squares")
    config = PruneConfig(criterion="wanda", update="sparsegpt", sparsity=0.6)
    pruned, mask = make_solver(config).solve(weight, statistics, MaskRule(0.4))
    _, plain_mask = make_solver(WandaConfig(sparsity=0.6)).solve(weight, statistics, MaskRule(0.4))
    assert torch.equal(mask, plain_mask)

    def error(values: Tensor) -> float:
        return float(((values - weight) @ inputs.T).square().sum())

    # The least squares refit of each row on its support is the best there is; one sweep lies between it and none.
    best = torch.zeros_like(weight)
    for row in range(OUT):
        kept = mask[row]
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight[row]).double()).solution.float()
    assert error(best) < error(pruned) < 0.9 * error(weight * mask)


def test_dead_inputs_are_dropped_first() -> None:
    weight, inputs = layer(dead=(3, 20))
    pruned, mask = make_solver(SparseGPTConfig(sparsity=0.25)).solve(weight, observe(inputs, "gram"), MaskRule(0.75))
    assert torch.isfinite(pruned).all()
    assert not mask[:, [3, 20]].any()


def test_a_rank_deficient_hessian_is_damped_until_it_factors(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * 1e4
    config = SparseGPTConfig(sparsity=0.5, damping=1e-10)
    pruned, mask = make_solver(config).solve(weight, observe(inputs, "gram"), MaskRule(0.5))
    assert "raising the damping" in caplog.text
    assert torch.isfinite(pruned).all() and int(mask.sum()) == 128


@pytest.mark.parametrize("name", [name for name in methods() if not methods()[name].structured])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "4:8"])
def test_every_method_keeps_every_pattern(name: str, pattern: str) -> None:
    weight, inputs = layer()
    solver = make_solver(methods()[name](pattern=pattern, sparsity=0.5 if pattern == "unstructured" else None))
    statistics = observe(inputs, *solver.statistics)
    parsed = Pattern.parse(pattern)
    pruned, mask = solver.solve(weight, statistics, MaskRule(parsed.density or 0.5, parsed))
    assert torch.equal(pruned != 0, mask)
    if parsed.m:
        assert torch.equal(mask.view(OUT, -1, parsed.m).sum(-1), torch.full((OUT, IN // parsed.m), parsed.n))
    else:
        assert int(mask.sum()) == OUT * IN // 2
