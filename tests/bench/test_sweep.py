"""A sweep for real on a tiny model, and its parts against brute force."""

import csv
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model

from hf_prune import cli
from hf_prune.bench import sweep
from hf_prune.bench.constraint import choose, parse_constraint
from hf_prune.checkpoint.lock import hold
from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.pruning import prune

COMMON = {
    "model_name_or_path": "somewhere", "dataset_name": "text.txt", "num_calibration_samples": 16, "seq_length": 64,
    "eval_dataset_name": "text.txt", "eval_seq_length": 64, "eval_max_windows": 12,
}  # fmt: skip


def test_every_sensible_combination_is_a_cell_and_the_others_are_named() -> None:
    axes = {"method": ["wanda", "admm"], "reconstruct": ["none", "linear"], "sparsity": [0.5, 0.7], "seed": [0, 1, 2]}
    grid, refused = sweep.make_sweep({**COMMON, **axes}, "mine")
    cells = {(cell.row, cell.setting, cell.seed) for cell in grid.cells}
    combinations = [(m, r) for m, r in itertools.product(*list(axes.values())[:2]) if (m, r) != ("admm", "linear")]
    assert cells == {
        (f"{method}, {reconstruct}", f"{sparsity:g}", seed)
        for (method, reconstruct), sparsity, seed in itertools.product(combinations, axes["sparsity"], axes["seed"])
    }
    assert len(refused) == 2 and all("what the update admm ends with already" in sentence for sentence in refused)
    chosen = next(cell for cell in grid.cells if (cell.row, cell.setting, cell.seed) == ("wanda, linear", "0.7", 2))
    assert {key: chosen.values[key] for key in axes} == dict(zip(axes, ["wanda", "linear", 0.7, 2], strict=True))


def test_a_key_of_a_part_goes_to_the_combinations_that_choose_the_part() -> None:
    axes = {"method": "sparsegpt", "reconstruct": ["none", "auto"], "pattern": ["unstructured", "2:4"]}
    grid, refused = sweep.make_sweep({**COMMON, **axes, "reconstruct_passes": 3}, "mine")
    assert refused == []
    found = {(cell.row, cell.setting): cell.values.get("reconstruct_passes") for cell in grid.cells}
    assert found == {
        ("none", "unstructured"): None,
        ("none", "2:4"): None,
        ("auto (unstructured)", "unstructured"): None,
        ("auto (2:4)", "2:4"): 3,
    }


def test_a_list_over_a_key_of_a_part_is_tried_where_the_part_is_chosen() -> None:
    axes = {"allocation": ["uniform", "fcpts"], "fcpts_steps": [8, 32], "sparsity": [0.5, 0.6]}
    grid, refused = sweep.make_sweep({**COMMON, "method": "wanda", **axes, "outlier_multiple": 7}, "mine")
    found = {(cell.row, cell.setting): cell.values.get("fcpts_steps") for cell in grid.cells}
    rows = {"uniform": None, "fcpts, 8": 8, "fcpts, 32": 32}
    assert found == {(row, setting): steps for row, steps in rows.items() for setting in ("0.5", "0.6")}
    assert refused == ["outlier_multiple: no combination chooses what it belongs to."]


