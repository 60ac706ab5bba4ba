"""Mask selection against sorting in plain Python."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.masks import MaskRule, select_largest, select_n_of_m
from hf_prune.patterns import Pattern

# Few distinct values: ties are the rule in dequantised weights, not the exception.
matrices = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1)).map(
    lambda shape: torch.from_numpy(
        numpy.random.default_rng(shape[2]).integers(0, 5, (shape[0], shape[1] * 4)).astype("float32")
    )
)


def best(values: list[float], count: int) -> set[int]:
    """Indices of the `count` largest values; of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda index: (-values[index], index))[:count])


@given(matrices, st.integers(0, 30))
def test_select_largest_is_a_stable_sort_of_each_row(scores: torch.Tensor, count: int) -> None:
    mask = select_largest(scores, count)
    for row, marked in zip(scores.tolist(), mask.tolist(), strict=True):
        assert {index for index, kept in enumerate(marked) if kept} == best(row, count)


@given(matrices, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 4)]))
def test_n_of_m_is_a_stable_sort_of_each_group(scores: torch.Tensor, pattern: tuple[int, int]) -> None:
    n, m = pattern
    mask = select_n_of_m(scores, n, m)
    for row, marked in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), m):
            kept = {index for index in range(m) if marked[start + index]}
            assert kept == best(row[start : start + m], n)


@given(matrices, st.floats(0.01, 1.0))
def test_unstructured_keeps_the_share_of_the_matrix_to_the_weight(scores: torch.Tensor, density: float) -> None:
    kept = int(MaskRule(density).select(scores).sum())
    assert abs(kept - density * scores.numel()) <= 0.5


@given(matrices, st.floats(0.05, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=60)
def test_the_floor_holds_in_every_row_and_costs_nothing_overall(
    scores: torch.Tensor, density: float, share: float
) -> None:
    floor = share * density
    mask = MaskRule(density, min_keep_ratio=floor).select(scores)
    rows, columns = scores.shape
    assert int(mask.sum(dim=1).min()) >= floor * columns - 1e-6
    # Whole weights a row can take a little more than the density where rows are short.
    assert int(mask.sum()) <= max(round(density * rows * columns) + 1, rows * int(numpy.ceil(floor * columns)))


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 12),
    st.floats(0.02, 1.0),
    st.sampled_from([0.0, 0.05, 0.3, 0.97, 1.0]),
)
def test_blocks_of_columns_add_up_to_the_whole_matrix(
    rows: int, columns: int, width: int, density: float, share: float
) -> None:
    """As SparseGPT selects: block after block, told what has been kept."""
    rule = MaskRule(density, min_keep_ratio=share * density)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    kept = 0
    parts = []
    for start in range(0, columns, width):
        parts.append(rule.select(scores[:, start : start + width], start=start, kept=kept, width=columns))
        kept += int(parts[-1].sum())
    mask = torch.cat(parts, dim=1)
    assert int(mask.sum(dim=1).min()) >= share * density * columns - 1e-6
    if share == 0:
        assert abs(kept - density * rows * columns) <= 0.5
    else:
        assert kept >= density * rows * columns - 0.5
        # The bound that the verification of a written model holds.
        assert kept <= rows * math.ceil(density * columns - 1e-9)


def test_by_row_drops_the_whole_number_of_weights_below_the_share() -> None:
    # Wanda's code drops int(columns * sparsity) of each row.
    for sparsity in (0.1, 0.3, 0.5, 0.6, 0.7, 0.9):
        mask = MaskRule(1 - sparsity).select(torch.rand(3, 10), by_row=True)
        assert (~mask).sum(dim=1).tolist() == [int(10 * sparsity + 1e-9)] * 3


def test_a_large_matrix_of_one_value_keeps_its_first_weights() -> None:
    mask = MaskRule(0.25).select(torch.ones(64, 64))
    assert mask.flatten()[: 64 * 16].all() and not mask.flatten()[64 * 16 :].any()


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "unstructured"])
def test_patterns_read_back(text: str) -> None:
    assert str(Pattern.parse(text)) == text
