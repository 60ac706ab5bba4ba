"""Locks on files, which the system lets go of however a process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hf_prune.errors import BadInputError

# Seconds; `is_held` takes a lock for an instant.
_PATIENCE, _PAUSE = 0.1, 0.02


def hold(file: Path, about: str = "") -> IO[str] | None:
    """Lock a file, made where it is missing, for as long as what is returned stays open; None where it is taken.

    Args:
        about: what the file says of its holder.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        stream = file.open("a+", encoding="utf-8")
        try:
            _lock(stream)
            # Its last holder may have removed the file since it was opened: that lock would keep nobody out.
            mine, there = os.fstat(stream.fileno()), file.stat()
        except BlockingIOError:
            stream.close()
            if time.monotonic() >= end:
                return None
            time.sleep(_PAUSE)
            continue
        except FileNotFoundError:
            stream.close()
            continue
        if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
            stream.truncate(0)
            stream.write(about)
            stream.flush()
            return stream
        stream.close()


def _lock(stream: IO[str]) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        # Where a file system has no locks nobody can be kept out.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


@contextmanager
def held(file: Path, refusal: str) -> Iterator[None]:
    """Inside, a file made for the purpose is locked; afterwards it is gone.

    Raises:
        BadInputError: somebody else holds it; with `refusal`.
    """
    stream = hold(file)
    if stream is None:
        raise BadInputError(refusal)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


@contextmanager
def taking_turns(file: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same file; waits for its turn, and leaves the file there."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether a process, this one included, holds the lock of a file or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # Not all file systems lock folders.
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def busy(folder: Path) -> Iterator[None]:
    """Inside, a folder is held, under whatever name, where its file system locks folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
