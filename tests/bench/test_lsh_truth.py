"""The scripts that train for the study of spectra against loss, on a network of eight units."""

import sys
from pathlib import Path
from typing import Any

import lsh_truth
import lsh_twins
import pytest
import torch
from lsh_replay import DENSE, load_run

from hf_prune.evaluation.perplexity import window_nll
from hf_prune.recipe import dump_yaml, read_recipe
from hf_prune.search.arguments import make_search_recipe
from hf_prune.search.trained import TrainedCandidates


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"the {n % 7} dogs saw {n % 5} foxes and {n % 3} of them ran\n" for n in range(120)))
    values: dict[str, Any] = {
        "model_type": "stacked_lstm", "config_overrides": "hidden_size=8,num_hidden_layers=2,hidden_dropout=0.2",
        "tokenizer_type": "word", "vocab_size": 20, "dataset_name": str(file), "seq_length": 16,
        "eval_dataset_name": str(file), "eval_seq_length": 16, "eval_max_windows": 8, "eval_efficiency": False,
        "device": "cpu", "sparsity": 0.5, "death_rate": [0.4, 0.8], "num_train_epochs": 2,
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no", "search": "dynamic_sparse",
        "search_dir": str(tmp_path / "search"), "first_budget": 1, "loss_windows": 5, "num_exponents": 6,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(values))
    return path


def test_a_truth_table_holds_what_a_search_measures_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = tmp_path / "truth"
    monkeypatch.setattr(sys, "argv", ["lsh_truth.py", "--config", str(recipe), "--truth", str(truth)])
    lsh_truth.main()
    names = [DENSE, "death_rate=0.4", "death_rate=0.8"]
    assert sorted(own.stem for own in truth.iterdir()) == sorted(names)
    run = load_run(truth, names[1])
    candidates = TrainedCandidates(make_search_recipe(*read_recipe(recipe, {})))
    seen: dict[int, Any] = {}
    candidates.measure({"death_rate": 0.4}, [1, 2], lambda budget, found: seen.update({budget: found}))
    assert run.losses.tolist() == [seen[1].loss, seen[2].loss]
    torch.testing.assert_close(run.spectra, torch.stack([seen[1].spectrum, seen[2].spectrum]))
    # The final loss is of the first eight windows of the evaluation text, by the model after the last epoch.
    wanted: list[float] = []
    windows = lsh_truth.evaluation_of(candidates).windows.input_ids
    assert len(windows) == 8

    def judge(epoch: int, model: Any) -> None:
        wanted.append(float(window_nll(model.eval(), windows).mean()))

    candidates.train_to(candidates.config({"death_rate": 0.4}), [2], judge)
    assert float(run.final_loss) == pytest.approx(wanted[0], rel=1e-9)
    before = (truth / f"{names[1]}.safetensors").stat().st_mtime_ns
    (truth / f"{names[2]}.safetensors").unlink()
    capsys.readouterr()
    lsh_truth.main()
    assert capsys.readouterr().out.startswith(names[2])
    assert (truth / f"{names[1]}.safetensors").stat().st_mtime_ns == before


def test_twins_are_those_of_the_truth_table_and_compared_seed_by_seed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--config", str(recipe), "--runs", str(tmp_path / "runs"), "--sparsities", "0.5", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["lsh_twins.py", *own])
    with pytest.raises(SystemExit, match="death_rate: give each one value"):
        lsh_twins.main()
    monkeypatch.setattr(sys, "argv", ["lsh_twins.py", *own, "--death_rate", "[0.8]"])
    lsh_twins.main()
    monkeypatch.setattr(sys, "argv", ["lsh_truth.py", "--config", str(recipe), "--truth", str(tmp_path / "truth")])
    lsh_truth.main()
    # Looking at spectra on the way changes nothing.
    for name, other in {"dense, seed=0": DENSE, "0.5, seed=0": "death_rate=0.8"}.items():
        final = load_run(tmp_path / "truth", other).final_loss
        assert torch.equal(load_run(tmp_path / "runs", name).final_loss, final)
    runs = {
        (kind, seed): load_run(tmp_path / "runs", f"{kind}, seed={seed}") for kind in (DENSE, "0.5") for seed in (0, 1)
    }
    changes = [runs["0.5", seed].perplexity - runs[DENSE, seed].perplexity for seed in (0, 1)]
    mean, deviation = sum(changes) / 2, abs(changes[0] - changes[1]) / 2**0.5
    assert f"| {mean:+.2f} ± {deviation:.2f} | {sum(own < 0 for own in changes)} of 2 |" in lsh_twins.to_markdown(runs)
