"""What the presets choose, and that what they leave unused is not told as a setting."""

import pytest

from hf_prune.compose import make_block_reconstruction, make_config, own_options
from hf_prune.errors import BadInputError
from hf_prune.methods.presets import BalancedConfig, BestConfig


@pytest.mark.parametrize("preset", [BalancedConfig, BestConfig])
def test_fisher_information_decides_where_the_pattern_leaves_a_choice(preset: type) -> None:
    chosen = {
        (): ("fisher", "fisher"),
        ("pattern", "2:4"): ("uniform", "none"),
        ("allocation", "owl"): ("owl", "fisher"),
        ("output_importance", "none"): ("fisher", "none"),
        # Wanda compares inside a row.
        ("criterion", "wanda"): ("fisher", "none"),
    }
    for option, expected in chosen.items():
        config = make_config({"method": preset().method, **({option[0]: option[1]} if option else {})})
        assert (config.allocation, config.output_importance) == expected, option
    with pytest.raises(BadInputError, match="nothing to decide"):
        make_config({"method": preset().method, "pattern": "2:4", "allocation": "fcpts"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "wanda", "output_importance": "fisher"}, "criterion wanda compares weights inside a row"),
        ({"method": "sparsegpt", "pattern": "2:4", "output_importance": "fisher"}, "pattern 2:4 compares weights"),
        ({"method": "sparsegpt", "output_importance": "taylor"}, "'taylor' is unknown; choose none, fisher or auto"),
        ({"method": "intra_fusion", "output_importance": "fisher"}, "removes whole units"),
    ],
)
def test_an_importance_of_outputs_that_decides_nothing_is_refused(options: dict, reason: str) -> None:
    with pytest.raises(BadInputError, match=reason):
        make_config(options)


def test_settings_of_unused_parts_are_not_told() -> None:
    learned, uniform = (make_config({"method": "best", "allocation": name}) for name in ("auto", "uniform"))
    assert "reconstruct_passes" in own_options(learned) and "reconstruct_passes" in own_options(uniform)
    learning = make_config({"method": "balanced", "allocation": "fcpts", "fcpts_steps": 3})
    assert own_options(learning)["fcpts_steps"] == 3
    assert not any(key.startswith("fcpts") for key in own_options(make_config({"method": "balanced"})))
    plain = make_config({"method": "best", "reconstruct": "none"})
    assert not any(key.startswith("reconstruct") for key in own_options(plain))
    assert "iterations" in own_options(plain)


def test_auto_takes_the_keys_of_what_it_stands_for() -> None:
    assert make_config({"method": "admm", "allocation": "auto"}).allocation == "fisher"
    with pytest.raises(BadInputError, match=r"fcpts_steps: this key belongs to allocation: fcpts"):
        make_config({"method": "admm", "allocation": "auto", "fcpts_steps": 3})


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
