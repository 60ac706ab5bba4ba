"""Weights and rows of a language model go by what they cause, from a recipe to a sparse model."""

import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_runs import kill_behind
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hf_prune.cli import main
from hf_prune.cli.train import make_recipe
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.legcnet.weights import prepare_weights, run_weights
from hf_prune.recipe import dump_yaml
from hf_prune.training.recorder import read_series, read_targets

TEXT = "".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(1500))


def values(folder: Path, family: str = "llama") -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    tiny_model(family).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    return {
        "method": "legcnet", "series": "sample", "samples_per_matrix": 12, "device": "cpu", "sparsity": 0.5,
        "window": 6, "max_lag": 2, "model_name_or_path": str(folder / "dense"),
        "dataset_name": str(folder / "text.txt"), "seq_length": 32, "target_windows": 4,
        "eval_dataset_name": str(folder / "text.txt"), "eval_seq_length": 32, "eval_max_windows": 8,
        "eval_efficiency": False, "max_steps": 41, "per_device_train_batch_size": 2, "learning_rate": 3e-3,
        "save_strategy": "no", "rounds_folder": str(folder / "rounds"), "output_dir": str(folder / "out"),
    }  # fmt: skip


def watched(folder: Path, weights: dict[str, torch.Tensor]) -> list[float]:
    """The weights that series.csv names, in its order."""
    found = []
    for line in csv.DictReader((folder / "series.csv").open()):
        name, _, place = line["series"].rstrip("]").partition("[")
        found.append(float(weights[name][tuple(int(own) for own in place.split(", "))]))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_sample_of_each_matrix_is_watched_and_decided_on(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(dump_yaml(values(tmp_path, family)))
    assert main(["train", "--config", str(recipe)]) == 0
    report = json.loads((out / "prune_report.json").read_text())
    lines = list(csv.DictReader((out / "series.csv").open()))
    matrices = {"llama": 7, "gpt2": 4, "phi3": 4}[family] * 3
    assert len(lines) == report["legcnet"]["series"] == 12 * matrices
    names = [line["series"].partition("[")[0] for line in lines]
    assert Counter(names) == {f"{view['name']}.weight": 12 for view in report["views"]}
    # What goes of the sample is zero in the folder, half of it and the least causal, and nothing else is.
    saved = AutoModelForCausalLM.from_pretrained(out)
    weights = saved.state_dict()
    zeros = [value == 0 for value in watched(out, weights)]
    assert zeros == [line["kept"] == "False" for line in lines] and sum(zeros) == 6 * matrices
    assert sum(int((weights[name] == 0).sum()) for name in set(names)) == sum(zeros)
    p = torch.tensor([float(line["p"]) for line in lines])
    assert p[torch.tensor(zeros)].min() >= p[~torch.tensor(zeros)].max()
    # The last record is the dense training's end, and the target its errors on the text's last windows.
    recording = tmp_path / "rounds" / "recording"
    trained = load_file(tmp_path / "rounds" / "dense" / "model.safetensors")
    assert read_series(recording)[:, -1].tolist() == watched(out, trained)
    windows = evaluation_windows(load_text(str(tmp_path / "text.txt")), byte_tokenizer(), 32).input_ids
    dense = tiny_model(family)
    dense.load_state_dict(trained, strict=False)
    dense.tie_weights()
    step, error = read_targets(recording)[-1]
    guesses = dense.eval()(input_ids=windows[-4:]).logits[:, :-1].argmax(-1)
    assert step == 41 and error == pytest.approx(float((guesses != windows[-4:, 1:]).double().mean()))
    # What is saved has the perplexity that report and terminal give, and everything was trained once more under masks.
    own = report["legcnet"]["perplexities"]
    assert float(window_nll(saved, windows[:8]).mean().exp()) == pytest.approx(own["legcnet"], rel=1e-5)
    assert own["legcnet"] == report["evaluation"]["pruned"]["perplexity"] and len(set(own.values())) == 3
    assert all(row["passed"] for row in report["verification"])
    # Every training takes all steps; 99 % of the dense accuracy is looked up in what was watched of them.
    looks = {
        file.parent.name: json.loads(file.read_text())["looks"] for file in (tmp_path / "rounds").rglob("round.json")
    }
    ends = {
        kind: next((step for step, value, _ in own if value >= 0.99 * looks["dense"][-1][1]), None)
        for kind, own in looks.items()
    }
    assert {kind: own[-1][0] for kind, own in looks.items()} == dict.fromkeys(ends, 40)
    assert {row["kind"]: row["steps_to_benchmark"] for row in report["legcnet"]["rounds"]} == ends
    printed, card = " ".join(capsys.readouterr().out.split()), (out / "README.md").read_text()
    sentence = f"of {12 * matrices} weights cause errors in {report['legcnet']['windows']} windows; {6 * matrices} go."
    end = "never" if ends["random"] is None else f"after {ends['random']}"
    for said in (
        sentence,
        f"{own['magnitude']:.2f} by magnitude",
        "Of 41 steps, 99 % of the dense",
        f"by chance {end}.",
    ):
        assert said in printed and said in card
    assert (out / "plots" / "moved.png").read_bytes().startswith(b"\x89PNG")
    assert f"from {len(windows) - 4:,} windows" in card


def test_what_keeps_everything_is_the_dense_training(tmp_path: Path) -> None:
    report = run_weights(make_recipe({**values(tmp_path), "sparsity": None, "alpha": 1 - 1e-12}))
    assert report["legcnet"]["kept"] == report["legcnet"]["series"] == report["legcnet"]["causal"]
    dense = report["evaluation"]["dense"]["perplexity"]
    assert report["legcnet"]["perplexities"] == {"legcnet": dense, "magnitude": dense, "random": dense}
    dense, own = (
        load_file(file)["model.norm.weight"] for file in sorted((tmp_path / "rounds").rglob("model.safetensors"))[:2]
    )
    assert torch.equal(dense, own)


def test_the_beginning_of_a_training_decides_and_survivors_go_on(tmp_path: Path) -> None:
    own = {"variant": "pt", "recorded_share": 0.9, "restart": "continue", "window": 5, "save_strategy": "steps"}
    report = run_weights(make_recipe({**values(tmp_path), **own, "save_steps": 15}))
    recorded = round(0.9 * 41)
    assert read_series(tmp_path / "rounds" / "recording").shape[1] == recorded
    rows = {row["kind"]: row for row in report["legcnet"]["rounds"]}
    assert all(row["steps"] == 41 for row in rows.values())
    # Survivors began behind what was recorded: nothing of theirs was looked at before.
    for file in (tmp_path / "rounds").rglob("round.json"):
        first = json.loads(file.read_text())["looks"][0][0]
        assert (first > recorded) == (file.parent.name != "dense")
    # With nothing left of the training, nothing is trained.
    ft = {"restart": "continue", "rounds_folder": str(tmp_path / "ft"), "output_dir": str(tmp_path / "out-ft")}
    report = run_weights(make_recipe({**values(tmp_path), **ft}))
    assert "Nothing was trained behind that." in (tmp_path / "out-ft" / "README.md").read_text()
    saved, trained = (
        load_file(tmp_path / "out-ft" / "model.safetensors"),
        load_file(tmp_path / "ft" / "dense" / "model.safetensors"),
    )
    assert all(torch.equal(saved[name][saved[name] != 0], trained[name][saved[name] != 0]) for name in saved)


def test_a_floor_keeps_a_matrix_from_going_whole(tmp_path: Path) -> None:
    own = {"series": "rows", "sparsity": 0.999, "min_keep_ratio": 0.1}
    report = run_weights(make_recipe({**values(tmp_path), **own}))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for view in report["views"]:
        rows = (saved[f"{view['name']}.weight"] != 0).any(1)
        assert int(rows.sum()) >= math.ceil(0.1 * len(rows) - 1e-9) and view["floor"]
    assert json.loads((tmp_path / "out" / "prune_plan.json").read_text())["min_keep_ratio"] == 0.1
    assert "`min_keep_ratio` kept more weights" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(tmp_path: Path) -> None:
    recipe = {**values(tmp_path), "save_strategy": "steps", "save_steps": 10, "per_device_train_batch_size": 1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_PRUNE_QUIET": "1"}

    def start(name: str) -> subprocess.Popen[str]:
        file, rounds = tmp_path / f"{name}.yaml", str(tmp_path / f"{name}.rounds")
        own = {"output_dir": str(tmp_path / name), "rounds_folder": rounds, "num_processes": 2}
        file.write_text(dump_yaml({**recipe, **own}))
        command = [sys.executable, "-m", "hf_prune", "train", "--config", str(file)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start("whole")
    assert whole.wait(300) == 0, whole.stdout.read()
    begun = "*/magnitude.unfinished/checkpoints/checkpoint-20/trainer_state.json"
    kill_behind(start("cut"), tmp_path / "cut.rounds", begun)
    assert not (tmp_path / "cut").exists()
    places = ("dense/model.safetensors", "*/causes.safetensors", "*/legcnet/model.safetensors")
    done = [file for place in places for file in (tmp_path / "cut.rounds").glob(place)]
    written = [file.stat().st_mtime_ns for file in done]
    assert len(written) == 3
    again = start("cut")
    assert again.wait(300) == 0, again.stdout.read()
    # What was finished was not made again.
    assert [file.stat().st_mtime_ns for file in done] == written
    for name in ("model.safetensors", "series.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_seed_watches_others(tmp_path: Path) -> None:
    own = values(tmp_path)
    first, again, other = (prepare_weights(make_recipe({**own, "seed": seed})).search.series for seed in (0, 0, 1))
    assert first.identity == again.identity != other.identity
    assert [first.label(place) for place in (0, 251)] != [other.label(place) for place in (0, 251)]


def test_whole_rows_go(tmp_path: Path) -> None:
    # GPT-2 stores them as columns.
    report = run_weights(make_recipe({**values(tmp_path, "gpt2"), "series": "rows", "sparsity": 0.25}))
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    gone = []
    for line in csv.DictReader((tmp_path / "out" / "series.csv").open()):
        name, _, place = line["series"].partition(", output ")
        assert bool((saved[name][:, int(place)] == 0).all()) == (line["kept"] == "False")
        gone.append(line["kept"] == "False")
    assert sum(gone) == round(0.25 * len(gone)) and report["legcnet"]["watched"] == "rows"


def test_a_fresh_model_is_watched_as_well(tmp_path: Path) -> None:
    fresh = {
        "model_name_or_path": None, "model_type": "llama", "vocab_size": 300,
        "config_overrides": "hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=2",
    }  # fmt: skip
    search = prepare_weights(make_recipe({**values(tmp_path), **fresh})).search
    assert len(search.series.observe(search.make_model())) == 7 * 12


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"series": "weights", "max_steps": 10**9},
            r"series: \d\d,\d+ of them over 1000000000 records need [\d.]+ GB of disk and",
        ),
        ({"target_windows": 10_000}, "target_windows: 10000 windows are held out, and the text fills"),
        ({"target_windows": 0}, "target_windows: 0 is too few"),
        ({"max_lag": 14}, "max_lag: 14 lags need 44 windows"),
        ({"dtype": "bfloat16"}, "dtype: weights train in float32"),
        ({"model_type": "llama"}, "model_name_or_path: name a model to go on with, or a model_type to begin anew"),
        ({"hidden_sizes": ["6"]}, "hidden_sizes: unknown recipe key; `hf-prune train --help` lists"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(
    own: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = values(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInputError, match=message):
        run_weights(make_recipe({**recipe, **own}))
    assert sorted(tmp_path.rglob("*")) == before
