"""The output folder: complete or absent. Everything is written to a hidden sibling, which takes the name at the end."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_prune.checkpoint.lock import busy, is_held
from hf_prune.errors import BadInputError, HfPruneError, RunError

# What hf_prune writes beside the stock files.
RECIPE_FILE, PLAN_FILE, REPORT_FILE = "hf_prune_recipe.yaml", "prune_plan.json", "prune_report.json"
# And of each training behind the pruning, numbered where there are several.
RECOVERY_FILE = "hf_prune_recovery{}.yaml"
# Of the folder beside an output folder where loggers write.
LOGS = ".runs"
# What tells a model's folder from any other.
MODEL_MARK = "config.json"
# The hidden siblings: a folder that is being made, and one that is being replaced.
_PARTIAL, _REPLACED = ".partial-", ".replaced-"
logger = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EDQUOT}
# Bytes, of which a file has many more.
_TOO_LITTLE = 1 << 20
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_output_folder(path: str | os.PathLike[str], overwrite: bool = False, mark: str = MODEL_MARK) -> Path:
    """Early check that `path` can become the output folder; nothing is created.

    Returns the absolute path with symbolic links followed. An empty folder may always be filled. With `overwrite` a
    folder that holds the file `mark` may be replaced, and no other: a mistyped output_dir must not cost a home.

    Raises BadInputError where `path` is a file, is in the way, cannot be replaced, or where its parent is not writable.
    """
    target = Path(path).expanduser().resolve()
    if target.exists():
        _check_replaceable(target, overwrite, mark)
    parent = next(folder for folder in target.parents if folder.exists())
    try:
        # Trying is the only reliable question: os.access knows nothing of quotas and says yes to root too often.
        tried = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=parent))
        # Whoever clears leftovers away may be first.
        with suppress(FileNotFoundError):
            tried.rmdir()
    except OSError as error:
        raise BadInputError(
            f"output_dir: cannot create {target} because {parent} is not writable ({error.strerror}); "
            "choose another folder."
        ) from error
    return target


def _check_replaceable(target: Path, overwrite: bool, mark: str) -> None:
    if not target.is_dir():
        raise BadInputError(f"output_dir: {target} is a file; name a folder.")
    if target.is_mount() or target == Path.home() or Path.cwd().is_relative_to(target):
        raise BadInputError(
            f"output_dir: {target} is a mount point, the home folder or the current folder, "
            "which cannot be replaced as a whole; name a folder inside it."
        )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise BadInputError(
            f"output_dir: {target} exists and is not empty; "
            "choose another folder or set overwrite_output_dir to replace it."
        )
    if not (target / mark).is_file():
        kind = "is no model folder" if mark == MODEL_MARK else "is none of these"
        raise BadInputError(
            f"output_dir: {target} holds no {mark}, so it {kind} and is not replaced "
            "even with overwrite_output_dir; choose another folder."
        )


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def check_free_space(folder: Path, needed: int) -> None:
    """Raise RunError where the disk of `folder`, which need not exist yet, has fewer than `needed` bytes free."""
    free = free_space(folder)
    if free < needed:
        raise RunError(
            f"{_existing(folder)}: the disk has {_size(free)} free and {_size(needed)} are needed; "
            "free some space or choose another output_dir."
        )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


@contextmanager
def output_folder(path: str | os.PathLike[str], overwrite: bool = False, mark: str = MODEL_MARK) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`, and give it the name `path` once the body has succeeded.

    On any exception, an interrupt included, the temporary folder is removed and what stood at `path` still stands.
    An existing folder is moved aside before the new one takes its name, and removed only afterwards.

    Raises BadInputError as `check_output_folder` does or where writing is forbidden, RunError where the disk is full.
    """
    target = check_output_folder(path, overwrite, mark)
    for leftover in _siblings(target, _PARTIAL):
        logger.warning("%s belongs to a run that is still busy or was killed; delete it if none is running", leftover)
    for aside in _siblings(target, _REPLACED):
        logger.warning("%s stood at %s before a run that was killed; rename it back, or delete it", aside, target)
    # Not mkdtemp: its mode is 0700, and a plain mkdir lets the kernel apply the umask.
    partial = target.parent / f".{target.name}{_PARTIAL}{secrets.token_hex(4)}"
    try:
        with explained_disk_errors(partial, target):
            partial.mkdir(parents=True)
            with busy(partial):
                yield partial
                _settle(partial)
                check_output_folder(target, overwrite, mark)
                _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def explained_disk_errors(partial: Path, target: Path) -> Iterator[None]:
    """One sentence for what the disk refuses while `partial` is filled, which is to become `target`.

    Raises BadInputError where writing is forbidden, RunError where the disk is full.
    """
    try:
        yield
    except Exception as error:
        translated = _disk_error(error, partial, target)
        if translated is None:
            raise
        raise translated from error


def beside(path: str | os.PathLike[str], suffix: str) -> Path:
    """The folder that stands beside an output folder under its name with a suffix: `out` -> `/absolute/out.rounds`."""
    target = Path(path).expanduser().resolve()
    return target.with_name(target.name + suffix)


def _settle(folder: Path) -> None:
    """Files readable as the umask says (safetensors are created 0600), and on the disk before the old ones go."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as stream:
                os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    aside = target.parent / f".{target.name}{_REPLACED}{secrets.token_hex(4)}"
    placed = False
    try:
        target.rename(aside)
        partial.rename(target)
        placed = True
    finally:
        _settle_replaced(aside, target, placed)


def _settle_replaced(aside: Path, target: Path, placed: bool) -> None:
    """What was moved aside comes back where nothing has its name, and goes where what replaces it has."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if aside.exists() and not target.exists():
        aside.rename(target)
    elif placed:
        shutil.rmtree(aside, ignore_errors=True)


def _siblings(target: Path, kind: str) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}{kind}*"))


def clear_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what runs that were killed have left half done of `path`, and bring back what they were replacing."""
    target = Path(path).expanduser().resolve()
    for aside in _siblings(target, _REPLACED):
        _settle_replaced(aside, target, placed=(target / MODEL_MARK).is_file())
    for partial in _siblings(target, _PARTIAL):
        if not is_held(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _disk_error(error: Exception, partial: Path, target: Path) -> HfPruneError | None:
    """One sentence for a full or forbidden disk, None for every other error and for files elsewhere."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        # What copying a folder ran into: from, to, and the words of each error.
        full = [to for _, to, why in error.args[0] if f"[Errno {errno.ENOSPC}]" in str(why)]
        code = errno.ENOSPC if any(Path(to).is_relative_to(target.parent) for to in full) else None
    elif isinstance(error, OSError):
        code = error.errno
        if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(target.parent):
            return None
    elif "inline_container" in str(error):
        # torch.save says no more than that writing failed.
        code = errno.ENOSPC if free_space(partial) < _TOO_LITTLE else None
    else:
        # safetensors and tokenizers are written in Rust and report the errno inside their message.
        match = re.search(r"\(os error (\d+)\)", str(error))
        code = int(match[1]) if match else None
    if code in FULL:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        return RunError(
            f"{target}: the disk is full, {_size(free_space(partial))} free after {_size(written)} written; "
            "free some space or choose another output_dir (nothing was changed)."
        )
    if code in FORBIDDEN:
        return BadInputError(
            f"output_dir: writing {target} is not permitted ({os.strerror(code)}); choose another folder."
        )
    return None


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
