"""Candidates that are trained: figures against a training by hand, and a search through to its folder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("optuna")

from hf_prune import cli
from hf_prune.dynamics.spectrum import depth_spectrum, recurrent_spectrum
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.methods.dynamic_sparse import DynamicSparseConfig, initial_masks
from hf_prune.models import AutoModelForCausalLM
from hf_prune.plan import select_views
from hf_prune.recipe import dump_yaml
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.trained import TrainedCandidates
from hf_prune.trained import Start, trainers
from hf_prune.training.arguments import make_train_recipe
from hf_prune.training.checkpoints import StopBehind
from hf_prune.training.dynamic_masks import DynamicMaskCallback
from hf_prune.training.text import Windows

AXES: dict[str, list[Any]] = {"death": ["magnitude", "set"], "initialization": ["uniform", "er"]}
LSTM = {
    "model_type": "stacked_lstm",
    "config_overrides": "hidden_size=8,num_hidden_layers=2,hidden_dropout=0.2",
    "tokenizer_type": "word",
}
LLAMA = {
    "model_type": "llama",
    "config_overrides": "hidden_size=8,intermediate_size=16,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2",
    "tokenizer_type": "word",
}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"the {n % 7} dogs saw {n % 5} foxes and {n % 3} of them ran\n" for n in range(120)))
    return {
        "vocab_size": 20, "dataset_name": str(file), "seq_length": 16, "eval_dataset_name": str(file),
        "eval_seq_length": 16, "eval_max_windows": 8, "eval_efficiency": False, "device": "cpu", "sparsity": 0.5,
        "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no",
        "search": "dynamic_sparse", "objective": "ls_distance",
        "first_budget": 1, "budget_step": 1, "loss_windows": 5, "num_exponents": 6,
        "spectrum_sequences": 2, "death_rate": 0.4,
    }  # fmt: skip


def candidates(values: dict[str, Any], folder: Path) -> TrainedCandidates:
    places = {"search_dir": str(folder / "search"), "output_dir": str(folder / "out")}
    return TrainedCandidates(make_search_recipe({**values, **places}))


@pytest.mark.parametrize("family", [LSTM, LLAMA], ids=["lstm", "llama"])
def test_figures_are_those_of_a_training_by_hand(
    family: dict[str, Any], common: dict[str, Any], tmp_path: Path
) -> None:
    own = candidates({**common, **family, **AXES}, tmp_path)
    seen: dict[int, Any] = {}
    choice = {"death": "set", "initialization": "er"}
    own.measure(choice, [1, 3], lambda budget, found: seen.update({budget: found}))
    early: dict[int, Any] = {}
    own.measure(choice, [1], lambda budget, found: early.update({budget: found}))
    assert early[1].loss == seen[1].loss and (seen[1].spent, seen[3].spent) == (1, 3)
    dense = own.dense([3])[3]
    assert candidates({**common, **family, **AXES, "objective": "loss"}, tmp_path).dense([3]) == {}

    plain = {key: value for key, value in common.items() if key not in vars(own.search)}
    recipe = make_train_recipe({**plain, **family, **choice, "method": "dynamic_sparse"}, DynamicSparseConfig)
    start = Start(recipe)
    held_out = start.windows.input_ids[-5:]
    windows = Windows(start.windows.input_ids[:-5])
    epoch = math.ceil(len(windows) / 8)
    # After one epoch the figures are of weights before the first of them die: of a training whose masks move later.
    later = replace(recipe.method, update_steps=epoch + 1)
    for config, end, figures in ((later, 1, seen[1]), (recipe.method, 3, seen[3]), (None, 3, dense)):
        model = start.make_model(None)
        callbacks: list[Any] = [StopBehind(end * epoch)]
        if config is not None:
            shapes = {v.parameter_name: tuple(v.stored.shape) for v in select_views(model, None, None)[0]}
            masks = initial_masks(shapes, 0.5, "er", torch.Generator().manual_seed(0))
            callbacks.append(DynamicMaskCallback(masks, config))
        trainers(recipe, windows)(model, tmp_path / "by hand", callbacks).train()
        model.eval()
        assert figures.loss == pytest.approx(float(window_nll(model, held_out).mean()), rel=1e-6)
        spectrum = recurrent_spectrum if family is LSTM else depth_spectrum
        wanted = spectrum(model, held_out[:2], k=6, order="textbook")
        torch.testing.assert_close(figures.spectrum, wanted)


def test_a_search_leaves_a_folder_and_an_account(common: dict[str, Any], tmp_path: Path) -> None:
    values = {**common, **LSTM, **AXES, "num_candidates": 4, "train_dense": True}
    values |= {"search_dir": str(tmp_path / "search"), "output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    cli.main(["search", "--config", str(tmp_path / "recipe.yaml")])
    said = json.loads((tmp_path / "search" / "search.json").read_text())
    distinct = len(said["candidates"])
    # The dense twin for three epochs; every candidate for one; two of them for two, and again for three.
    rounds = 2 * 2 if distinct > 2 else 0
    assert f"; {3 + distinct + rounds + 2 * 3} epochs and" in (tmp_path / "search" / "search.md").read_text()
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    chosen = {key: report["method"]["options"][key] for key in AXES}
    assert all(f"{key}={value}" in said["chosen"] for key, value in chosen.items())
    assert all(row["passed"] for row in report["verification"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Candidates" in card and "epochs" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    zeros = sum(int((model.get_parameter(f"{view['name']}.weight") == 0).sum()) for view in report["views"])
    assert zeros >= round(0.5 * report["sparsity"]["pruned_parameters"])


def test_a_stability_table_that_cannot_be_made_is_refused_at_the_start_and_may_be_left_out_later(
    common: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**common, **LSTM, **AXES, "num_train_epochs": 2, "stability_candidates": 3}
    values |= {"search_dir": str(tmp_path / "search"), "output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    # Half of 16 tokens do not even warm the state up.
    assert cli.main(["search", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "stability_candidates: the spectra of half the tokens have 8, and 11 are" in capsys.readouterr().err
    assert not (tmp_path / "search").exists()
    with_table, without = (make_search_recipe({**values, "stability_candidates": count}) for count in (3, 0))
    assert with_table.identity == without.identity
    # Where the windows held out for the table were more, the text to train on was less.
    held_out = [make_search_recipe({**values, "stability_candidates": own, "loss_windows": 2}) for own in (3, 0)]
    assert held_out[0].identity != held_out[1].identity


def test_an_impossible_combination_is_counted_and_no_more(common: dict[str, Any], tmp_path: Path) -> None:
    axes = {"death": ["old age", "set"], "initialization": ["uniform", "er"]}
    own = candidates({**common, **LSTM, **axes}, tmp_path)
    assert own.space.possible == 2 and own.recipe.method.death == "set"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": [0.5, 0.6]}, "sparsity: candidates differ in how masks move"),
        ({"learning_rate": [0.1, 0.2]}, "learning_rate: candidates differ in how masks move"),
        ({"num_train_epochs": 2.5}, "num_train_epochs: candidates are compared at whole epochs"),
        ({"first_budget": 4}, "first_budget: 4 epochs of 3"),
        ({"objective": "layer_error"}, "objective: dynamic_sparse has no dense layers"),
        ({"death": ["old age", "sadness"]}, "no combination can be run; the first: death: 'old age' is unknown"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    change: dict[str, Any], message: str, common: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=message):
        candidates({**common, **LSTM, **AXES, **change}, tmp_path)
    assert not (tmp_path / "search").exists()
