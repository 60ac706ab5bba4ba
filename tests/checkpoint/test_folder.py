"""The output folder is complete or absent, and what stood there is never damaged: real disks, modes and signals."""

import gc
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import hf_prune
from hf_prune.checkpoint.folder import check_free_space, check_output_folder, clear_leftovers, output_folder
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import BadInputError, RunError

NOBODY = 65534


def content(folder: Path) -> dict[str, bytes]:
    """Every file and its bytes, hidden ones included."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier output."""
    folder = tmp_path / "out"
    (folder / "plots").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "plots" / "old.png").write_bytes(b"old")
    return folder


def test_a_new_folder_appears_whole_with_its_parents(tmp_path):
    target = tmp_path / "runs" / "one" / "out"
    with output_folder(target) as partial:
        assert partial.parent == target.parent and partial.name.startswith(".out.partial-")
        (partial / "plots").mkdir()
        (partial / "plots" / "a.png").write_bytes(b"a")
        assert not target.exists()
    assert content(tmp_path) == {"runs/one/out/plots/a.png": b"a"}


def test_overwriting_replaces_everything_and_leaves_nothing_beside(old):
    with output_folder(old, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
        assert content(old) == {"config.json": b"{}", "plots/old.png": b"old"}
    assert content(old.parent) == {"out/config.json": b"new"}


def test_an_empty_folder_may_be_filled_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("new")
    assert content(tmp_path) == {"out/config.json": b"new"}


def test_a_link_is_followed(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with output_folder(link, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert link.is_symlink() and content(old) == {"config.json": b"new"}


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("existing", [True, False])
def test_any_exception_leaves_what_was_there(old, error, existing):
    if not existing:
        shutil.rmtree(old)
    before = content(old.parent)
    with pytest.raises(type(error)), output_folder(old, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
        raise error
    assert content(old.parent) == before and not list(old.parent.glob(".out*"))


def test_the_old_folder_comes_back_when_the_last_rename_fails(old, monkeypatch):
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    before = content(old.parent)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), output_folder(old, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert content(old.parent) == before and not list(old.parent.glob(".out*"))


def test_a_killed_run_leaves_what_was_there(old):
    script = (
        "import sys, time\nfrom hf_prune.checkpoint.folder import output_folder\n"
        "with output_folder(sys.argv[1], overwrite=True) as partial:\n"
        "    (partial / 'config.json').write_text('half')\n    print('busy', flush=True)\n    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(hf_prune.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(old)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "busy\n"
    clear_leftovers(old)
    assert len(list(old.parent.iterdir())) == 2, "it is at it still"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert content(old) == {"config.json": b"{}", "plots/old.png": b"old"}
    with output_folder(old, overwrite=True) as partial:  # the remains are in nobody's way
        (partial / "config.json").write_text("new")
    assert content(old) == {"config.json": b"new"}
    assert len(list(old.parent.iterdir())) == 2
    # A killed run whose remains stand where the folder stood, and then beside it.
    old.rename(old.with_name(".out.replaced-1"))
    clear_leftovers(old)
    assert content(old.parent) == {"out/config.json": b"new"}
    shutil.copytree(old, old.with_name(".out.replaced-2"))
    clear_leftovers(old)
    assert content(old.parent) == {"out/config.json": b"new"}
    # Or where somebody has made an empty folder since.
    old.rename(old.with_name(".out.replaced-3"))
    old.mkdir()
    clear_leftovers(old)
    assert content(old.parent) == {"out/config.json": b"new"}


def test_an_interrupt_after_the_old_folder_was_moved_brings_it_back(old, monkeypatch):
    rename, before = Path.rename, content(old.parent)

    def interrupted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if ".replaced-" in target.name:
            signal.raise_signal(signal.SIGINT)
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    # Whoever runs tests in the background of a shell has them ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), output_folder(old, overwrite=True) as partial:
            (partial / "config.json").write_text("new")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert content(old.parent) == before


def test_files_are_readable_as_the_umask_says(tmp_path):
    previous = os.umask(0o027)
    try:
        with output_folder(tmp_path / "out") as partial:
            (partial / "model.safetensors").write_bytes(b"w")
            (partial / "model.safetensors").chmod(0o600)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_never_replaced(old, overwrite, small_disk, monkeypatch):
    (old / "config.json").unlink()
    with pytest.raises(BadInputError, match="exists and is not empty" if not overwrite else "no config.json"):
        check_output_folder(old, overwrite)
    with pytest.raises(BadInputError, match="is a file"):
        check_output_folder(old / "plots" / "old.png", overwrite)
    with pytest.raises(BadInputError, match="not writable"):
        check_output_folder(old / "plots" / "old.png" / "below", overwrite)
    with pytest.raises(BadInputError, match="home folder"):
        check_output_folder("~", overwrite)
    (old / "config.json").write_text("{}")
    monkeypatch.chdir(old / "plots")
    with pytest.raises(BadInputError, match="current folder"):
        check_output_folder("..", overwrite)
    with small_disk("64k") as disk, pytest.raises(BadInputError, match="mount point"):
        check_output_folder(disk, overwrite)


def test_the_early_check_creates_nothing(tmp_path):
    assert check_output_folder(tmp_path / "a" / "b") == (tmp_path / "a" / "b").resolve()
    assert not list(tmp_path.iterdir())


def test_a_read_only_disk_is_refused_early(small_disk):
    with small_disk("64k", "ro") as disk, pytest.raises(BadInputError, match=r"output_dir: .*not writable.*Read-only"):
        check_output_folder(disk / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_forbidden_folder_is_refused_early_and_late(tmp_path):
    public = Path(tempfile.mkdtemp(dir="/tmp"))
    public.chmod(0o755)
    owned = public / "owned"
    owned.mkdir()
    os.chown(owned, NOBODY, NOBODY)
    try:
        os.seteuid(NOBODY)
        with pytest.raises(BadInputError, match=r"not writable.*Permission denied"):
            check_output_folder(public / "out")
        with pytest.raises(BadInputError, match="not permitted"), output_folder(owned / "out") as partial:
            partial.chmod(0o555)
            (partial / "config.json").write_text("new")
        # A calibration file that cannot be read is another matter.
        with pytest.raises(PermissionError), output_folder(owned / "out"):
            list(Path("/root").iterdir())
    finally:
        os.seteuid(0)
        shutil.rmtree(public)


def _fill_python(folder: Path) -> None:
    (folder / "card.md").write_bytes(bytes(1_000_000))


def _fill_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(250_000)}, folder / "model.safetensors")


def _fill_tokenizers(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(i): i for i in range(50_000)}, unk_token="0")).save(str(folder / "tokenizer.json"))


def _fill_torch(folder: Path) -> None:
    import torch

    torch.save({"state": torch.randn(1_000_000)}, folder / "optimizer.pt")


def _fill_copies(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as source:
        (Path(source) / "large").write_bytes(os.urandom(1_000_000))
        shutil.copytree(source, folder / "copy")


@pytest.mark.parametrize("fill", [_fill_python, _fill_safetensors, _fill_tokenizers, _fill_torch, _fill_copies])
def test_a_full_disk_is_one_sentence_and_damages_nothing(small_disk, fill):
    with small_disk("256k") as disk:
        (disk / "out").mkdir()
        (disk / "out" / "config.json").write_text("old")
        with pytest.raises(RunError, match=r"out: the disk is full, .* free after .* written; .*output_dir"):
            with output_folder(disk / "out", overwrite=True) as partial:
                fill(partial)
        # The error keeps torch's writer, and that its file.
        gc.collect()
        assert content(disk) == {"out/config.json": b"old"}
        assert [entry.name for entry in disk.iterdir()] == ["out"]


def test_save_model_asks_for_room_first(small_disk, tiny_model):
    model = tiny_model("llama")
    with small_disk("64k") as disk:
        with pytest.raises(RunError, match=r"has 65.5 kB free and \d+.\d kB are needed"):
            with output_folder(disk / "out") as partial:
                save_model(model, None, partial)
        assert not list(disk.iterdir())
        check_free_space(disk / "not" / "yet", 65_536)
        with pytest.raises(RunError, match=r"65\.5 kB are needed"):
            check_free_space(disk / "not" / "yet", 65_537)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_model_writes_a_stock_folder(tmp_path, tiny_model, tiny_tokenizer, dtype):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model("llama", getattr(torch, dtype))
    model.generation_config.max_new_tokens = 7
    with output_folder(tmp_path / "out") as partial:
        save_model(model, tiny_tokenizer, partial)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth"))}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {model.dtype} and "lm_head.weight" not in stored
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == model.dtype and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 7
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items() if name in stored)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("naïve 50 %")["input_ids"] == tiny_tokenizer("naïve 50 %")["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
