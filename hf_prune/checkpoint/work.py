"""The working folder of an unfinished run: files that are written once, and a manifest that says which of them count.

The manifest is replaced last, so that a process that dies at any moment leaves the state before or the state after.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hf_prune.checkpoint.files import file_digest, replaced, write_whole
from hf_prune.checkpoint.folder import explained_disk_errors
from hf_prune.checkpoint.lock import hold, is_held
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError, Stopped

MANIFEST, LOCK = "manifest.json", "lock"
# The digest of what tells the finished folder from any other, from just before that takes its name.
RESULT = "result"
VERSION = 2
SCRATCH = "scratch"


class WorkFolder:
    """What is kept of a run until it is finished. Several processes share the folder; the main one holds its lock.

    Attributes:
        path: of the folder.
        entries: what the manifest says, as plain JSON values.
        files: name -> bytes and digest of each file that counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self._identity: dict[str, Any] = {}
        self._locked: IO[str] | None = None

    @property
    def scratch(self) -> Path:
        """For files that the manifest does not speak of: whoever puts them there knows them from other runs'."""
        return self.path / SCRATCH

    @classmethod
    @contextmanager
    def opened(cls, path: Path, restart: bool = False) -> Iterator[WorkFolder]:
        """The folder, locked; made where it is missing, and removed where nothing has been kept in it by the end.

        Args:
            restart: throw away what an earlier run has kept.

        Raises:
            BadInputError: another process is at it, or its manifest is damaged.
            RunError: the disk is full.
        """
        work = cls(path)
        processes = distributed.gather(os.getpid())
        distributed.all_or_none(lambda: work._lock(processes, restart) if distributed.rank() == 0 else None)
        try:
            work._read()
            yield work
        except BaseException as error:
            # Whoever started this process looks at the folder to see that it was asked to stop.
            if not isinstance(error, Stopped) and not (path / MANIFEST).exists() and not work.scratch.exists():
                work.discard()
            raise
        finally:
            if work._locked is not None:
                work._locked.close()

    def _lock(self, processes: list[int], restart: bool) -> None:
        with explained_disk_errors(self.path, self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            about = {"host": platform.node(), "processes": processes}
            self._locked = hold(self.path / LOCK, json.dumps(about))
            if self._locked is None:
                raise BadInputError(f"output_dir: {_holder(self.path)} is making it already; wait for it, or end it.")
            if restart:
                (self.path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.scratch, ignore_errors=True)

    def _read(self) -> None:
        """Take over what the manifest says, and remove what it does not speak of."""
        file = self.path / MANIFEST
        if file.is_file():
            try:
                manifest = json.loads(file.read_text(encoding="utf-8"))
                if manifest["version"] != VERSION:
                    raise ValueError("of another release")
                self.entries, self.files = manifest["entries"], manifest["files"]
            except (OSError, ValueError, KeyError, TypeError):
                raise BadInputError(
                    f"output_dir: {file} is damaged or of another release; throw the unfinished run away with "
                    "restart: true."
                ) from None
        if distributed.rank() == 0:
            for file in self.path.iterdir():
                if file.name not in (LOCK, MANIFEST, SCRATCH, *self.files):
                    file.unlink()
        # No process writes here before that is done.
        distributed.barrier()

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Say what the run is made of; it is kept from the next `save` on.

        Raises:
            BadInputError: what is kept is of a run that differs, and in what.
        """
        mine = json.loads(json.dumps(identity, default=str))
        before = self.entries.get("identity")
        if before is None:
            self._identity = mine
            return
        different = [key for key in {**before, **mine} if before.get(key) != mine.get(key)]
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise BadInputError(
                f"output_dir: {self.path} holds an unfinished run that differs from this one: "
                f"{difference(key, before.get(key), mine.get(key))}{more}; put that back, choose another output_dir, "
                "or throw the unfinished run away with restart: true."
            )
        self._identity = before

    def save(
        self,
        entries: Mapping[str, Any],
        files: Mapping[str, Callable[[Path], None]] | None = None,
        drop: Collection[str] = (),
    ) -> None:
        """Keep entries and files, all or none of them.

        Args:
            entries: by name, what JSON can hold; the main process's count.
            files: by name, what writes the file at the path that it is handed; every process's own.
            drop: files that no longer count afterwards, every process's own.

        Raises:
            BadInputError: writing is forbidden.
            RunError: the disk is full.
        """

        def write() -> tuple[dict[str, dict[str, Any]], list[str]]:
            written = {}
            with explained_disk_errors(self.path, self.path):
                for name, put in (files or {}).items():
                    with replaced(self.path / name) as part:
                        put(part)
                    written[name] = self._describe(name)
            return written, list(drop)

        before = self.files
        for written, dropped in distributed.all_or_none(write):
            self.files = {name: file for name, file in self.files.items() if name not in dropped} | written
        self.entries = {"identity": self._identity, **self.entries, **entries}
        manifest = {"version": VERSION, "entries": self.entries, "files": self.files}

        def swap() -> None:
            if distributed.rank() == 0:
                with explained_disk_errors(self.path, self.path):
                    write_whole(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")

        distributed.all_or_none(swap)
        if distributed.rank() == 0:
            # These alone: the other processes may be writing already what comes next.
            for name in before.keys() - self.files.keys():
                (self.path / name).unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """A kept file.

        Raises:
            BadInputError: it is not what was written.
        """
        path = self.path / name
        if not path.is_file() or self._describe(name) != self.files.get(name):
            raise BadInputError(
                f"output_dir: {path} is damaged or gone; put it back as it was, or throw the unfinished run away with "
                "restart: true."
            )
        return path

    def _describe(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return {"bytes": path.stat().st_size, "xxh3": file_digest(path)}

    def discard(self) -> None:
        """Remove the folder: the run is finished, or has kept nothing."""
        if distributed.rank() == 0:
            # First, so that no half of it counts.
            (self.path / MANIFEST).unlink(missing_ok=True)
            # And the result last, so that a death in between leaves what can be told.
            shutil.rmtree(self.scratch, ignore_errors=True)
            for file in list(self.path.iterdir()) if self.path.is_dir() else ():
                if file.name not in (LOCK, RESULT, SCRATCH):
                    with suppress(OSError):
                        file.unlink()
            shutil.rmtree(self.path, ignore_errors=True)

    def expect_result(self, file: Path) -> None:
        """Say what the finished folder will be known by; the main process alone calls it."""
        write_whole(self.path / RESULT, file_digest(file))

    @classmethod
    @contextmanager
    def left_behind(cls, path: Path, file: Path) -> Iterator[WorkFolder | None]:
        """The working folder of a run that died once its result had its name, locked; None where there is none.

        Args:
            file: what the result is known by.
        """
        work = cls(path)
        # Whoever is at it may be just about to remove the folder.
        with suppress(FileNotFoundError):
            if file.is_file() and (path / RESULT).read_text(encoding="utf-8") == file_digest(file):
                work._locked = hold(path / LOCK)
        try:
            yield work if work._locked is not None else None
        finally:
            if work._locked is not None:
                work._locked.close()


def holders(path: Path) -> list[int]:
    """Numbers of the processes on this machine that are at a working folder, the main one first; none where none is."""
    if not is_held(path / LOCK):
        return []
    try:
        about = json.loads((path / LOCK).read_text(encoding="utf-8"))
        return list(about["processes"]) if about["host"] == platform.node() else []
    except (OSError, ValueError, KeyError):
        return []


def _holder(path: Path) -> str:
    try:
        about = json.loads((path / LOCK).read_text(encoding="utf-8"))
        return f"process {about['processes'][0]} on {about['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def difference(key: str, before: Any, now: Any) -> str:
    if any(re.fullmatch("[0-9a-f]{32}", str(value)) for value in (before, now)):
        return f"{key} is not what it was"
    return f"{key} was {json.dumps(before)} and is {json.dumps(now)}"
