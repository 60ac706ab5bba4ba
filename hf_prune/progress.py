"""Progress bars with an estimate of what is left, shown by the main process alone."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def is_main_process() -> bool:
    """True on rank 0 and outside of any launcher (torchrun and accelerate both export RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a bar on the main process; silent on every other rank and when HF_PRUNE_QUIET is set."""
    quiet = not is_main_process() or bool(os.environ.get("HF_PRUNE_QUIET"))
    return iter(tqdm(iterable, desc=description, total=total, disable=quiet, dynamic_ncols=True))