def test_keys_that_are_lists_by_nature_are_no_axes() -> None:
    grid, _ = sweep.make_sweep({**COMMON, "method": "wanda", "ignore": ["q_proj"], "pattern": ["2:4", "4:8"]}, "mine")
    assert [cell.values["ignore"] for cell in grid.cells] == [["q_proj"]] * 2
    assert list(grid.settings) == ["2:4", "4:8"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "wanda"}, "no key holds a list"),
        ({"method": "wanda", "sparsity": []}, "sparsity: an empty list"),
        ({"method": ["admm"], "reconstruct": "linear"}, "no combination can be run"),
        ({"method": ["wonda"]}, "no combination can be run.*unknown"),
        ({"method": ["wanda"], "eval_seq_length": [64, 128]}, "eval_seq_length: all that is tried is scored alike"),
    ],
)
def test_nothing_to_sweep_is_an_error(values: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        sweep.make_sweep({**COMMON, **values}, "mine")


@given(st.integers(0, 2**32), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_the_overlap_is_that_of_the_sets(
    tmp_path_factory: pytest.TempPathFactory, seed: int, p: float, q: float
) -> None:
    folder = tmp_path_factory.getbasetemp()
    generator = numpy.random.default_rng(seed)
    masks = [{name: generator.random((5, 13)) < share for name in "ab"} for share in (p, q)]
    for number, mask in enumerate(masks):
        packed = {name: torch.from_numpy(numpy.packbits(kept)) for name, kept in mask.items()}
        save_file(packed, folder / f"{number}.safetensors")
    sets = [
        {(name, *place) for name, kept in mask.items() for place in numpy.argwhere(kept).tolist()} for mask in masks
    ]
    expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 1.0
    assert sweep.overlap(folder / "0.safetensors", folder / "1.safetensors") == pytest.approx(expected)


def line(row: str, ppl_ratio: float, size: float, speed: float | None = 1.0) -> dict:
    return {"row": row, "setting": "0.5", "perplexity": 20 * ppl_ratio, "ppl_ratio": ppl_ratio, "size": size,
            "speed": speed, "sparsity": 0.5, "seconds": 3.0}  # fmt: skip


def test_the_constraint_chooses_the_lowest_perplexity_that_fits() -> None:
    lines = [line("a", 1.04, 0.7), line("b", 1.06, 0.55), line("c", 1.049, 0.58), line("d", 1.01, 0.9)]
    wanted = parse_constraint("ppl_ratio<=1.05, size <= 0.6")
    best, sentence = choose(lines, wanted)
    assert best is lines[2] and "c at 0.5" in sentence and "1 of 4 fit" in sentence
    none, sentence = choose(lines, parse_constraint("ppl_ratio<1.05,size<0.5"))
    # b is 0.01 of one limit and 0.1 of the other away; c, with the same size missed by 0.16, nothing and 0.16.
    assert none is None and sentence.startswith("None fits. Nearest: b at 0.5: ppl_ratio is 1.06, not <1.05; size is")
    none, sentence = choose(lines[1:], parse_constraint("ppl_ratio<=1.05, size<=0.57"))
    assert none is None and sentence == "None fits. Nearest: b at 0.5: ppl_ratio is 1.06, not <=1.05."
    none, sentence = choose([line("a", 1.0, 1.0, None)], parse_constraint("speed>=1"))
    assert none is None and sentence.endswith("a at 0.5: speed was not measured.")


@pytest.mark.parametrize("text", ["ppl_ratio", "ppl<=1", "size<=x", "size==1", "size<=1e", "", "ppl_ratio<=1;size<=1"])
def test_a_constraint_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(BadInputError, match="constraint: "):
        parse_constraint(text)


@pytest.mark.slow
def test_what_a_sweep_notes_of_a_mixture(tmp_path: Path) -> None:
    """The mask of every planned matrix, experts included, and how fast the folder is beside the dense model."""
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    (tmp_path / "pruned").mkdir()
    model = tiny_model("mixtral")
    result = prune(model, make_config({"method": "magnitude", "sparsity": 0.5}))
    model.save_pretrained(tmp_path / "pruned")
    result.plan.save(tmp_path / "pruned" / "prune_plan.json")
    options = {"dtype": "float32", "device": "cpu", "revisions": None, "trust_remote_code": False}
    look = sweep.Look(tmp_path, str(tmp_path / "dense"), options, speed=True)
    noted = look(SimpleNamespace(key="mine"), tmp_path / "pruned")
    # The same model twice, but for zeros, which stock kernels multiply like any other number.
    assert noted["mask"] == "mine" and 0.2 < noted["speed"] < 5 and noted["decode_tokens_per_second"] > 0
    bits = load_file(tmp_path / "mask-mine.safetensors")
    weights = model.state_dict()
    assert bits.keys() == {view.parameter for view in result.plan.views}
    for name, packed in bits.items():
        kept = numpy.unpackbits(packed.numpy(), count=weights[name].numel()).reshape(weights[name].shape)
        assert (kept == (weights[name] != 0).numpy()).all(), name


@pytest.mark.slow
def test_a_sweep_of_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = "".join(f"{number}: {number * number} foxes, {number % 7} dogs\n" for number in range(2000))
    (tmp_path / "text.txt").write_text(text)
    values = {
        **COMMON, "model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "text.txt"),
        "eval_dataset_name": str(tmp_path / "text.txt"), "eval_efficiency": False, "fcpts_steps": 4, "propagate": False,
        "method": ["magnitude", "wanda"], "allocation": "fcpts", "sparsity": [0.6], "seed": [0, 1],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    command = [
        "sweep",
        "--config",
        str(tmp_path / "mine.yaml"),
        "--work_folder",
        str(tmp_path / "work"),
        "--at_once",
        "2",
    ]
    assert cli.main([*command, "--constraint", "size<=0.99, ppl_ratio<=1.5"]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    (quality,) = results["quality"].values()
    logs = {
        row: [
            math.log(quality[run["weights"]]["perplexity"]) for (run,) in results["runs"].values() if run["row"] == row
        ]
        for row in ("magnitude", "wanda")
    }
    best = min(logs, key=lambda row: sum(logs[row]))
    assert f"Chosen: {best} at 0.6" in out
    chosen = yaml.safe_load((tmp_path / "work" / "chosen.yaml").read_text())
    assert (chosen["method"], chosen["sparsity"], chosen["seed"]) == (best, 0.6, 0)
    # The table has the range over the two seeds, and the picture is one.
    for row, own in logs.items():
        (told,) = (told for told in out.splitlines() if told.startswith("| 0.6 |") and row in told)
        assert f"| {100 * (max(own) - min(own)):.1f} % |" in told
    assert (tmp_path / "work" / "mine.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "work" / "mine.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(own["row"], own["setting"]) for own in lines} == set(itertools.product(("magnitude", "wanda"), ("0.6",)))
    model = load_file(tmp_path / "model" / "model.safetensors")
    total = sum(tensor.numel() for tensor in model.values())
    pruned = sum(tensor.numel() for name, tensor in model.items() if "proj" in name)
    for own in lines:
        expected = 1 - float(own["setting"]) * pruned / total
        # Wanda drops whole weights of each row, and rows of 32 have few.
        rounding = 2e-3 if own["row"] == "magnitude" else pruned / total / 32
        assert float(own["size"]) == pytest.approx(expected, abs=rounding)
        assert 0 < float(own["overlap"]) <= 1
    # One learning for each seed's windows, whatever the method.
    assert len(list((tmp_path / "work" / "statistics").glob("thresholds-*.safetensors"))) == 2
    # One set of statistics for each seed's windows: magnitude has none.
    assert len(list((tmp_path / "work" / "statistics").glob("*/complete"))) == 2
    # The best overlaps wholly with itself; nothing is both smaller and better than the frontier.
    assert max(float(own["overlap"]) for own in lines) == 1.0
    for own in lines:
        beaten = any(
            float(other["size"]) <= float(own["size"]) and float(other["ppl_ratio"]) < float(own["ppl_ratio"])
            for other in lines
        )
        assert (own["pareto"] == "True") == (not beaten) or math.isclose(float(own["ppl_ratio"]), 1.0, rel_tol=1e-9)
    # Once more: nothing is left to do.
    before = (tmp_path / "work" / "results.json").read_bytes()
    assert cli.main([*command, "--constraint", "size<=0.01"]) == 1
    assert "None fits. Nearest: " in capsys.readouterr().err
    assert (tmp_path / "work" / "results.json").read_bytes() == before
    # Nor while another process is at it, nor as one of several.
    lock = hold(tmp_path / "work" / "bench.lock")
    assert lock is not None and cli.main(command) == 2
    assert "another run is under way" in capsys.readouterr().err
    lock.close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command) == 2 and "without a launcher" in capsys.readouterr().err
