"""The table of one-shot candidates: rows by hand, and what is made of figures whose order is known."""

import copy
import json
import sys
from pathlib import Path

import lsh_one_shot
import pytest
import torch
from lsh_replay import judged
from tiny import byte_tokenizer, tiny_model

from hf_prune import WandaConfig, prune
from hf_prune.data.text import load_text
from hf_prune.data.windows import calibration_windows, evaluation_windows
from hf_prune.dynamics.spectrum import depth_spectrum
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.recipe import dump_yaml

pytest.importorskip("scipy")


def test_rows_are_of_the_first_block_and_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number}: {number * number} foxes, {number % 7} dogs\n" for number in range(2000)))
    values = {
        "model_name_or_path": str(tmp_path / "model"), "criterion": ["magnitude", "wanda"], "sparsity": 0.6,
        "dataset_name": str(text), "num_calibration_samples": 8, "seq_length": 48, "eval_dataset_name": str(text),
        "eval_seq_length": 48, "eval_max_windows": 4, "eval_efficiency": False, "device": "cpu", "objective": "both",
        "first_budget": 2, "loss_windows": 3, "num_exponents": 6, "spectrum_sequences": 1, "spectrum_length": 16,
        "search_dir": str(tmp_path / "search"), "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    truth = tmp_path / "truth"

    def main(*more: str) -> None:
        own = ["--config", str(tmp_path / "recipe.yaml"), "--truth", str(truth), *more]
        monkeypatch.setattr(sys, "argv", ["lsh_one_shot.py", *own])
        lsh_one_shot.main()

    main("--part", "1/2")
    assert [file.stem for file in truth.glob("*=*.json")] == ["criterion=magnitude"]
    assert "1 of 3 are there; the table wants all" in capsys.readouterr().out
    written = (truth / "criterion=magnitude.json").stat().st_mtime_ns
    main()
    assert (truth / "criterion=magnitude.json").stat().st_mtime_ns == written
    assert "2 candidates" in capsys.readouterr().out
    row = json.loads((truth / "criterion=wanda.json").read_text())

    tokenizer, read = byte_tokenizer(), load_text(str(text))
    windows = calibration_windows(read, tokenizer, 8 + 3, 48, seed=0)
    test = evaluation_windows(load_text(str(text)), tokenizer, 48, 4).input_ids
    whole = tiny_model("llama")
    prune(whole, WandaConfig(sparsity=0.6), input_ids=windows[:8])
    assert row["perplexity"] == pytest.approx(float(window_nll(whole, test).mean().exp()), rel=1e-6)
    looked = tiny_model("llama")
    prune(looked, WandaConfig(sparsity=0.6, targets=["model.layers.0"]), input_ids=windows[:2])
    assert row["1"]["loss"] == pytest.approx(float(window_nll(looked, windows[8:]).mean()), rel=1e-6)
    spectra = []
    for model in (looked, tiny_model("llama")):
        one = copy.deepcopy(model)
        one.model.layers = one.model.layers[:1]
        spectra.append(depth_spectrum(one, windows[8:9, :16], k=6))
    assert row["1"]["distance"] == pytest.approx(float(torch.linalg.vector_norm(spectra[0] - spectra[1])), rel=1e-5)


def look(loss: float, distance: float) -> dict[str, float | None]:
    return {
        "loss": loss, "layer_error": None if loss > 3 else loss, "distance": distance, "both": loss + distance,
        "seconds": 2.0, "spectrum_seconds": 3.0,
    }  # fmt: skip


def test_a_score_that_ranks_all_has_no_regret_and_its_reverse_has_the_most() -> None:
    rows = {
        f"candidate={place}": {
            "1": look(place, -place), "3": look(place, place % 2), "perplexity": 20.0 + place**2, "seconds": 50.0,
        }
        for place in range(6)
    }  # fmt: skip
    dense = {"perplexity": 15.0, "seconds": 0.0, "1": {"seconds": 30.0}, "3": {"seconds": 30.0}}
    table = lsh_one_shot.to_markdown({"dense": dense, **rows}, seeds=4)
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()[2:10]]
    cells = {(words[0], words[1]): words[2:] for words in lines}
    assert cells["loss", "1"] == ["+1.00 ± 0.00", "0.00 ± 0.00", "4%"]
    correlation, regret, cost = cells["LS distance", "1"]
    samples = [[int(name[-1]) for name in judged({own: own for own in rows}, seed)[0]] for seed in range(4)]
    worst = [max(own) ** 2 - min(own) ** 2 for own in samples]
    assert correlation == "-1.00 ± 0.00" and float(regret.split(" ")[0]) == pytest.approx(sum(worst) / 4, abs=0.005)
    assert cost == "20%"
    # What has no layer error comes last, and costs no spectrum.
    assert cells["layer error", "1"][1:] == ["0.00 ± 0.00", "4%"]
    # A candidate in other words changes nothing.
    again = {**rows, "also=0": rows["candidate=0"]}
    assert lsh_one_shot.to_markdown({"dense": dense, **again}, seeds=4).replace("also=0", "candidate=0") == table
    assert "4 of 6 candidates that differ a seed" in table
    assert "dense 15.00" in table and "20.00 (candidate=0) to 45.00" in table
