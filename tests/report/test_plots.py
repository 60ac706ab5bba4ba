"""The picture's data against the rows that it was drawn from."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import LogNorm

from hf_prune.report.plots import DPI, plot_sparsity_by_layer

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"]


def rows_of(blocks: int, varied: bool, errors: bool) -> list[dict[str, Any]]:
    return [
        {
            "name": f"model.layers.{block}.{kind}",
            "block": block,
            "shape": [64, 64],
            "density": 0.5 + (0.3 * math.sin(block + place) if varied else 0),
            "error": 0.002 * 2 ** ((block + place) % 7) if errors else None,
        }
        for block in range(blocks)
        for place, kind in enumerate(KINDS)
    ]


def drawn(axes: Any) -> np.ndarray:
    return np.asarray(axes.images[0].get_array().filled(np.nan))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("blocks", [2, 5, 30, 80])
def test_both_maps_show_the_rows(tmp_path: Path, blocks: int) -> None:
    rows = rows_of(blocks, varied=True, errors=True)
    figure = plot_sparsity_by_layer(rows, tmp_path / "plots" / "layers.png")
    assert figure is not None
    sparsity, error = [axes for axes in figure.axes if axes.images]
    for axes, value in ((sparsity, lambda row: 1 - row["density"]), (error, lambda row: row["error"])):
        expected = [[100 * value(rows[block * len(KINDS) + place]) for block in range(blocks)] for place in range(4)]
        np.testing.assert_allclose(drawn(axes), expected)
        assert [label.get_text() for label in axes.get_yticklabels()] == KINDS
        ticks = [
            (place, int(label.get_text()))
            for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        ]
        assert ticks
        assert all(place == block for place, block in ticks)
        assert len(ticks) <= 30
        low, high = axes.images[0].get_clim()
        assert low <= np.nanmin(drawn(axes)) + 1e-9
        assert high >= np.nanmax(drawn(axes)) - 1e-9
    assert isinstance(error.images[0].norm, LogNorm)
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    assert png_size(tmp_path / "plots" / "layers.png") == (width, height)


def test_few_blocks_carry_their_figures(tmp_path: Path) -> None:
    rows = rows_of(5, varied=True, errors=False)
    figure = plot_sparsity_by_layer(rows, tmp_path / "layers.png")
    assert figure is not None
    (axes,) = [axes for axes in figure.axes if axes.images]
    written = {(text.get_position()[1], text.get_position()[0]): float(text.get_text()) for text in axes.texts}
    expected = {(KINDS.index(row["name"].split(".", 3)[3]), row["block"]): 100 * (1 - row["density"]) for row in rows}
    assert written == pytest.approx(expected, rel=6e-3)


def test_uniform_sparsity_is_said_and_errors_are_drawn(tmp_path: Path) -> None:
    figure = plot_sparsity_by_layer(rows_of(6, varied=False, errors=True), tmp_path / "layers.png")
    assert figure is not None
    (axes,) = [axes for axes in figure.axes if axes.images]
    assert axes.get_title(loc="left").startswith("Sparsity: 50.0 % in each of 24 weight matrices\nOutput error")
    assert drawn(axes)[3, 4] == pytest.approx(100 * 0.002 * 2 ** ((4 + 3) % 7))


def test_rounding_does_not_look_like_structure(tmp_path: Path) -> None:
    rows = rows_of(3, varied=False, errors=False)
    rows[4]["density"] = 0.4995
    figure = plot_sparsity_by_layer(rows, tmp_path / "layers.png")
    assert figure is not None
    low, high = next(axes for axes in figure.axes if axes.images).images[0].get_clim()
    assert high - low >= 10 - 1e-9


def test_experts_are_averaged_and_gaps_stay_empty(tmp_path: Path) -> None:
    rows = [
        {"name": f"model.layers.{block}.mlp.experts.{expert}.w1", "block": block, "density": 0.2 * expert + 0.1 * block}
        for block in (0, 2)
        for expert in range(3)
    ]
    rows.append({"name": "model.layers.1.mlp.up_proj", "block": 1, "density": 1.0})
    rows.append({"name": "model.embed_tokens", "block": None, "density": 1.0})
    figure = plot_sparsity_by_layer(rows, tmp_path / "layers.png")
    assert figure is not None
    axes = next(axes for axes in figure.axes if axes.images)
    np.testing.assert_allclose(drawn(axes), [[80, np.nan, 60], [np.nan, 0, np.nan]], atol=1e-9)


def test_rows_outside_the_blocks_alone_draw_nothing(tmp_path: Path) -> None:
    assert plot_sparsity_by_layer([{"name": "wte", "block": None, "density": 1.0}], tmp_path / "layers.png") is None
    assert not (tmp_path / "layers.png").exists()
