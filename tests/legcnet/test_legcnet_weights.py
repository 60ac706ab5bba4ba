"""Weights and rows of a language model go by what they cause, from a recipe to a sparse model."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
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
        "window": 8, "max_lag": 2, "model_name_or_path": str(folder / "dense"),
        "dataset_name": str(folder / "text.txt"), "seq_length": 32, "target_windows": 4,
        "eval_dataset_name": str(folder / "text.txt"), "eval_seq_length": 32, "eval_max_windows": 8,
        "eval_efficiency": False, "max_steps": 78, "per_device_train_batch_size": 2, "learning_rate": 3e-3,
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
    assert step == 78 and error == pytest.approx(float((guesses != windows[-4:, 1:]).double().mean()))
    # What is saved has the perplexity that report and terminal give, and everything was trained once more under masks.
    own = report["legcnet"]["perplexities"]
    assert float(window_nll(saved, windows[:8]).mean().exp()) == pytest.approx(own["legcnet"], rel=1e-5)
    assert own["legcnet"] == report["evaluation"]["pruned"]["perplexity"] and len(set(own.values())) == 3
    assert report["legcnet"]["steps"]["dense"] == 78 and all(row["passed"] for row in report["verification"])
    printed, card = " ".join(capsys.readouterr().out.split()), (out / "README.md").read_text()
    sentence = f"of {12 * matrices} weights cause errors in {report['legcnet']['windows']} windows, {6 * matrices} go."
    steps = report["legcnet"]["steps"]
    ends = f"after {steps['legcnet']}, {steps['magnitude']} and {steps['random']} of 78 steps."
    assert all(said in printed and said in card for said in (sentence, ends))
    assert f"{own['magnitude']:.2f} by magnitude" in card


def test_another_seed_watches_others(tmp_path: Path) -> None:
    own = values(tmp_path)
    first, again, other = (prepare_weights(make_recipe({**own, "seed": seed}))[3].series for seed in (0, 0, 1))
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
    search = prepare_weights(make_recipe({**values(tmp_path), **fresh}))[3]
    assert len(search.series.observe(search.make_model())) == 7 * 12


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"series": "weights", "max_steps": 10**9},
            r"series: \d\d,\d+ of them over 1000000000 records take [\d.]+ GB and",
        ),
        ({"target_windows": 10_000}, "target_windows: 10000 windows are held out, and the text fills"),
        ({"target_windows": 0}, "target_windows: 0 is too few"),
        ({"max_lag": 14}, "max_lag: 14 lags need 44 windows"),
        ({"dtype": "bfloat16"}, "dtype: weights train in float32"),
        ({"model_type": "llama"}, "model_name_or_path: name a model to go on with, or a model_type to begin anew"),
        ({"hidden_sizes": ["6"]}, "hidden_sizes: unknown recipe key"),
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
