"""Searches played again on truth tables whose answer is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lsh_replay import look_once, looks_to_markdown, play, replay, scores, to_markdown
from lsh_runs import DENSE, Run, claim, figures, load_truth, save_run

EPOCHS = 20


def run(final: float, away: float, early: float, seconds: float = 2.0) -> Run:
    """Losses go from `early` to `final` in a line; the spectrum is `away` from the dense one's at every epoch."""
    losses = torch.linspace(early, final, EPOCHS, dtype=torch.float64)
    base = torch.tensor([1.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    spectra = (base + torch.tensor([0.0, 0.0, 0.0, away])).expand(EPOCHS, -1)
    return Run(losses, losses, torch.full((EPOCHS,), seconds), torch.full((EPOCHS,), 0.5), spectra, losses[-1:])


DENSE_RUN = run(4.0, 0.0, 6.0)
# The nearer the spectrum the better in the end, while the early loss says the opposite.
RUNS = {f"c{place:02d}": run(4.2 + place / 10, 1.0 + place, 7.0 - place / 10) for place in range(12)}


def test_a_metric_that_knows_has_no_regret_and_one_that_errs_has_the_most() -> None:
    runs, others = list(RUNS.values()), [run(0.0, 0.3 * place, 0.0) for place in range(5)]
    for metric in ("raw", "pca"):
        outcome = play(metric, DENSE_RUN, runs, others, 0)
        assert outcome.correlation == pytest.approx(1) and outcome.regret == 0
    outcome = play("loss", DENSE_RUN, runs, others, 0)
    assert outcome.correlation == pytest.approx(-1)
    # The lines of loss cross at the 11th epoch; up to the 9th the worst are kept, and then two are left to the end.
    assert outcome.regret > math.exp(4.2 + 8 / 10) - math.exp(4.2)


def test_costs_are_those_of_the_schedule() -> None:
    runs = list(RUNS.values())
    # 12 become 7, 4, 3 and 2, with 3, 6, 9, 12 and 15 epochs; two go to the end; the dense run has 15.
    elimination = 12 * 3 + 7 * 6 + 4 * 9 + 3 * 12 + 2 * 15
    by_loss, by_spectrum = (play(metric, DENSE_RUN, runs, [], 0) for metric in ("loss", "raw"))
    assert by_loss.epochs == elimination + 2 * 20
    assert by_loss.seconds == pytest.approx(2.0 * by_loss.epochs)
    assert by_spectrum.epochs == by_loss.epochs + 15
    looks = 12 + 7 + 4 + 3 + 2 + 5
    assert by_spectrum.seconds == pytest.approx(2.0 * by_spectrum.epochs + 0.5 * looks)


def test_what_diverged_comes_last_and_both_is_the_sum_of_the_relative_parts() -> None:
    runs = [*RUNS.values(), run(4.0, math.nan, 5.0), run(math.nan, 0.1, math.nan)]
    by_loss, raw, both = (scores(metric, DENSE_RUN, runs, [], 3, 0) for metric in ("loss", "raw", "both"))
    assert raw[-2] == both[-2] == math.inf and by_loss[-1] == both[-1] == math.inf
    loss, length = float(DENSE_RUN.losses[2]), math.sqrt(1 + 1 + 4 + 9)
    assert raw[0] == pytest.approx(1.0)
    assert both[0] == pytest.approx(raw[0] / length + (by_loss[0] - loss) / loss)


def test_runs_are_kept_and_a_replay_fits_embeddings_to_candidates_it_does_not_judge(tmp_path: Path) -> None:
    for name, own in {DENSE: DENSE_RUN, **RUNS}.items():
        save_run(tmp_path, name, own)
    (tmp_path / "c99.tmp").write_text("cut")
    dense, candidates = load_truth(tmp_path)
    assert list(candidates) == list(RUNS) and torch.equal(dense.losses, DENSE_RUN.losses)
    outcomes = replay(dense, candidates, range(3), ("loss", "raw", "pca"))
    assert all(len(own) == 3 for own in outcomes.values())
    # Of 12 a seed judges 8, and the order by spectra is the true one for any of them.
    assert [own.correlation for own in outcomes["raw"]] == pytest.approx([1, 1, 1])
    assert [own.regret for own in outcomes["pca"]] == [0, 0, 0]
    assert outcomes["raw"][0].epochs == 8 * 3 + 5 * 6 + 3 * 9 + 2 * 12 + 2 * 20 + 12
    text = to_markdown(outcomes, dense, candidates)
    assert "| LS distance | +1.00 ± 0.00 | 0.00 ± 0.00 | 157 ± 0 |" in text
    assert "8 of 12 candidates a seed, 3 seeds" in text and "160 epochs and 320 seconds" in text


def test_of_the_last_two_the_validation_loss_at_the_best_epoch_takes_one_and_not_the_text_that_judges() -> None:
    # The better by far on the text that judges is the worse of the last two by the validation text.
    first, second = run(4.2, 1.0, 6.0), replace(run(4.3, 1.1, 6.0), test_loss=torch.tensor([3.0]))
    assert play("raw", DENSE_RUN, [first, second], [], 0).regret == pytest.approx(math.exp(4.2) - math.exp(3.0))
    # The other's middle is lower than any end.
    best = first.validation_losses.clone()
    best[9] = 4.1
    second = replace(second, validation_losses=best)
    assert second.best_epoch == 10 and play("raw", DENSE_RUN, [first, second], [], 0).regret == 0


def test_one_look_takes_the_first_by_its_score_and_costs_no_more_by_spectra_than_by_loss() -> None:
    runs = list(RUNS.values())
    by_loss, by_spectrum = (look_once(metric, DENSE_RUN, runs, [], 0, 2) for metric in ("loss", "raw"))
    assert by_spectrum.regret == 0 and by_loss.regret == pytest.approx(math.exp(5.3) - math.exp(4.2))
    assert by_loss.epochs == 12 * 2 + 20 and by_loss.seconds == pytest.approx(2.0 * 44)
    # 48 seconds buy the dense run's two epochs, those of 9 candidates and 10 spectra: 45 seconds.
    assert by_spectrum.epochs == (1 + 9) * 2 + 20 and by_spectrum.seconds == pytest.approx(45 + 40)
    # The best stands where nobody looks any more.
    late = look_once("raw", DENSE_RUN, runs[::-1], [], 0, 2)
    assert late.regret == pytest.approx(math.exp(4.5) - math.exp(4.2)) and late.correlation == pytest.approx(1)
    lines = looks_to_markdown(DENSE_RUN, RUNS, range(2), ("loss", "raw")).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:7]] == [
        ["| 1", "5%"], ["| 2", "10%"], ["| 3", "15%"], ["| 6", "30%"], ["| 9", "45%"],
    ]  # fmt: skip
    assert all(line.split(" | ")[2].endswith("; -1.00 ± 0.00") for line in lines[2:7])
    assert all(line.split(" | ")[3].endswith("; +1.00 ± 0.00 |") for line in lines[2:7])


