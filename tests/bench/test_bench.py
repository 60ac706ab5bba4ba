"""A small grid for real: rows of hf_prune and a peer in processes of their own, resumed, scored, written down."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import cli
from hf_prune.bench.grid import load_grid
from hf_prune.bench.results import Results
from hf_prune.bench.runner import Bench
from hf_prune.bench.summary import _add_ratios, _agreement, _time_ratio, markdown, summarise, write_between_markers
from hf_prune.compose import make_config
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.pruning import prune

PEER = """
import json, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, token_ids, output, report, share = sys.argv[1:]
assert tuple(load_file(token_ids)["input_ids"].shape) == (16, 64)
net = AutoModelForCausalLM.from_pretrained(model)
for name, weight in net.named_parameters():
    if name.endswith("down_proj.weight"):
        weight.data[:, : int(float(share) * weight.shape[1])] = 0
net.save_pretrained(output)
json.dump({"seconds": {"prune": 1.5}, "peak_memory_bytes": {"prune": 7000000, "load": 9}}, open(report, "w"))
"""
GRID = """
name: small
title: A tiny Llama.
repeats: 2
reference: peer
common:
  model_name_or_path: {model}
  dataset_name: {text}
  num_calibration_samples: 16
  seq_length: 64
  eval_dataset_name: {text}
  eval_seq_length: 64
  eval_max_windows: 12
settings:
  "50 %": {{sparsity: 0.5}}
  "2:4": {{pattern: 2:4}}
