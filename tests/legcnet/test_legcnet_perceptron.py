"""LEGCNet from a recipe to a folder, on a table of 178 rows."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_prune.cli import main
from hf_prune.cli.train import make_recipe
from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation.explanation import alphas, mean_shap
from hf_prune.legcnet.perceptron import run_legcnet
from hf_prune.recipe import dump_yaml
from hf_prune.report.cause_table import causes_text
from hf_prune.training.tabular import Perceptron, TableArguments, load_table

RECIPE: dict[str, Any] = {
    "method": "legcnet",
    "device": "cpu",
    "dataset_name": "sklearn:wine",
    "hidden_sizes": ["5"],
    "window": 8,
    "max_lag": 2,
    "sparsity": 0.3,
    "max_steps": 80,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}


def test_a_recipe_makes_a_folder_that_says_what_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml({**RECIPE, "output_dir": str(tmp_path / "out")}))
    assert main(["train", "--config", str(recipe)]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "legcnet_report.json").read_text())
    # 13 features, 5 units, 3 classes: 80 weights.
    assert report["sizes"] == [13, 5, 3] and report["series"] | {"windows": 0} == {
        "all": 80, "kept": 56, "untested": 0, "windows": 0,
    }  # fmt: skip
    model = Perceptron.from_pretrained(out)
    zeros = torch.cat([own.flatten() for name, own in model.named_parameters() if own.ndim == 2]) == 0
    lines = list(csv.DictReader((out / "series.csv").open()))
    assert [line["kept"] == "False" for line in lines] == zeros.tolist() and int(zeros.sum()) == 24
    causes = load_file(out / "causes.safetensors")
    assert [float(line["p"]) for line in lines] == causes["p"].tolist()
    assert [float(line["mean_exponent"]) for line in lines] == pytest.approx(causes["exponents"].mean(1).tolist())
    # The least causal ones went.
    assert causes["p"][~causes["keep"]].min() >= causes["p"][causes["keep"]].max()
    # The held-out figures are those of the model that was saved.
    _, held_out = load_table(TableArguments(dataset_name="sklearn:wine"))
    with torch.no_grad():
        hits = model(held_out.inputs).logits.argmax(1) == held_out.labels
    own = next(row for row in report["rounds"] if row["kind"] == "legcnet")
    assert own["accuracy"] == pytest.approx(float(hits.double().mean())) and own["connections"] == 56
    assert {row["connections"] for row in report["rounds"]} == {80, 56}
    for name in ("exponents", "p_values", "moved"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert "56 of 80 series stay" in printed and str(tmp_path / "out") in printed.replace(" ", "")


def test_seconds_to_the_benchmark_hold_what_a_choice_rests_on(tmp_path: Path) -> None:
    values = {**RECIPE, "benchmark_accuracy": 0.4, "output_dir": str(tmp_path / "out")}
    report = run_legcnet(make_recipe(values))
    seconds, rows = report["seconds"], {row["kind"]: row for row in report["rounds"]}
    assert all(row["epochs_to_benchmark"] is not None for row in rows.values())
    tests = seconds["exponents"] + seconds["granger"]
    # Of its own, no training took longer than the whole of it.
    for kind, before in (("legcnet", seconds["recording"] + tests), ("magnitude", seconds["recording"])):
        assert 0 < rows[kind]["seconds_to_benchmark"] - before <= seconds[kind]
    assert 0 < rows["random"]["seconds_to_benchmark"] <= seconds["random"]
    late = [{**row, "epochs_to_benchmark": None} for row in report["rounds"]]
    sentences = " ".join(causes_text({**report, "rounds": late}))
    assert "Never reached by legcnet and magnitude and random: the training ended at its limit." in sentences


def test_layers_and_features_are_explained_where_asked(tmp_path: Path) -> None:
    report = run_legcnet(make_recipe({**RECIPE, "explain": True, "output_dir": str(tmp_path / "out")}))
    model = Perceptron.from_pretrained(tmp_path / "out")
    training, held_out = load_table(TableArguments(dataset_name="sklearn:wine"))
    dense, own = report["rounds"][:2]
    assert own["alphas"] == pytest.approx(alphas(model.layers)) and set(own["alphas"]) == {"0", "2"}
    features = mean_shap(model.layers, training.inputs, held_out.inputs)
    assert own["mean_shap"] == pytest.approx(features, rel=1e-5) and len(features) == 13
    # Spearman by the textbook: Pearson's of ranks.
    ranks = [np.argsort(np.argsort(means)) for means in (dense["mean_shap"], features)]
    assert own["shap_rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert dense["shap_rank_correlation"] == pytest.approx(1)


def test_tables_are_split_by_class_and_standardised_on_what_is_trained_on() -> None:
    training, held_out = load_table(TableArguments(dataset_name="sklearn:iris", held_out_share=0.2, seed=3))
    assert len(training) == 120 and held_out.labels.bincount().tolist() == [10, 10, 10]
    torch.testing.assert_close(training.inputs.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(training.inputs.std(0, correction=0), torch.ones(4))
    assert float(held_out.inputs.mean().abs()) > 1e-4


def test_another_activation_is_another_training(tmp_path: Path) -> None:
    rounds = {"rounds_folder": str(tmp_path / "rounds")}
    run_legcnet(make_recipe({**RECIPE, **rounds, "output_dir": str(tmp_path / "relu")}))
    with pytest.raises(BadInputError, match="holds a training of another model, text or recipe"):
        run_legcnet(make_recipe({**RECIPE, **rounds, "activation": "tanh", "output_dir": str(tmp_path / "tanh")}))


@pytest.mark.slow
def test_two_processes_decide_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml({**RECIPE, "per_device_train_batch_size": 8, "output_dir": str(tmp_path / "two")}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_prune", "train", "--config", str(recipe), "--num_processes", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "two" / "legcnet_report.json").read_text())
    assert report["num_processes"] == 2 and report["series"]["kept"] == 56
    assert {row["connections"] for row in report["rounds"]} == {80, 56}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "sklearn:titanic"}, "dataset_name: sklearn:titanic is no table; choose sklearn: and"),
        ({"dataset_name": None}, "dataset_name: the recipe does not say"),
        ({"hidden_sizes": ["six"]}, "hidden_sizes: 'six' is no number of units"),
        ({"activation": "swish"}, "activation: 'swish' is unknown"),
        ({"max_lag": 14}, "max_lag: 14 lags need 44 windows, and 80 recorded steps make 11; lower max_lag, window or"),
        ({"series": "units"}, "hidden_sizes: unknown recipe key"),
        ({"push_to_hub": True, "hub_model_id": "me/x"}, "push_to_hub: a perceptron is no language model"),
        ({"windw": 8}, "windw: unknown recipe key"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: an epoch is all rows"),
        ({"dataset_name": "sklearn:iris", "held_out_share": 0.01}, r"held_out_share: 0.01 cannot split sklearn:iris"),
        ({"benchmark_accuracy": 98.0}, r"benchmark_accuracy: 98.0 is outside \(0, 1\]"),
    ],
)
def test_bad_recipes_write_nothing(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        run_legcnet(make_recipe({**RECIPE, "output_dir": str(tmp_path / "out"), **values}))
    assert not list(tmp_path.iterdir())


def test_a_method_that_does_not_train_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "wanda"]) == 2
    assert "'wanda' is unknown or prunes without training; choose lottery_ticket, legcnet" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_one_sentence_and_keeps_what_there_is(tmp_path: Path) -> None:
    values = {**RECIPE, "learning_rate": 1e25, "save_strategy": "steps", "save_steps": 1, "activation": "relu"}
    with pytest.raises(RunError, match="the dense training") as caught:
        run_legcnet(make_recipe({**values, "output_dir": str(tmp_path / "out")}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert list((tmp_path / "out.rounds").rglob("initial.safetensors"))
