"""Recipes: what is read is what was written, and everything else is refused by name."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_prune.arguments import matches
from hf_prune.bench.grid import load_grid
from hf_prune.bench.sweep import make_sweep
from hf_prune.cli.train import make_recipe as make_any_train_recipe
from hf_prune.compose import make_config, make_solver
from hf_prune.errors import BadInputError
from hf_prune.fields import coerce
from hf_prune.recipe import dump_yaml, load_recipe, make_recipe, parse_flags, parse_yaml, read_recipe, read_values
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.run import make_candidates
from hf_prune.training.arguments import make_train_recipe
from hf_prune.training.recovery import RecoveryConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
simple_text = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)
values = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.booleans(),
    st.none(),
    simple_text,
    st.lists(simple_text, max_size=3),
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), values, max_size=6))
@example({"_": "0E0"})
def test_yaml_reads_back_what_it_wrote(recipe: dict) -> None:
    assert parse_yaml(dump_yaml(recipe), "recipe") == recipe


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**12), 10**12), st.booleans())
def test_flags_say_the_same_as_yaml(number: float, whole: int, flag: bool) -> None:
    parsed = parse_flags([f"--a={number!r}", "--b", str(whole), "--c", str(flag).lower(), "--d", "x", "y", "--e"])
    assert coerce("a", parsed["a"], float) == number
    assert coerce("b", parsed["b"], int) == whole
    assert coerce("c", parsed["c"], bool) is flag
    assert parsed["d"] == ["x", "y"] and parsed["e"] is True


def test_a_pattern_needs_no_quotes() -> None:
    # YAML 1.1 reads 2:4 as the base-60 number 124.
    assert parse_yaml("pattern: 2:4", "recipe") == {"pattern": "2:4"}
    assert parse_yaml("damping: 1e-2\nseed: 10", "recipe") == {"damping": 0.01, "seed": 10}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_shipped_recipe_parses_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    if path.parent.name == "accelerate_configs":
        assert parse_yaml(text, path.name)
        return
    if path.parent.name in ("lottery", "legcnet", "dst", "recovery") or path.stem in ("tickets", "legcnet"):
        values, _ = read_recipe(path, {})
        recovers = path.parent.name == "recovery"
        recipe = make_train_recipe(values, RecoveryConfig) if recovers else make_any_train_recipe(values)
        assert path.name in text.splitlines()[0] and recipe.training
        return
    if "\nsearch_dir: " in text:
        assert path.name in text.splitlines()[0]
        assert make_candidates(make_search_recipe(read_values(path, {}))).space.possible > 1
        return
    if path.parent.name == "benchmarks":
        assert path.name in text.splitlines()[0] and load_grid(path).cells
        return
    if path.stem == "sweep":
        assert path.name in text.splitlines()[0] and make_sweep(read_values(path, {}), path.stem)[0].cells
        return
    recipe = load_recipe(path)
    make_config(recipe.prune_options)
    command = text.splitlines()[0]
    assert path.name in command or command == "# hf-prune quickstart"
    assert recipe.text == text


BAD = {
    "sparsity: 1.0": "sparsity",
    "sparsity: -0.1": "sparsity",
    "sparsity: half": "sparsity: 'half' is not a number",
    "sparsity: .nan": "sparsity",
    "sparsity: 0.6\npattern: 2:4": "contradicts pattern 2:4",
    "pattern: 5:4": "pattern",
    "pattern: diagonal": "pattern",
    "sparsty: 0.5": "did you mean sparsity?",
    "block_sise: 64": "did you mean block_size?",
    "block_size: 0": "block_size",
    "damping: 0": "damping",
    "method: sparsegbt": "method: 'sparsegbt' is unknown",
    "criterion: entropy": "criterion",
    "update: admn": "update",
    "update: wanda": "update: wanda does not change weights",
    "min_keep_ratio: 0.7": "min_keep_ratio",
    "targets: ['re:(']": "regular expression",
    "reconstruct: magic": "reconstruct",
    "dtype: float8": "dtype",
    "device: tpu": "device",
    "offload: moon": "offload",
    "num_calibration_samples: 0": "num_calibration_samples",
    "num_calibration_samples: 1.5": "whole number",
    "seq_length: 1": "seq_length",
    "trust_remote_code: maybe": "true or false",
    "push_to_hub: true": "hub_model_id",
    "options: {a: 1}": "flat",
    "sparsity: 0.5\nsparsity: 0.6": "stands twice",
    "- a\n- b": "mapping",
    "a: [": "not valid YAML",
}


@pytest.mark.parametrize("text", BAD, ids=list(BAD))
def test_bad_recipes_are_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text if text.startswith(("- ", "method")) else f"method: sparsegpt\n{text}")
    with pytest.raises(BadInputError) as caught:
        make_config(load_recipe(path).prune_options)
    message = str(caught.value)
    assert BAD[text] in message
    assert message.endswith((".", "?")) and "\n" not in message


def test_flags_win_and_the_saved_recipe_says_so(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# a comment\nmethod: wanda\nsparsity: 0.5\n")
    assert load_recipe(path, {"sparsity": 0.5}).text == path.read_text()
    changed = load_recipe(path, parse_flags(["--sparsity", "0.6", "--seed", "3"]))
    assert make_config(changed.prune_options).sparsity == 0.6 and changed.data.seed == 3
    again = make_recipe(parse_yaml(changed.text, "again"))
    assert make_config(again.prune_options) == make_config(changed.prune_options) and again.data == changed.data


def test_parts_of_different_methods_combine_with_their_own_keys() -> None:
    config = make_config({"method": "wanda", "update": "sparsegpt", "block_size": "64"})
    solver = make_solver(config)
    assert (solver.criterion_name, solver.update_name, solver.update.block_size) == ("wanda", "sparsegpt", 64)
    with pytest.raises(BadInputError, match="block_size: this key belongs to"):
        make_config({"method": "wanda", "block_size": 64})


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("model.layers.1.self_attn.q_proj", True),
        ("model.layers.1", True),
        (r"re:.*layers\.[01]\..*q_proj", True),
        ("proj", False),
        ("model.layers.10", False),
        ("re:q_proj", False),
    ],
)
def test_module_patterns(pattern: str, matching: bool) -> None:
    assert matches(pattern, "model.layers.1.self_attn.q_proj") is matching