rows:
  - name: wanda
    method: wanda
    seeds: [0, 3]
    settings: ["50 %"]
  - name: sparsegpt, dense inputs
    method: sparsegpt
    propagate: false
    settings: ["2:4"]
  - name: peer
    command: '{python} "{{script}}" {{model}} {{token_ids}} {{output}} {{report}} {{sparsity}}'
    settings: ["50 %"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench with a space")
    tiny_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = "".join(f"{number}: {number * number} foxes, {number % 7} dogs\n" for number in range(2000))
    (folder / "text.txt").write_text(text)
    (folder / "peer.py").write_text(PEER)
    grid = GRID.format(model=folder / "model", text=folder / "text.txt", python=sys.executable)
    (folder / "grid.yaml").write_text(grid)
    (folder / "README.md").write_text(
        "Before\n<!-- benchmark:small:start -->\nold\n<!-- benchmark:small:end -->\nAfter\n"
    )
    return folder


def arguments(place: Path) -> list[str]:
    flags = ["--work_folder", str(place / "work"), "--readme", str(place / "README.md")]
    return ["bench", str(place / "grid.yaml"), *flags, "--script", str(place / "peer.py")]


def read(work: Path) -> dict:
    """The results with the one model's and evaluation's figures."""
    content = json.loads((work / "results.json").read_text())
    (content["quality"],) = content["quality"].values()
    return content


@pytest.fixture(scope="module")
def results(place: Path) -> dict:
    assert cli.main(arguments(place)) == 0
    return read(place / "work")


def test_nothing_is_begun_when_the_time_is_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = place / "no time"
    flags = ["--work_folder", str(work), "--script", "", "--max_minutes", "0"]
    assert cli.main(["bench", str(place / "grid.yaml"), *flags]) == 0
    content = read(work)
    assert not any(content["runs"].values()) and set(content["quality"]) == {"dense"}
    assert cli.main(["bench", str(place / "grid.yaml"), "--max_minutes", "soon"]) != 0
    assert "max_minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_every_row_is_what_its_recipe_gives(place: Path, results: dict) -> None:
    """Wanda's row at 50 %, seed 3: pruned and scored here by hand."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    config = make_config({"method": "wanda", "sparsity": 0.5})
    prune(
        model, config, tokenizer=tokenizer, dataset_name=str(place / "text.txt"), num_calibration_samples=16,
        seq_length=64, seed=3,
    )  # fmt: skip
    windows = evaluation_windows(load_text(str(place / "text.txt")), tokenizer, 64, 12).input_ids
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    runs = [run for own in results["runs"].values() for run in own]
    own = [run for run in runs if (run["row"], run["setting"], run["seed"]) == ("wanda", "50 %", 3)]
    assert len(own) == 2 and own[0]["weights"] == own[1]["weights"]
    expected = math.exp(sum(losses) / len(losses))
    assert results["quality"][own[0]["weights"]]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert results["quality"][own[0]["weights"]]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert all(run["seconds"] > 0 and run["peak_memory_bytes"] > 1e6 for run in own)


@pytest.mark.slow
def test_a_line_for_each_row_and_setting(place: Path, results: dict) -> None:
    with (place / "work" / "small.csv").open() as file:
        lines = list(csv.DictReader(file))
    named = {(line["setting"], line["row"]): line for line in lines}
    assert set(named) == {("50 %", "wanda"), ("50 %", "peer"), ("2:4", "sparsegpt, dense inputs")}
    peer, wanda = named["50 %", "peer"], named["50 %", "wanda"]
    assert (float(peer["seconds"]), float(peer["peak_memory_bytes"])) == (1.5, 7e6)
    assert float(peer["time_ratio"]) == 1 and named["2:4", "sparsegpt, dense inputs"]["time_ratio"] == ""
    assert float(wanda["time_ratio"]) == pytest.approx(float(wanda["seconds"]) / 1.5)
    assert (wanda["seeds"], wanda["runs"]) == ("2", "4")
    logs = [
        math.log(results["quality"][run["weights"]]["perplexity"] / results["quality"]["dense"]["perplexity"])
        for runs in results["runs"].values()
        for run in runs[:1]
        if (run["row"], run["setting"]) == ("wanda", "50 %")
    ]
    assert float(wanda["excess"]) == pytest.approx(sum(logs) / 2)
    assert float(wanda["excess_spread"]) == pytest.approx(abs(logs[0] - logs[1])) and float(wanda["low"]) > 0
    readme = (place / "README.md").read_text()
    assert readme.startswith("Before\n") and readme.endswith("\nAfter\n") and "old" not in readme
    assert readme.count("| wanda |") == 1 and "12 windows" in readme
    assert (place / "work" / "small.png").read_bytes().startswith(b"\x89PNG")
    # Calibration windows are cut once for each seed; weights do not stay.
    assert len(list((place / "work").glob("token_ids-*.safetensors"))) == 2
    assert not list((place / "work").glob("*.model"))


def test_the_agreement_of_allocations_is_pandas_rank_correlation(place: Path) -> None:
    grid = load_grid(place / "grid.yaml", {})
    grid = replace(grid, allocation_reference="peer")
    densities = pandas.DataFrame(numpy.random.default_rng(0).random((21, 3)).round(1), columns=["0", "3", "peer"])
    found = Results(place / "nowhere.json", "mine")
    found.quality["w"] = {}
    for cell in grid.cells:
        name = "peer" if cell.row == "peer" else str(cell.seed)
        if cell.setting == "50 %":
            found.content["runs"][cell.key] = [{"weights": "w", "densities": densities[name].tolist()}]
    expected = densities.corr(method="spearman")
    agreed = _agreement(grid, found, "wanda", "50 %")
    assert agreed["allocation_over_seeds"] == pytest.approx(expected.loc["0", "3"])
    assert agreed["allocation_like_reference"] == pytest.approx(expected.loc[["0", "3"], "peer"].mean())
    alone = {"allocation_over_seeds": None, "allocation_like_reference": None}
    assert _agreement(grid, found, "peer", "50 %") == alone


@pytest.mark.slow
def test_another_evaluation_in_the_same_folder_starts_anew(place: Path, results: dict) -> None:
    same, other = (
        Bench(load_grid(place / "grid.yaml", flags), place / "work", {}) for flags in ({}, {"eval_max_windows": 5})
    )
    assert same.results.quality.keys() == results["quality"].keys()
    assert other.results.quality == {} and all(other.results.runs(cell) == [] for cell in other.grid.cells)


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(place: Path, results: dict) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (place / "work").glob("*.log")}
    # One run is forgotten: it alone is made up for, with the same weights.
    path = place / "work" / "results.json"
    cut = json.loads(path.read_text())
    forgotten = next(key for key, runs in cut["runs"].items() if runs[0]["row"] == "peer")
    cut["runs"][forgotten].pop()
    path.write_text(json.dumps(cut))
    assert cli.main(arguments(place)) == 0
    again = read(place / "work")
    assert {key: len(runs) for key, runs in again["runs"].items()} == {k: len(r) for k, r in results["runs"].items()}
    assert again["quality"].keys() == results["quality"].keys()
    changed = [n for n, time in before.items() if (place / "work" / n).stat().st_mtime_ns != time]
    assert len(changed) == 1 and changed[0].startswith("peer")


@pytest.mark.slow
def test_a_file_of_results_is_taken_along(place: Path, results: dict) -> None:
    kept = place / "kept.json"
    kept.write_bytes((place / "work" / "results.json").read_bytes())
    flags = [word.replace(str(place / "work"), str(place / "elsewhere")) for word in arguments(place)]
    assert cli.main([*flags, "--results", str(kept)]) == 0
    assert not list((place / "elsewhere").glob("*.log")) and not (place / "elsewhere" / "results.json").exists()
    assert (place / "elsewhere" / "small.md").read_text() == (place / "work" / "small.md").read_text()
    # A line for each run and for each model's figures: nothing else changes when one is added.
    lines = [line.strip().rstrip(",") for line in kept.read_text().splitlines()]
    runs = [run for own in json.loads(kept.read_text())["runs"].values() for run in own]
    assert all(json.dumps(run) in lines for run in runs)


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": {}}', "a,b\n1,2\n"])
def test_a_file_that_holds_no_results_is_left_alone(place: Path, tmp_path: Path, content: str, capsys) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    assert cli.main([*arguments(place), "--results", str(file)]) == 2
    assert "is no file of benchmark results" in capsys.readouterr().err
    assert file.read_text() == content


def test_flags_are_recipe_keys_or_words_of_a_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments(place), "--eval_max_window", "5"]) == 2
    assert "eval_max_window: neither a key of a recipe" in capsys.readouterr().err
    grid = load_grid(place / "grid.yaml", {"min_keep_ratio": 0.1})
    assert grid.words == {"script", "model", "token_ids", "output", "report", "sparsity"}
    assert {cell.values["min_keep_ratio"] for cell in grid.cells} == {0.1}
    bench = Bench(grid, place / "flags", {"script": "s", "sparsity": "0.9"})
    (peer,) = (cell for cell in grid.cells if cell.command)
    assert bench._command(peer, Path("out"), Path("report"))[-1] == "0.5"


@pytest.mark.slow
def test_a_peer_without_a_report_is_a_row_that_failed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (place / "grid.yaml").read_text().replace("repeats: 2", "repeats: 1").replace("[0, 3]", "[0]")
    (place / "silent.yaml").write_text(text)
    (place / "silent.py").write_text("")
    flags = ["--work_folder", str(place / "silent"), "--script", str(place / "silent.py"), "--settings", "50 %"]
    assert cli.main(["bench", str(place / "silent.yaml"), *flags]) == 1
    assert "peer, 50 %: FileNotFoundError" in capsys.readouterr().err
    with (place / "silent" / "small.csv").open() as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["wanda"]


@pytest.mark.slow
def test_a_row_that_fails_does_not_take_the_others_along(place: Path, capsys: pytest.CaptureFixture) -> None:
    text = (place / "grid.yaml").read_text().replace("repeats: 2", "repeats: 1").replace("[0, 3]", "[0]")
    (place / "failing.yaml").write_text(text)
    flags = ["--work_folder", str(place / "other"), "--script", str(place / "absent.py")]
    assert cli.main(["bench", str(place / "failing.yaml"), *flags]) == 1
    assert "1 of 3 runs failed: peer, 50 %" in capsys.readouterr().err
    with (place / "other" / "small.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("method: wanda", "method: magic"), "method: 'magic' is unknown"),
        (("repeats: 2", "repeat: 2"), "repeat: unknown key"),
        (('settings: ["2:4"]', 'settings: ["3:4"]'), "names '3:4'"),
        (("reference: peer", "reference: nobody"), "'nobody' is no row"),
        (("- name: peer", "- name: wanda"), "a name of its own"),
        (("seq_length: 64\n  eval_dataset", "sequence: 64\n  eval_dataset"), "sequence: unknown recipe key"),
        (("propagate: false", "reconstruct: block\n    propagate: false"), "propagate: false leaves no"),
    ],
)
def test_a_broken_grid_is_refused_before_anything_runs(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = GRID.format(model="model", text="text.txt", python="python")
    assert change[0] in text
    (tmp_path / "grid.yaml").write_text(text.replace(*change))
    with pytest.raises(BadInputError, match=message):
        load_grid(tmp_path / "grid.yaml")


def test_ratios_are_to_the_reference_under_the_same_setting() -> None:
    lines = [
        {"setting": "a", "row": "peer", "excess": 0.5, "seconds": 10.0},
        {"setting": "a", "row": "own", "excess": 0.2, "seconds": 25.0},
        {"setting": "b", "row": "own", "excess": 0.2, "seconds": 25.0},
        {"setting": "c", "row": "peer", "excess": -0.1, "seconds": 10.0},
        {"setting": "c", "row": "own", "excess": 0.1, "seconds": 5.0},
    ]
    _add_ratios(lines, "peer", {(line["setting"], line["row"]): [(None, line["seconds"])] for line in lines})
    assert [line["excess_ratio"] for line in lines] == [1.0, 0.4, None, None, None]
    assert [line["time_ratio"] for line in lines] == [1.0, 2.5, None, 1.0, 0.5]


def test_seconds_are_compared_with_those_of_the_same_day() -> None:
    own = [("monday", 10.0), ("tuesday", 3.0), ("tuesday", 5.0)]
    peer = [("tuesday", 2.0), ("wednesday", 100.0)]
    assert _time_ratio(own, peer) == 2.0
    assert _time_ratio(own[:1], peer) == 10.0 / 51.0  # no day in common


@pytest.mark.parametrize(("busy", "seconds"), [((0.0, 0.9, 0.05), 11.0), ((0.5, 0.9, 0.7), 10.0)])
def test_seconds_are_those_of_the_least_disturbed_machine(
    tmp_path: Path, busy: tuple[float, ...], seconds: float
) -> None:
    text = GRID.format(model="model", text="text.txt", python="python")
    (tmp_path / "grid.yaml").write_text(text)
    grid = load_grid(tmp_path / "grid.yaml")
    results = Results(tmp_path / "results.json", "tiny")
    figures = {"nll": [1.0, 1.0], "perplexity": math.e, "sparsity": 0.5, "total_sparsity": 0.4, "parameters": 10}
    results.quality.update({"dense": figures, "own": figures})
    cell = next(cell for cell in grid.cells if cell.row == "wanda")
    for own, took in zip(busy, (10.0, 40.0, 12.0), strict=True):
        run = {"seed": 0, "weights": "own", "seconds": took, "peak_memory_bytes": 1, "cores_busy_elsewhere": own}
        results.add(cell, run)
    # One that had half of the processors, though nothing else was at work.
    beside = {"seed": 0, "weights": "own", "seconds": 99.0, "peak_memory_bytes": 1, "cores_busy_elsewhere": 0.0}
    results.add(cell, {**beside, "at_once": 2})
    (line,) = summarise(grid, results)
    assert line["seconds"] == seconds and line["quiet"] == (min(busy) <= 0.1)
    assert f"| {'' if line['quiet'] else '~'}{seconds:.0f}" in markdown(grid, results, [line])


def test_a_readme_without_the_markers_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("Nothing here\n")
    with pytest.raises(BadInputError, match="benchmark:small:start"):
        write_between_markers(path, "small", "| table |")
    assert path.read_text() == "Nothing here\n"
