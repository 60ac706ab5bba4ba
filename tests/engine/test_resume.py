"""Runs that are cut and go on: real processes, killed at seeded moments, are gone on with to the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from cut_runs import HALF, KILLED, RECIPE, STOPPED, TOO_LARGE, Cut, prune, stopped_early
from safetensors.torch import load, load_file
from tiny import byte_tokenizer, tiny_model

from hf_prune.checkpoint.lock import hold


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(3000)))
    return {**RECIPE, "model_name_or_path": folder / "model", "dataset_name": text, "eval_dataset_name": text}


@pytest.fixture(scope="module")
def uncut(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uncut")
    codes, log = prune({**recipe, "output_dir": folder / "out"}, folder)
    assert codes == [0], log
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == ["out"]
    return made(folder / "out")


def made(folder: Path) -> dict[str, bytes]:
    """What must be the same to the byte."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "prune_plan.json")}


@pytest.mark.slow
def test_five_kills_change_nothing(recipe: dict, uncut: dict[str, bytes], tmp_path: Path) -> None:
    values = {**recipe, "output_dir": tmp_path / "out"}
    drawn = random.Random(0)
    # The manifest is replaced for the dense scores, the plan, and each of the three blocks.
    cuts = [
        Cut("os.rename", "manifest.json", drawn.randint(1, 3)),
        Cut("os.rename", "inputs_0002", 1, "half"),
        Cut("open", "block_", drawn.randint(1, 2), "half"),
        Cut("os.remove", "inputs_", 1),
        Cut("open", "hf_prune_recipe.yaml", 1),
        # The whole folder is about to take its name.
        Cut("os.rename", "out", 1),
    ]
    for cut in cuts:
        codes, log = prune(values, tmp_path, cut=cut)
        assert codes == [TOO_LARGE if cut.action == "half" else KILLED], (cut, log)
        assert not (tmp_path / "out").exists()
        # Nothing of a file that was being written has its name: a shard, then the manifest.
        left = {file.name: file.stat().st_size for file in (tmp_path / "out.pruning").iterdir()}
        if cut.action == "half" and cut.event == "os.rename":
            assert [name for name in left if name.startswith(".tmp") or name.endswith(".part")]
            assert not [name for name in left if name.startswith("block_") and name > "block_0000.safetensors"]
        elif cut.action == "half":
            assert [size for name, size in left.items() if re.fullmatch(r"manifest.json.\d+.part", name)] == [HALF]
    # It has its name, and what was kept of the run is about to go.
    codes, log = prune(values, tmp_path, cut=Cut("os.remove", "manifest.json"))
    assert codes == [KILLED] and "Going on with block 3" in log, log
    assert made(tmp_path / "out") == uncut and (tmp_path / "out.pruning").exists()
    # Another run than this one is refused as ever.
    codes, log = prune({**values, "sparsity": 0.6}, tmp_path)
    assert codes == [2] and "exists and is not empty" in log, log
    codes, log = prune(values, tmp_path)
    assert codes == [0] and "is finished already" in log and "pruning blocks" not in log, log
    assert made(tmp_path / "out") == uncut
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["out"]


@pytest.mark.slow
def test_learning_goes_on_where_it_was_killed(recipe: dict, tmp_path: Path) -> None:
    values = {key: value for key, value in recipe.items() if key != "output_importance"}
    values |= {"allocation": "fcpts", "fcpts_steps": 20, "fcpts_patience": 9}
    codes, log = prune({**values, "output_dir": tmp_path / "whole"}, tmp_path)
    assert codes == [0], log
    values["output_dir"] = tmp_path / "out"
    # Its state is kept after every step: eleven of twenty before the kill, nine after it and no tenth.
    for count, code in ((12, KILLED), (10, 0)):
        codes, log = prune(values, tmp_path, cut=Cut("os.rename", "thresholds-", count))
        assert codes == [code], log
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert not (tmp_path / "out.pruning").exists()


