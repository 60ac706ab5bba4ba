"""Runs whose weights stay on the disk, in real processes: cut and gone on with, damaged, and by two at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cut_runs import KILLED, RECIPE, TOO_LARGE, Cut, flip, place_of, prune, stopped_early
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model

FAMILIES = ("llama", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model(request.param).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(3000)))
    return {**RECIPE, "model_name_or_path": folder / "model", "dataset_name": text, "eval_dataset_name": text}


@pytest.fixture(scope="module")
def in_memory(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    codes, log = prune({**recipe, "output_dir": folder / "out"}, folder)
    assert codes == [0], log
    return folder / "out"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for file in sorted(folder.glob("*.safetensors")) for name, own in load_file(file).items()}


def check_same(folder: Path, expected: Path) -> None:
    one, other = stored(folder), stored(expected)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("prune_plan.json", "config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    reports = [json.loads((own / "prune_report.json").read_text()) for own in (folder, expected)]
    for report in reports:
        assert all(row["passed"] for row in report["verification"])
        for name in ("dense", "pruned"):
            del report["evaluation"][name]["seconds"]
    for key in ("views", "sparsity", "evaluation", "verification", "displacement"):
        assert reports[0][key] == reports[1][key], key
    assert sorted(entry.name for entry in folder.parent.iterdir() if entry.is_dir()) == [folder.name]


@pytest.mark.slow
def test_kills_change_nothing(recipe: dict, in_memory: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "out"
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    values = {**recipe, "output_dir": output, "offload": "disk", "overwrite_output_dir": True}
    for cut in (
        Cut("open", "shard_0000", 1, "half"),
        Cut("os.rename", "shard_0001", 1),
        # The block's file counts, the walk's state behind it does not yet.
        Cut("os.rename", "inputs_0002", 1),
        Cut("os.remove", "inputs_0002", 1),
        Cut("open", "model.safetensors.index.json", 2),
        Cut("open", "hf_prune_recipe.yaml", 1),
        # The old folder has been moved aside, the new one is about to take its name.
        Cut("os.rename", "out", 1),
    ):
        assert [file.name for file in output.iterdir()] == ["config.json"]
        codes, log = prune(values, tmp_path, cut=cut)
        assert codes == [TOO_LARGE if cut.action == "half" else KILLED], (cut, log)
    assert not output.exists()
    # Without leave to replace what is back it says so before it does anything.
    codes, log = prune({**values, "overwrite_output_dir": False}, tmp_path)
    assert codes == [2] and "exists and is not empty" in log and (output / "config.json").read_text() == "{}", log
    codes, log = prune(values, tmp_path)
    assert codes == [0] and "Going on with block 3" in log, log
    check_same(output, in_memory)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixtral"], indirect=True)
def test_two_processes_read_the_same_files(recipe: dict, tmp_path: Path) -> None:
    for offload in ("none", "disk"):
        (tmp_path / offload).mkdir()
        values = {**recipe, "output_dir": tmp_path / offload / "out", "offload": offload}
        codes, log = prune(values, tmp_path, world=2)
        assert codes == [0, 0], log
    check_same(tmp_path / "disk" / "out", tmp_path / "none" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llama"], indirect=True)
def test_what_was_damaged_between_two_sessions_is_named(recipe: dict, tmp_path: Path) -> None:
    values = stopped_early(recipe, tmp_path, offload="disk")
    weights, shard = tmp_path / "model" / "model.safetensors", tmp_path / "out.pruning" / "shard_0000.safetensors"
    for file, damage, said in (
        (weights, lambda whole: whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:], "is not what it was;"),
        (weights, lambda whole: whole[:-100], "model.safetensors: truncated"),
        (shard, lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "shard_0000.safetensors is damaged"),
    ):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        codes, log = prune(values, tmp_path)
        assert codes == [2] and said in log and "Traceback" not in log, log
        file.write_bytes(whole)
    codes, log = prune({**values, "offload": "none"}, tmp_path)
    assert codes == [2] and 'offload was "disk" and is "none"' in log, log
    codes, log = prune({**values, "time_limit": "1h"}, tmp_path)
    assert codes == [0] and "Going on with block 1" in log, log


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llama"], indirect=True)
def test_what_is_damaged_while_a_run_is_under_way_is_named(recipe: dict, in_memory: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe["model_name_or_path"], tmp_path / "model")
    (tmp_path / "runs").mkdir()
    output = tmp_path / "runs" / "out"
    values = {**recipe, "model_name_or_path": tmp_path / "model", "output_dir": output, "offload": "disk"}
    weights, name = tmp_path / "model" / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    victim = (weights, place_of(weights, name))
    # The first block is pruned, the third one is still to be read.
    codes, log = prune(values, tmp_path, cut=Cut("os.rename", "shard_0000", 1, "flip", victim=victim))
    assert codes == [2] and f"the file of {name} is not what it was" in log and "Traceback" not in log, log
    assert not output.exists()
    flip(*victim)
    shard = output.with_name("out.pruning") / "shard_0001.safetensors"
    # A finished block, when the one before it goes into the output folder.
    cut = Cut("os.link", "shard_0000", 1, "flip", victim=(shard, 10_000))
    codes, log = prune(values, tmp_path, cut=cut)
    assert codes == [2] and "shard_0001.safetensors is damaged" in log and "Traceback" not in log, log
    assert not output.exists()


@pytest.mark.slow
def test_a_full_disk_is_said_in_a_sentence(recipe: dict, in_memory: Path, small_disk, tmp_path: Path) -> None:
    with small_disk("20m") as disk:
        values = {**recipe, "output_dir": disk / "out", "offload": "disk"}
        codes, log = prune(values, tmp_path, cut=Cut("open", "shard_0001", 1, "fill"))
        assert codes == [1] and "the disk is full" in log and "Traceback" not in log, log
        assert sorted(entry.name for entry in disk.iterdir()) == ["filler", "out.pruning"]
        (disk / "filler").unlink()
        codes, log = prune(values, tmp_path)
        assert codes == [0] and "Going on with block 1" in log, log
        check_same(disk / "out", in_memory)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llama"], indirect=True)
def test_a_disk_that_fills_under_hidden_states_is_said_in_a_sentence(
    recipe: dict, in_memory: Path, small_disk, tmp_path: Path
) -> None:
    with small_disk("20m") as disk:
        values = {**recipe, "output_dir": disk / "out", "offload": "disk"}
        # With the plan kept, what is written next are the inputs of the first block.
        codes, log = prune(values, tmp_path, cut=Cut("os.rename", "manifest.json", 3, "fill"))
        assert codes == [1] and "out.pruning: the disk is full" in log and "Traceback" not in log, log
        kept = json.loads((disk / "out.pruning" / "manifest.json").read_text())["entries"]
        assert "plan" in kept and "walk" not in kept
        (disk / "filler").unlink()
        codes, log = prune(values, tmp_path)
        assert codes == [0], log
        check_same(disk / "out", in_memory)
