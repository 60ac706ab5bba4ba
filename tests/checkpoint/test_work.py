"""The working folder: all or nothing, its own run's alone, and what a disk, a mode or a flipped bit does to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_prune
from hf_prune.checkpoint.files import file_digest, write_whole
from hf_prune.checkpoint.lock import hold, is_held
from hf_prune.checkpoint.work import VERSION, WorkFolder, holders
from hf_prune.errors import BadInputError, RunError, Stopped

IDENTITY = {"sparsity": 0.5, "weight embed": "0" * 32, "targets": ("q", "k")}


def put(content: bytes):
    return lambda path: path.write_bytes(content)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with one file and one entry."""
    with WorkFolder.opened(tmp_path / "work") as work:
        work.claim(IDENTITY)
        work.save({"walk": {"next": 1}}, {"block": put(b"weights")})
    return tmp_path / "work"


def test_entries_and_files_come_back_and_old_ones_go(kept: Path) -> None:
    with WorkFolder.opened(kept) as work:
        work.claim(IDENTITY)
        assert work.entries["walk"] == {"next": 1} and work.file("block").read_bytes() == b"weights"
        work.save({"walk": {"next": 2}}, {"inputs": put(b"states")}, drop=["block"])
    (kept / "half.part").write_bytes(b"of a process that was killed")
    with WorkFolder.opened(kept) as work:
        assert work.entries["walk"] == {"next": 2}
        assert sorted(file.name for file in kept.iterdir()) == ["inputs", "lock", "manifest.json"]
        work.discard()
    assert not kept.exists()
    # What fails behind it, a push say, is told as it is.
    with pytest.raises(ValueError, match="bad"), WorkFolder.opened(kept) as work:
        work.discard()
        raise ValueError("bad")


def test_a_folder_that_keeps_nothing_goes_away(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), WorkFolder.opened(tmp_path / "work"):
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())
    # Whoever started a process that was stopped sees it from the folder.
    with pytest.raises(Stopped), WorkFolder.opened(tmp_path / "work"):
        raise Stopped("later")
    assert (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity": 0.6}, "sparsity was 0.5 and is 0.6;"),
        ({"weight embed": "1" * 32}, "weight embed is not what it was;"),
        ({"targets": ["q"], "seed": 1}, r'targets was \["q", "k"\] and is \["q"\] \(and 1 more\);'),
    ],
)
def test_another_run_is_refused_by_name_and_may_be_thrown_away(kept: Path, change: dict, said: str) -> None:
    with pytest.raises(BadInputError, match=f"unfinished run that differs from this one: {said}.*restart"):
        with WorkFolder.opened(kept) as work:
            work.claim({**IDENTITY, **change})
    assert (kept / "block").read_bytes() == b"weights"
    with WorkFolder.opened(kept, restart=True) as work:
        work.claim({**IDENTITY, **change})
        assert not work.entries and not (kept / "block").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: None])
def test_a_damaged_file_is_named_and_nothing_is_lost(kept: Path, damage) -> None:
    whole = (kept / "block").read_bytes()
    broken = damage(whole)
    (kept / "block").unlink() if broken is None else (kept / "block").write_bytes(broken)
    with pytest.raises(BadInputError, match=r"work/block is damaged or gone"), WorkFolder.opened(kept) as work:
        work.file("block")
    (kept / "block").write_bytes(whole)
    with WorkFolder.opened(kept) as work:
        assert work.file("block").read_bytes() == whole


def test_a_damaged_manifest_is_no_reason_to_begin_anew(kept: Path) -> None:
    whole = (kept / "manifest.json").read_text()
    for broken in (whole[:-20], "{}", whole.replace(f'"version": {VERSION}', '"version": 99')):
        (kept / "manifest.json").write_text(broken)
        with pytest.raises(BadInputError, match=r"manifest.json is damaged or of another release"):
            with WorkFolder.opened(kept):
                pass
    (kept / "manifest.json").write_text(whole)
    with WorkFolder.opened(kept) as work:
        assert work.entries["walk"] == {"next": 1}


def test_a_second_start_is_refused_until_the_first_is_gone(kept: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom hf_prune.checkpoint.work import WorkFolder\n"
        "with WorkFolder.opened(Path(sys.argv[1])):\n    print('busy', flush=True)\n    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(hf_prune.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(kept)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "busy\n"
    assert holders(kept) == [child.pid]
    with pytest.raises(BadInputError, match=f"process {child.pid} on .* is making it already"):
        with WorkFolder.opened(kept, restart=True):
            pass
    assert (kept / "manifest.json").exists()
    child.kill()
    child.wait()
    assert holders(kept) == []
    with WorkFolder.opened(kept) as work:
        assert work.entries["walk"] == {"next": 1} and is_held(kept / "lock")


def test_a_lock_on_a_file_that_is_gone_keeps_nobody_out(tmp_path: Path) -> None:
    first = hold(tmp_path / "lock", "first")
    (tmp_path / "lock").unlink()
    second = hold(tmp_path / "lock", "second")
    assert second is not None and hold(tmp_path / "lock") is None
    assert (tmp_path / "lock").read_text() == "second"
    first.close()
    assert is_held(tmp_path / "lock")
    second.close()
    assert not is_held(tmp_path / "lock") and not is_held(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_state_before(small_disk) -> None:
    with small_disk("256k") as disk:
        with pytest.raises(RunError, match=r"work: the disk is full"), WorkFolder.opened(disk / "work") as work:
            work.claim(IDENTITY)
            work.save({"walk": {"next": 1}}, {"block": put(bytes(50_000))})
            work.save({"walk": {"next": 2}}, {"more": put(bytes(50_000)), "inputs": put(bytes(500_000))})
        with WorkFolder.opened(disk / "work") as work:
            assert work.entries["walk"] == {"next": 1} and work.file("block").stat().st_size == 50_000
            assert sorted(file.name for file in work.path.iterdir()) == ["block", "lock", "manifest.json"]
            # The cause is gone: there is room.
            work.save({"walk": {"next": 2}}, {"more": put(bytes(50_000))})


def test_a_read_only_folder_is_one_sentence_and_loses_nothing(kept: Path) -> None:
    done = subprocess.run(["mount", "--bind", str(kept), str(kept)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"bind mounts are not allowed here: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(kept)], check=True)
        with pytest.raises(BadInputError, match=r"output_dir: writing .*work is not permitted \(Read-only"):
            with WorkFolder.opened(kept):
                pass
    finally:
        subprocess.run(["umount", str(kept)], check=True)
    with WorkFolder.opened(kept) as work:
        assert work.entries["walk"] == {"next": 1} and work.file("block").read_bytes() == b"weights"


def test_whole_files(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "file.json", "first")
    assert (tmp_path / "new" / "file.json").read_text() == "first"
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "new" / "file.json", "\ud800")
    assert [(file.name, file.read_text()) for file in (tmp_path / "new").iterdir()] == [("file.json", "first")]
    # The reference of the published algorithm: XXH3-128 of nothing.
    (tmp_path / "empty").touch()
    assert file_digest(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