@pytest.mark.slow
def test_weights_that_were_trained_with_their_thresholds_outlive_a_cut(recipe: dict, tmp_path: Path) -> None:
    learned = {"method": "fcpts", "train_weights": True, "weight_learning_rate": 1e-3, "fcpts_steps": 4}
    values = {key: value for key, value in recipe.items() if key not in ("allocation", "output_importance")} | learned
    codes, log = prune({**values, "output_dir": tmp_path / "whole"}, tmp_path)
    assert codes == [0], log
    values["output_dir"] = tmp_path / "out"
    for place in ("once the dense model was measured", "once the plan was made"):
        codes, log = prune({**values, "time_limit": "0.001"}, tmp_path)
        assert codes == [STOPPED] and place in log, log
    codes, log = prune(values, tmp_path)
    assert codes == [0], log
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert report["displacement"]["changed"] > 0.9


OTHER_WALKS = {
    "units, by text": {
        "method": "intra_fusion", "sparsity": 0.5, "fusion": "ot+refit", "importance": "taylor",
        "units": "[mlp, depth]", "budget": "[mlp=0.3, depth=0.7]", "reconstruct": "block", "reconstruct_passes": 1,
        "num_calibration_samples": 16,
    },
    "units, without text": {
        "method": "intra_fusion", "sparsity": 0.4, "fusion": "ot", "layout": "pad", "allocation": "erk"
    },
    "neurons reordered": {"method": "wanda", "pattern": "2:4", "channel_permutation": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_WALKS)
def test_other_walks_are_killed_and_go_on(case: str, recipe: dict, tmp_path: Path) -> None:
    gone = ("allocation", "output_importance")
    values = {key: value for key, value in recipe.items() if key not in gone} | OTHER_WALKS[case]
    (tmp_path / "whole").mkdir()
    codes, log = prune({**values, "output_dir": tmp_path / "whole" / "out"}, tmp_path)
    assert codes == [0], log
    cut_values = {**values, "output_dir": tmp_path / "out"}
    # When the second block is written, before the next manifest counts, and at the very end.
    cuts = (Cut("open", "block_0001"), Cut("os.rename", "manifest.json"), Cut("open", "hf_prune_recipe.yaml"))
    for cut in cuts[::2] if case == "units, by text" else cuts[:1]:
        codes, log = prune(cut_values, tmp_path, cut=cut)
        assert codes == [KILLED] and not (tmp_path / "out").exists(), (cut, log)
    codes, log = prune({**cut_values, "time_limit": "1h"}, tmp_path)
    assert codes == [0] and "Going on with block" in log, log
    folders = (tmp_path / "whole" / "out", tmp_path / "out")
    for name in ("model.safetensors", "config.json", "prune_plan.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    reports = [json.loads((folder / "prune_report.json").read_text()) for folder in folders]
    for report in reports:
        report.get("structure", {}).pop("solver_seconds", None)
        for own in report["reconstruction"]:
            del own["seconds"]
    for key in ("structure", "views", "reconstruction", "forward_passes"):
        assert reports[0].get(key) == reports[1].get(key), key
    assert (case == "units, by text") == bool(reports[0].get("structure", {}).get("removed_blocks"))


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(recipe: dict, tmp_path: Path) -> None:
    values = {
        **recipe, "allocation": "uniform", "output_importance": "none", "pattern": "2:4", "channel_permutation": True,
        "reconstruct": "block", "reconstruct_passes": 1, "reconstruct_target": "model",
    }  # fmt: skip
    (tmp_path / "whole").mkdir()
    codes, log = prune({**values, "output_dir": tmp_path / "whole" / "out"}, tmp_path, world=2)
    assert codes == [0, 0], log
    cut_values = {**values, "output_dir": tmp_path / "out"}
    for cut in (Cut("os.rename", "inputs_0002", 1, "half", rank=1), Cut("os.rename", "manifest.json", 2)):
        codes, log = prune(cut_values, tmp_path, world=2, cut=cut)
        # The one that is left says so, in a sentence, and goes as well.
        assert codes[cut.rank] in (KILLED, TOO_LARGE) and codes[1 - cut.rank] == 1, (codes, log)
        assert "another process of this run is gone" in log and "Traceback" not in log, log
    # A signal may come to any of them: both stop behind the same block.
    codes, log = prune(cut_values, tmp_path, world=2, cut=Cut("open", "inputs_0002", 1, "term", rank=1))
    assert codes == [STOPPED, STOPPED] and "stopped by SIGTERM behind block 2" in log, log
    codes, log = prune(cut_values, tmp_path, world=2)
    assert codes == [0, 0] and "Going on with block 3" in log, log
    assert made(tmp_path / "out") == made(tmp_path / "whole" / "out")


@pytest.mark.slow
def test_a_run_stops_between_blocks_and_goes_on_the_next_night(
    recipe: dict, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    values = {**recipe, "output_dir": tmp_path / "out"}
    # Every session does one step at least, however little time it has.
    places = ("once the dense model was measured", "once the plan was made", "behind block 0", "behind block 1")
    for place in (*places, "behind block 2"):
        codes, log = prune({**values, "time_limit": "0.001"}, tmp_path)
        assert codes == [STOPPED] and f"stopped by time_limit 0.001 {place}" in log, log
    whole = load(uncut["model.safetensors"])
    for block in range(3):
        kept = load_file(tmp_path / "out.pruning" / f"block_{block:04}.safetensors")
        assert len(kept) == 9
        assert all(torch.equal(whole[f"model.layers.{block}.{name}"], kept[name]) for name in kept)


@pytest.mark.slow
def test_a_run_stops_at_a_time_of_day(recipe: dict, uncut: dict[str, bytes], tmp_path: Path) -> None:
    values = {**recipe, "output_dir": tmp_path / "out", "deadline": "06:00"}
    codes, log = prune(values, tmp_path, cut=Cut("os.rename", "fisher_factors", 1, "dawn"))
    assert codes == [STOPPED] and "stopped by deadline 06:00 once the plan was made" in log, log
    del values["deadline"]
    codes, log = prune(values, tmp_path)
    assert codes == [0] and made(tmp_path / "out") == uncut, log


@pytest.mark.slow
def test_sigterm_lets_the_block_be_finished(recipe: dict, tmp_path: Path) -> None:
    values = {**recipe, "output_dir": tmp_path / "out", "checkpoint_every": 100}
    # While the plan is kept: the signal is seen there. While the first block would not have been saved: it is.
    codes, log = prune(values, tmp_path, cut=Cut("os.rename", "fisher_factors", 1, "term"))
    assert codes == [STOPPED] and "stopped by SIGTERM" in log, log
    codes, log = prune({**values, "checkpoint_every": 1}, tmp_path, cut=Cut("open", "block_0001", 1, "term"))
    assert codes == [STOPPED] and "stopped by SIGTERM behind block 2" in log, log
    # While the finished folder takes its name: too late, there is nothing to go on with.
    codes, log = prune(values, tmp_path, cut=Cut("os.rename", "out", 1, "term"))
    assert codes == [0] and not (tmp_path / "out.pruning").exists(), log


@pytest.mark.slow
def test_sigterm_to_a_whole_job_stops_several_processes_behind_a_block(recipe: dict, tmp_path: Path) -> None:
    values = {**recipe, "output_dir": tmp_path / "out", "num_processes": 2, "num_calibration_samples": 400}
    command = [sys.executable, "-m", "hf_prune", "prune", *[f"--{key}={value}" for key, value in values.items()]]
    environment = {**os.environ, "HF_PRUNE_QUIET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **options, start_new_session=True) as launcher:
        while launcher.poll() is None and not (tmp_path / "out.pruning" / "block_0000.safetensors").exists():
            time.sleep(0.01)
        # As `timeout` signals its child and then all of the group, and a batch system each process there is.
        job = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        assert len(job) == 4
        os.killpg(launcher.pid, signal.SIGTERM)
        for process in job:
            process.send_signal(signal.SIGTERM)
        log = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == STOPPED and "stopped by SIGTERM behind block" in log, log
    assert "Traceback" not in log, log
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0 and "Going on with block" in done.stdout, done.stdout


@pytest.mark.slow
def test_what_changed_under_an_unfinished_run_is_named(recipe: dict, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(recipe["dataset_name"], text)
    statistics = tmp_path / "statistics"
    values = stopped_early(recipe, tmp_path, dataset_name=text, propagate=False, statistics_folder=statistics)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out.pruning").iterdir()}

    def refused(said: str, threads: int | None = None, **changes: object) -> None:
        codes, log = prune({**values, **changes}, tmp_path, threads=threads)
        assert codes == [2] and re.search(said, log) and len(log.strip().splitlines()) == 1, log
        after = {file.name: file.read_bytes() for file in (tmp_path / "out.pruning").iterdir()}
        assert all(after[name] == content for name, content in before.items() if name != "lock")

    weights = tmp_path / "model" / "model.safetensors"
    for damage, said in (
        (lambda whole: whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:], r"weight model\.\S+ is not what it was;"),
        (lambda whole: whole[:-100], r"model\.safetensors"),
    ):
        whole = weights.read_bytes()
        weights.write_bytes(damage(whole))
        refused(said)
        weights.write_bytes(whole)
    config = tmp_path / "model" / "config.json"
    said = config.read_text()
    config.write_text(json.dumps({**json.loads(said), "rms_norm_eps": 1e-3}))
    refused("config is not what it was")
    config.write_text(said)
    block = tmp_path / "out.pruning" / "block_0000.safetensors"
    block.write_bytes(before[block.name][:-4])
    codes, log = prune(values, tmp_path)
    assert codes == [2] and "block_0000.safetensors is damaged or gone" in log, log
    block.write_bytes(before[block.name])
    refused(r"sparsity was 0\.5 and is 0\.6", sparsity=0.6)
    refused("num_calibration_samples was 40 and is 41", num_calibration_samples=41)
    refused(r'statistics_folder was ".*/statistics" and is ".*/other"', statistics_folder=tmp_path / "other")
    threads = torch.get_num_threads() + 2
    refused(rf"threads per process \(OMP_NUM_THREADS\) was \d+ and is {threads}; put that back", threads)
    lock = hold(tmp_path / "out.pruning" / "lock", before["lock"].decode())
    refused(r"process \d+ on .* is making it already")
    assert lock is not None
    lock.close()
    text.write_text(text.read_text().replace("foxes", "hares"))
    refused("calibration windows is not what it was")
    codes, log = prune({**values, "sparsity": 0.6, "restart": True}, tmp_path)
    assert codes == [STOPPED] and "once the dense model was measured" in log, log


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(recipe: dict, uncut: dict[str, bytes], small_disk, tmp_path: Path) -> None:
    with small_disk("20m") as disk:
        values = {**recipe, "output_dir": disk / "out"}
        codes, log = prune(values, tmp_path, cut=Cut("open", "block_0001", 1, "fill"))
        assert codes == [1] and "the disk is full" in log and "Traceback" not in log, log
        assert sorted(entry.name for entry in disk.iterdir()) == ["filler", "out.pruning"]
        assert not list((disk / "out.pruning").glob("*.part"))
        (disk / "filler").unlink()
        codes, log = prune(values, tmp_path)
        assert codes == [0] and "Going on with block 1" in log, log
        assert made(disk / "out") == uncut


@pytest.mark.slow
def test_a_disk_that_is_read_only_for_a_while(
    recipe: dict, uncut: dict[str, bytes], small_disk, tmp_path: Path
) -> None:
    with small_disk("20m") as disk:
        values = {**recipe, "output_dir": disk / "out"}
        for _ in range(3):
            codes, log = prune({**values, "time_limit": "0.001"}, tmp_path)
            assert codes == [STOPPED], log
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = {file.name: file.read_bytes() for file in (disk / "out.pruning").iterdir()}
        codes, log = prune(values, tmp_path)
        assert codes == [2] and "Read-only file system" in log and len(log.strip().splitlines()) == 1, log
        assert {file.name: file.read_bytes() for file in (disk / "out.pruning").iterdir()} == before
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        codes, log = prune(values, tmp_path)
        assert codes == [0] and "Going on with block 1" in log, log
        assert made(disk / "out") == uncut
