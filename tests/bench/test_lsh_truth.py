"""The scripts that train for the study of spectra against loss, on a network of eight units."""

import sys
from pathlib import Path
from typing import Any

import lsh_truth
import lsh_twins
import pytest
import torch
from lsh_runs import DENSE, load_run

from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.recipe import dump_yaml, read_recipe
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.trained import TrainedCandidates


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    texts = {}
    for place, name in enumerate(("train", "validation", "test")):
        texts[name] = tmp_path / f"{name}.txt"
        lines = [f"the {n % 7} dogs saw {(n + place) % 5} foxes and {n % (3 + place)} of them ran" for n in range(60)]
        # What is learnt of the order of words is wrong in the validation text: its best epoch is not the last.
        texts[name].write_text("\n".join(line if place != 1 else " ".join(line.split()[::-1]) for line in lines))
    values: dict[str, Any] = {
        "model_type": "stacked_lstm", "config_overrides": "hidden_size=8,num_hidden_layers=2,hidden_dropout=0.2",
        "tokenizer_type": "word", "vocab_size": 20, "dataset_name": str(texts["train"]), "seq_length": 16,
        "eval_dataset_name": str(texts["test"]), "eval_seq_length": 16, "eval_max_windows": 8, "eval_efficiency": False,
        "device": "cpu", "sparsity": 0.5, "death_rate": [0.4, 0.8], "num_train_epochs": 3,
        "per_device_train_batch_size": 8, "learning_rate": 0.3, "lr_scheduler_type": "constant",
        "save_strategy": "no", "search": "dynamic_sparse", "objective": "ls_distance",
        "search_dir": str(tmp_path / "search"), "first_budget": 1, "loss_windows": 5, "num_exponents": 6,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(values))
    return path


def make_truth(monkeypatch: pytest.MonkeyPatch, recipe: Path, *more: str) -> None:
    folder, validation = recipe.parent / "truth", recipe.parent / "validation.txt"
    own = ["--config", str(recipe), "--truth", str(folder), "--validation", str(validation), *more]
    monkeypatch.setattr(sys, "argv", ["lsh_truth.py", *own])
    lsh_truth.main()


def test_a_truth_table_holds_what_a_search_measures_and_the_best_epoch_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = tmp_path / "truth"
    names = [DENSE, "death_rate=0.4", "death_rate=0.8"]
    make_truth(monkeypatch, recipe, "--part", "1/2")
    assert [own.stem for own in truth.glob("*.safetensors")] == [names[1]]
    make_truth(monkeypatch, recipe, "--part", "0/2")
    assert sorted(own.stem for own in truth.glob("*.safetensors")) == sorted(names)
    run = load_run(truth, names[1])
    candidates = TrainedCandidates(make_search_recipe(*read_recipe(recipe, {})))
    seen: dict[int, Any] = {}
    candidates.measure({"death_rate": 0.4}, [1, 2], lambda budget, found: seen.update({budget: found}))
    assert run.losses[:2].tolist() == [seen[1].loss, seen[2].loss]
    torch.testing.assert_close(run.spectra[:2], torch.stack([seen[1].spectrum, seen[2].spectrum]))
    # The validation text chooses an epoch, which the first eight windows of the evaluation text score.
    tokenizer = candidates.loaded.start.tokenizer
    validation, test = (
        evaluation_windows(load_text(str(tmp_path / f"{name}.txt")), tokenizer, 16, most).input_ids
        for name, most in (("validation", None), ("test", 8))
    )
    wanted: list[tuple[float, float]] = []

    def judge(epoch: int, model: Any) -> None:
        wanted.append((float(window_nll(model, validation).mean()), float(window_nll(model, test).mean())))

    candidates.train_to(candidates.config({"death_rate": 0.4}), [1, 2, 3], judge)
    assert run.validation_losses.tolist() == pytest.approx([own for own, _ in wanted], rel=1e-9)
    assert run.best_epoch < 3
    assert float(run.test_loss) == pytest.approx(min(wanted)[1], rel=1e-9)
    before = (truth / f"{names[1]}.safetensors").stat().st_mtime_ns
    (truth / f"{names[2]}.safetensors").unlink()
    capsys.readouterr()
    make_truth(monkeypatch, recipe)
    assert capsys.readouterr().out.startswith(names[2])
    assert (truth / f"{names[1]}.safetensors").stat().st_mtime_ns == before
    # Further values of what is searched may come in; another recipe, or one text for both purposes, may not.
    with pytest.raises(SystemExit, match=r"num_exponents was 6 and is 5; put that back"):
        make_truth(monkeypatch, recipe, "--num_exponents", "5", "--death_rate", "[0.4]")
    with pytest.raises(SystemExit, match="--validation: it is the text that scores"):
        make_truth(monkeypatch, recipe, "--eval_dataset_name", str(tmp_path / "validation.txt"))


def test_twins_are_those_of_the_truth_table_and_compared_seed_by_seed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--config", str(recipe), "--runs", str(tmp_path / "runs"), "--sparsities", "0.5", "--seeds", "2"]
    own += ["--validation", str(tmp_path / "validation.txt")]
    monkeypatch.setattr(sys, "argv", ["lsh_twins.py", *own])
    with pytest.raises(SystemExit, match="death_rate: give each one value"):
        lsh_twins.main()
    monkeypatch.setattr(sys, "argv", ["lsh_twins.py", *own, "--death_rate", "[0.8]"])
    lsh_twins.main()
    make_truth(monkeypatch, recipe)
    # Looking at spectra on the way changes nothing.
    for name, other in {"dense, seed=0": DENSE, "0.5, seed=0": "death_rate=0.8"}.items():
        final = load_run(tmp_path / "truth", other).test_loss
        assert torch.equal(load_run(tmp_path / "runs", name).test_loss, final)
    runs = {
        (kind, seed): load_run(tmp_path / "runs", f"{kind}, seed={seed}") for kind in (DENSE, "0.5") for seed in (0, 1)
    }
    changes = [runs["0.5", seed].perplexity - runs[DENSE, seed].perplexity for seed in (0, 1)]
    mean, deviation = sum(changes) / 2, abs(changes[0] - changes[1]) / 2**0.5
    assert f"| {mean:+.2f} ± {deviation:.2f} | {sum(own < 0 for own in changes)} of 2 |" in lsh_twins.to_markdown(runs)