def test_a_folder_belongs_to_its_recipe(tmp_path: Path) -> None:
    claim(tmp_path, {"learning_rate": 0.01, "test text": "0" * 32})
    claim(tmp_path, {"learning_rate": 0.01, "test text": "0" * 32})
    with pytest.raises(SystemExit, match=r"another recipe: learning_rate was 0\.01 and is 0\.1; test text is not"):
        claim(tmp_path, {"learning_rate": 0.1, "test text": "1" * 32})
    (tmp_path / "recipe.json").unlink()
    save_run(tmp_path, DENSE, DENSE_RUN)
    with pytest.raises(SystemExit, match=r"holds runs and no recipe\.json"):
        claim(tmp_path, {})


def test_candidates_that_were_trained_alike_are_one_and_figures_are_plain(tmp_path: Path) -> None:
    for name, own in {DENSE: DENSE_RUN, "a": RUNS["c01"], "b": RUNS["c02"], "c": RUNS["c01"]}.items():
        save_run(tmp_path, name, own)
    dense, candidates = load_truth(tmp_path)
    assert list(candidates) == ["a", "b"]
    rows = json.loads(json.dumps(figures(dense, candidates)))
    assert list(rows) == ["dense", "a", "b"] and rows["dense"]["distances"] == [0.0] * EPOCHS
    assert rows["a"]["distances"] == [2.0] * EPOCHS and rows["b"]["losses"][0] == 6.8
    assert rows["b"]["perplexity"] == pytest.approx(math.exp(4.4), abs=1e-4) and rows["b"]["seconds"] == 40.0
