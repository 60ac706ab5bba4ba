"""What the presets choose, and that what they leave unused is not told as a setting."""

import pytest

from hf_prune.compose import make_block_reconstruction, make_config, own_options
from hf_prune.errors import BadInputError
from hf_prune.methods.presets import BalancedConfig, BestConfig


@pytest.mark.parametrize("preset", [BalancedConfig, BestConfig])
def test_densities_are_learned_where_the_pattern_leaves_a_choice(preset: type) -> None:
    assert preset(sparsity=0.6).allocation == "fcpts"
    assert preset(pattern="2:4").allocation == "uniform"
    assert preset(allocation="owl").allocation == "owl"
    with pytest.raises(BadInputError, match="nothing to decide"):
        make_config({"method": preset().method, "pattern": "2:4", "allocation": "fcpts"})


def test_settings_of_unused_parts_are_not_told() -> None:
    learned, uniform = (make_config({"method": "best", "allocation": name}) for name in ("auto", "uniform"))
    assert "reconstruct_passes" in own_options(learned) and "reconstruct_passes" in own_options(uniform)
    short = make_config({"method": "balanced"})
    assert own_options(short)["fcpts_steps"] == BalancedConfig().fcpts_steps
    assert not any(
        key.startswith("fcpts") for key in own_options(make_config({"method": "balanced", "pattern": "2:4"}))
    )
    plain = make_config({"method": "best", "reconstruct": "none"})
    assert not any(key.startswith("reconstruct") for key in own_options(plain))
    assert "iterations" in own_options(plain)


def test_auto_takes_the_keys_of_what_it_stands_for() -> None:
    config = make_config({"method": "admm", "allocation": "auto", "fcpts_steps": 3})
    assert (config.allocation, own_options(config)["fcpts_steps"]) == ("fcpts", 3)
    with pytest.raises(BadInputError, match=r"fcpts_steps: this key belongs to allocation: fcpts"):
        make_config({"method": "admm", "allocation": "auto", "pattern": "2:4", "fcpts_steps": 3})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "none"),
        ({"pattern": "2:4"}, "block"),
        ({"pattern": "2:4", "propagate": False}, "none"),
        ({"pattern": "2:4", "propagate": "false"}, "none"),
        ({"pattern": "2:4", "reconstruct": "none"}, "none"),
        ({"reconstruct": "block"}, "block"),
    ],
)
def test_blocks_are_trained_where_no_densities_are_learned(options: dict, expected: str) -> None:
    config = make_config({"method": "balanced", **options})
    assert config.reconstruct == expected
    assert ("reconstruct_passes" in own_options(config)) == (expected == "block")
    assert (make_block_reconstruction(config) is not None) == (expected == "block")


def test_any_method_may_leave_the_reconstruction_open() -> None:
    config = make_config({"method": "wanda", "pattern": "4:8", "reconstruct": "auto", "reconstruct_passes": 3})
    assert (config.reconstruct, own_options(config)["reconstruct_passes"]) == ("block", 3)
    with pytest.raises(BadInputError, match="reconstruct_passes: this key belongs to reconstruct: block"):
        make_config({"method": "wanda", "reconstruct": "auto", "reconstruct_passes": 3})
