"""A search for real on a tiny model: against every candidate measured by hand, killed and resumed."""

import copy
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny import byte_tokenizer, tiny_model
from torch import Tensor

pytest.importorskip("optuna")

from hf_prune import cli
from hf_prune.compose import make_config
from hf_prune.dynamics.spectrum import depth_spectrum
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.pruning import load_calibration, prune
from hf_prune.recipe import make_recipe
from hf_prune.report.markdown import escape
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.candidates import OneShotCandidates
from hf_prune.search.run import run_search
from hf_prune.search.space import label
from hf_prune.search.stability import rank_stability

AXES: dict[str, list[Any]] = {"criterion": ["magnitude", "wanda"], "allocation": ["uniform", "global"]}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = "".join(f"{number}: {number * number} foxes, {number % 7} dogs\n" for number in range(2000))
    (folder / "text.txt").write_text(text)
    return {
        "model_name_or_path": str(folder / "model"), "sparsity": 0.6, "dataset_name": str(folder / "text.txt"),
        "num_calibration_samples": 8, "seq_length": 48, "eval_dataset_name": str(folder / "text.txt"),
        "eval_seq_length": 48, "eval_max_windows": 8, "eval_efficiency": False, "device": "cpu",
        "objective": "ls_distance", "first_budget": 2, "budget_step": 2, "loss_windows": 3, "num_exponents": 6,
        "spectrum_length": 16,
    }  # fmt: skip


