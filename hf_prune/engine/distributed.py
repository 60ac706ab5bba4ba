"""Several processes, one model each: who am I, add up, hand out. Every function is a no-op with one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from hf_prune.errors import RunError

Result = TypeVar("Result")
# While one process solves or writes the others wait, which backends end after 10 or 30 minutes. A process that dies is
# noticed at once all the same, by its connections or by the launcher.
LONGEST_WAIT = timedelta(hours=6)


def initialise(device: str = "auto") -> None:
    """Join the process group that `accelerate launch` or torchrun prepared, once; gloo where `device` is the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_distributed():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=LONGEST_WAIT)


def is_distributed() -> bool:
    """Whether several processes work together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and world_size() > 1


def rank() -> int:
    """This process's index."""
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def local_rank() -> int:
    """This process's index on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _all_there() -> Iterator[None]:
    """One sentence for what a backend says where a process has died, or its machine."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"process {rank()}: another process of this run is gone; look for what it said, and start the run again."
        ) from error


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        with _all_there():
            torch.distributed.barrier()


def _on_backend(tensor: Tensor) -> Tensor:
    # NCCL speaks GPU memory only; gloo takes the CPU's.
    return tensor.cuda() if torch.distributed.get_backend() == "nccl" and tensor.device.type == "cpu" else tensor


def sum_at(tensor: Tensor, owner: int) -> None:
    """Sum over processes in place; only `owner` may rely on the result."""
    if is_distributed():
        moved = _on_backend(tensor)
        with _all_there():
            torch.distributed.reduce(moved, dst=owner)
        if moved is not tensor:
            tensor.copy_(moved)


def send_from(tensor: Tensor, owner: int) -> None:
    """Overwrite `tensor` everywhere with the owner's values, bit for bit."""
    if is_distributed():
        whole = _on_backend(tensor.contiguous())
        with _all_there():
            torch.distributed.broadcast(whole, src=owner)
        if whole is not tensor:
            tensor.copy_(whole)


def sum_everywhere(tensor: Tensor) -> None:
    """Sum over processes in place, with the same bits on each."""
    sum_at(tensor, 0)
    send_from(tensor, 0)


def gather(value: Any) -> list[Any]:
    """Every process's picklable value, by rank, everywhere (between our own processes, never from a file)."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    with _all_there():
        torch.distributed.all_gather_object(values, value)
    return values


def all_or_none(action: Callable[[], Result]) -> list[Result]:
    """What `action` returned on every process, by rank, everywhere.

    What one raises all raise: otherwise the others would go on, and wait for it.
    """
    outcome: Result | Exception
    try:
        outcome = action()
    except Exception as error:
        outcome = error
    outcomes = gather(outcome)
    for own in outcomes:
        if isinstance(own, Exception):
            raise own
    return outcomes