def test_figures_are_those_of_pruning_by_hand(common: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_search_recipe(
        {**common, **AXES, "search_dir": str(tmp_path / "s"), "output_dir": str(tmp_path / "o")}
    )
    candidates = OneShotCandidates(recipe)
    choice = {"criterion": "wanda", "allocation": "uniform"}
    seen = {}
    candidates.measure({"criterion": "magnitude", "allocation": "global"}, [2], lambda *own: None)
    candidates.measure(choice, [2, 4], lambda budget, found: seen.update({budget: found}))
    values = {key: own for key, own in common.items() if key not in vars(recipe.search)}
    plain = make_recipe({**values, **choice, "num_calibration_samples": 8 + 3})
    model = tiny_model("llama")
    _, windows = load_calibration(plain.data, byte_tokenizer(), model.config)
    dense = candidates.dense([2])[2]
    torch.testing.assert_close(dense.spectrum, depth_spectrum(model, windows[8:10, :16], k=6))
    few = OneShotCandidates(replace(recipe, search=replace(recipe.search, search_blocks=1)))
    more = OneShotCandidates(replace(recipe, search=replace(recipe.search, search_blocks=99)))
    torch.testing.assert_close(more.dense([2])[2].spectrum, dense.spectrum)
    early: dict[int, Any] = {}
    few.measure(choice, [2, 8], lambda budget, found: early.update({budget: found}))
    model = tiny_model("llama")
    one_block = {"targets": ["model.layers.0"]}
    torch.testing.assert_close(few.dense([2, 8])[8].spectrum, dense.spectrum)
    torch.testing.assert_close(few.dense([2, 8])[2].spectrum, first_block_spectrum(model, windows[8:10, :16]))
    prune(model, make_config({**plain.prune_options, **one_block}), input_ids=windows[:2])
    assert early[2].loss == pytest.approx(float(window_nll(model, windows[8:]).mean()), rel=1e-6)
    torch.testing.assert_close(early[2].spectrum, first_block_spectrum(model, windows[8:10, :16]))
    for budget, found in ((2, seen[2]), (4, seen[4]), (8, early[8])):
        model = tiny_model("llama")
        prune(model, make_config(plain.prune_options), input_ids=windows[:budget])
        assert found.loss == pytest.approx(float(window_nll(model, windows[8:]).mean()), rel=1e-6)
        torch.testing.assert_close(found.spectrum, depth_spectrum(model, windows[8:10, :16], k=6))
        errors = [output_error(model, tiny_model("llama"), window) for window in windows[8:]]
        assert found.layer_error == pytest.approx(sum(one for one, _ in errors) / sum(one for _, one in errors))
    assert (seen[2].spent, seen[4].spent) == (2, 6)


def test_the_error_of_the_first_blocks_asks_nothing_of_those_behind(common: dict[str, Any], tmp_path: Path) -> None:
    values = {**common, **AXES, "search_dir": str(tmp_path / "s"), "search_blocks": 1}
    found: dict[str, Any] = {}
    ran: dict[str, list[int]] = {"layer_error": [], "loss": []}
    for objective, seen in ran.items():
        candidates = OneShotCandidates(make_search_recipe({**values, "objective": objective}))
        for index, block in enumerate(candidates.loaded.model.model.layers):
            block.register_forward_hook(lambda *_, index=index, seen=seen: seen.append(index))
        own = {"criterion": "wanda", "allocation": "uniform"}
        candidates.measure(own, [2], lambda _, measured, objective=objective: found.update({objective: measured}))
    assert found["layer_error"].layer_error == pytest.approx(found["loss"].layer_error, rel=1e-6)
    assert set(ran["layer_error"]) <= {0} < set(ran["loss"]) and math.isnan(found["layer_error"].loss)
    recipe = {**values, "objective": "layer_error", "num_candidates": 4, "sampler": "random", "finalists": 1}
    summary = run_search(make_search_recipe({**recipe, "pruner": "none", "output_dir": str(tmp_path / "out")}))
    assert summary["candidates"][0]["loss"] is None and summary["chosen"] == summary["candidates"][0]["candidate"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    json.loads((tmp_path / "s" / "search.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def output_error(model: Any, dense: Any, window: Tensor) -> tuple[float, float]:
    """Sums of squares behind the last block, before the last norm: of the difference, and of the dense model."""
    kept = []
    for own in (model, dense):
        own.model.norm = torch.nn.Identity()
        with torch.no_grad():
            kept.append(own.model(window[None]).last_hidden_state.double())
    return float((kept[0] - kept[1]).square().sum()), float(kept[1].square().sum())


def first_block_spectrum(model: Any, windows: Tensor) -> Tensor:
    """Of a copy that has no further block."""
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:1]
    return depth_spectrum(model, windows, k=6)


def test_the_order_under_other_settings_is_that_of_spectra_by_hand(common: dict[str, Any], tmp_path: Path) -> None:
    values = {**common, **AXES, "search_dir": str(tmp_path / "s"), "stability_candidates": 4}
    candidates = OneShotCandidates(make_search_recipe(values))
    choices = candidates.space.combinations()
    rows = {row["spectrum"]: row for row in rank_stability(candidates, choices, 2)}
    plain = make_recipe({key: own for key, own in common.items() if key not in vars(candidates.search)})
    windows = load_calibration(
        replace(plain.data, num_calibration_samples=8 + 4), byte_tokenizer(), tiny_model("llama").config
    )[1]
    usual, other = [], []
    for choice in (None, *choices):
        model = tiny_model("llama")
        if choice is not None:
            prune(model, make_config({**plain.prune_options, **choice}), input_ids=windows[:2])
        usual.append(depth_spectrum(model, windows[8:10, :16], k=6))
        other.append(depth_spectrum(model, windows[10:12, :16], k=6))
    wanted = spearmanr(*([float((own - found[0]).norm()) for own in found[1:]] for found in (usual, other))).statistic
    assert rows["other sequences"]["correlation"] == pytest.approx(wanted)
    assert rows["the search"]["correlation"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_length": [32, 48]}, "seq_length: candidates differ in how they prune"),
        ({"criterion": ["wonda"]}, "no combination can be run; the first: criterion: 'wonda' is unknown"),
        ({"method": ["intra_fusion"]}, "no combination can be run"),
        ({"first_budget": 9}, "first_budget: 9 calibration windows of 8"),
        ({"dataset_name": None}, "dataset_name: the recipe does not say"),
        ({"criterion": "wanda", "allocation": "uniform"}, "no key holds a list"),
        ({"fist_budget": 3}, "fist_budget"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    common: dict[str, Any], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    axes = {} if "method" in values else AXES
    with pytest.raises(BadInputError, match=message):
        OneShotCandidates(
            make_search_recipe(
                {**common, **axes, "search_dir": str(tmp_path / "s"), "output_dir": str(tmp_path / "o"), **values}
            )
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_and_resumed_a_search_loses_nothing_and_its_model_says_what_was_tried(
    common: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {**AXES, "update": ["none", "admm"], "pattern": ["unstructured", "2:4"]}
    own = {key: value for key, value in common.items() if key != "sparsity"}
    options = {
        "search_dir": str(tmp_path / "s"), "output_dir": str(tmp_path / "o"), "sampler": "random",
        "num_candidates": 12, "objective": "both", "total_budget": 120, "stability_candidates": 3,
    }  # fmt: skip
    recipe = tmp_path / "search.yaml"
    recipe.write_text(json.dumps({**own, **axes, **options}))
    killed = subprocess.Popen(
        [sys.executable, "-m", "hf_prune", "search", "--config", str(recipe)],
        env={**os.environ, "HF_PRUNE_QUIET": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not measured(tmp_path / "s"):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = measured(tmp_path / "s")
    assert cli.main(["search", "--config", str(recipe)]) == 2
    assert "holds a search already; add --resume" in capsys.readouterr().err
    assert cli.main(["search", "--config", str(recipe), "--resume"]) == 0
    assert before.items() <= measured(tmp_path / "s").items()
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "s" / "search.json").read_text())
    report = json.loads((tmp_path / "o" / "prune_report.json").read_text())
    assert report["search"] == summary and all(row["passed"] for row in report["verification"])
    # 2:4 leaves a global allocation nothing to decide: four of sixteen.
    assert len(summary["refused"]) == 4 and "nothing to decide" in summary["refused"][0]["why"]
    assert summary["drawn"] == 12 and summary["spent"] <= 120
    assert 0 < summary["spectrum_seconds"] < summary["seconds"]
    chosen = dict(part.split("=") for part in summary["chosen"].split(", "))
    assert {key: report["method"][key] for key in ("criterion", "update", "pattern")} == {
        key: chosen[key] for key in ("criterion", "update", "pattern")
    }
    assert summary["stability"][0]["spectrum"] == "the search"
    assert summary["stability"][0]["correlation"] == pytest.approx(1)
    assert "half the exponents" in (tmp_path / "s" / "search.md").read_text()
    card = (tmp_path / "o" / "README.md").read_text()
    assert f"chosen from {len(summary['candidates'])} candidates" in card and "## Candidates" in card
    assert str(tmp_path) not in card
    for row in summary["candidates"]:
        assert f"| {escape(row['candidate'])} |" in card
    assert (tmp_path / "s" / "spectra.png").is_file() and (tmp_path / "s" / "candidates.png").is_file()
    assert cli.main(["search", "--config", str(recipe), "--report"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == shown.splitlines()[:3]


@pytest.mark.slow
def test_two_launched_processes_measure_one_search_as_one_does(common: dict[str, Any], tmp_path: Path) -> None:
    options = {
        "search_dir": str(tmp_path / "s"), "output_dir": str(tmp_path / "o"), "sampler": "random", "pruner": "none",
        "num_candidates": 8, "objective": "loss", "num_calibration_samples": 128, "first_budget": 96,
        "loss_windows": 40, **AXES, "sparsity": None, "pattern": ["2:4", "1:4"], "allocation": ["uniform", "owl"],
    }  # fmt: skip
    recipe = tmp_path / "search.yaml"
    recipe.write_text(json.dumps({key: own for key, own in {**common, **options}.items() if own is not None}))
    launch = "--num_processes 2 --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--main_process_port", "0"]
    command += ["-m", "hf_prune", "search", "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "s" / "search.json").read_text())
    assert summary["drawn"] == 8
    connection = sqlite3.connect(tmp_path / "s" / "search.db")
    query = "SELECT trial_id, value_json FROM trial_user_attributes WHERE key = 'process'"
    owners = {json.loads(value)["token"] for _, value in connection.execute(query)}
    connection.close()
    assert len(owners) == 2
    alone = OneShotCandidates(make_search_recipe(json.loads(recipe.read_text())))
    found = measured(tmp_path / "s")
    assert {row["candidate"] for row in summary["candidates"]} == found.keys()
    for choice in alone.space.combinations():
        if label(choice) in found:
            assert loss_of(alone, choice) == pytest.approx(found[label(choice)], rel=1e-6)


def loss_of(candidates: OneShotCandidates, choice: dict[str, Any]) -> float:
    seen: list[float] = []
    candidates.measure(choice, [96], lambda _, own: seen.append(own.loss))
    return seen[0]


def measured(folder: Path) -> dict[str, float]:
    """Candidate to value, read behind Optuna's back."""
    if not (folder / "search.db").exists():
        return {}
    connection = sqlite3.connect(f"file:{folder / 'search.db'}?mode=ro", uri=True, timeout=60)
    try:
        rows = connection.execute(
            "SELECT p.trial_id, p.param_name, p.param_value, p.distribution_json, v.value FROM trial_params AS p "
            "JOIN trial_values AS v ON v.trial_id = p.trial_id JOIN trials AS t ON t.trial_id = p.trial_id "
            "WHERE t.state = 'COMPLETE' AND p.trial_id NOT IN "
            "(SELECT trial_id FROM trial_user_attributes WHERE key = 'round')"
        ).fetchall()
    except sqlite3.OperationalError:
        # The tables are being made.
        return {}
    finally:
        connection.close()
    choices: dict[int, dict[str, Any]] = {}
    found: dict[int, float] = {}
    for trial, name, place, distribution, value in rows:
        choices.setdefault(trial, {})[name] = json.loads(distribution)["attributes"]["choices"][int(place)]
        found[trial] = value
    return {label(choice): found[trial] for trial, choice in choices.items()}
