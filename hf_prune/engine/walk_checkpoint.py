"""A walk's state between two blocks: pruned blocks, the inputs of the next one, and what became of each matrix.

Saving costs time that grows with the calibration set, so by default it waits until it is a twentieth of what was done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from hf_prune.checkpoint.work import WorkFolder
from hf_prune.engine import distributed
from hf_prune.engine.offload import at_work, in_turn, keep, offload_of
from hf_prune.engine.stopping import SIGNAL, StopRequest
from hf_prune.errors import Stopped

if TYPE_CHECKING:
    from hf_prune.engine.capture import BlockRunner
    from hf_prune.engine.stream import Stream

logger = logging.getLogger(__name__)
# Seconds of work for each second of saving.
_WORK_PER_SAVING = 19
_ENTRY = "walk"


class Outcome(Protocol):
    """What a walk has found so far, as JSON can hold it."""

    saving_seconds: float

    def to_dict(self) -> dict[str, Any]: ...

    def restore(self, values: dict[str, Any]) -> None: ...


class WalkCheckpoint:
    """Keeps a walk's state in a working folder and stops it where that is asked for; a context around the walk.

    `restore` comes first and `save` behind each block.

    Args:
        every: blocks between two saves; 0, as many as keep saving below 5 % of the time.
    """

    def __init__(self, work: WorkFolder, stop: StopRequest, every: int = 0) -> None:
        self.work = work
        self.stop = stop
        self.every = every
        self._exits = ExitStack()

    def __enter__(self) -> WalkCheckpoint:
        self._exits.enter_context(self.stop.deferred())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exits.__exit__(*exception)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What the last save kept of the result; None where there was none."""
        saved = self.work.entries.get(_ENTRY)
        return None if saved is None else dict(saved["result"])

    def restore(
        self,
        runner: BlockRunner,
        streams: Sequence[Stream],
        result: Outcome,
        blocks: Collection[int],
        resize: Callable[[int], None] | None = None,
        began: float | None = None,
    ) -> int:
        """Bring model, streams and result to where the last save left them; the index of the block that is next.

        Args:
            streams: what goes through the blocks; `save` keeps it as it is then, as it does `result`.
            blocks: those that the walk changes.
            resize: gives a block the sizes that it was saved with.
            began: when this session's work did, by `perf_counter`; now unless given.

        Raises:
            BadInputError: a file is not what was written.
        """
        self._runner, self._streams, self._result = runner, streams, result
        self._pruned, self._resize = frozenset(blocks), resize
        self._last = max(self._pruned)
        self._saved = self._block_began = perf_counter()
        self._began = self._saved if began is None else began
        self._unsaved: list[int] = []
        self._cost = self._longest = 0.0
        saved = self.work.entries.get(_ENTRY)
        if saved is None:
            return 0
        first = int(saved["next_block"])
        distributed.all_or_none(lambda: self._load(saved["blocks"], first))
        result.restore(saved["result"])
        for stream, passes in zip(streams, saved["forward_passes"], strict=True):
            stream.forward_passes = passes
        if streams:
            runner.learn_outputs(streams[0].chunks[-1], first)
        logger.info("Going on with block %d: what came before it is kept in %s.", first, self.work.path)
        return first

    def _load(self, blocks: Sequence[int], first: int) -> None:
        device = str(self._runner.device)
        model, offload = self._runner.model, offload_of(self._runner.model)
        for index in in_turn(model, blocks):
            if offload is not None and offload.home.outlives:
                offload.adopt(index)
                continue
            if self._resize is not None:
                self._resize(index)
            load_model(self._module(index), self.work.file(_block_file(index)), device=device)
            keep(model, index)
        for number, stream in enumerate(self._streams):
            name = _inputs_file(first, number)
            if name in self.work.files:
                # On the CPU they stay in the file.
                hidden = load_file(self.work.file(name), device=device if stream.states.folder is None else "cpu")
                stream.hidden = [hidden[str(place)] for place in range(len(stream.chunks))]

    def save(self, index: int) -> None:
        """Note that block `index` is done; keep the state if it is time, and leave if that is asked for.

        Raises:
            Stopped: the walk was asked to stop, and everything up to this block is kept.
            BadInputError, RunError: the disk refuses.
        """
        if index in self._pruned:
            self._unsaved.append(index)
        now = perf_counter()
        self._longest = max(self._longest, now - self._block_began)
        # A block that would end too late is not begun.
        needed = self._longest if index < self._last else 0.0
        asked = distributed.gather((self.stop.reason(needed), self._is_due(index, now)))
        # One process decides, so that all stop behind the same block; a signal may have come to any of them.
        reason = asked[0][0] or next((own for own, _ in asked if own == SIGNAL), None)
        if reason or asked[0][1]:
            self._write(index)
            self._saved = perf_counter()
            self._cost = self._saved - now
            self._result.saving_seconds += self._cost
        if reason:
            raise Stopped(
                f"stopped by {reason} behind block {index} of 0 to {self._last}, all kept in {self.work.path}; start "
                "the same run again to go on."
            )
        self._block_began = perf_counter()

    def _is_due(self, index: int, now: float) -> bool:
        if index == self._last:
            return True
        if self.every:
            return (index + 1) % self.every == 0
        return now - self._saved >= _WORK_PER_SAVING * self._cost

    def _write(self, index: int) -> None:
        before = self.work.entries.get(_ENTRY, {"blocks": [], "next_block": 0})
        files: dict[str, Callable[[Path], None]] = {}
        for number, stream in enumerate(self._streams):
            hidden = {str(place): states for place, states in enumerate(stream.hidden) if states is not None}
            # Behind the last block there is nothing to go on to.
            if hidden and index < self._last:
                files[_inputs_file(index + 1, number)] = partial(_save_tensors, hidden)
        offload = offload_of(self._runner.model)
        if distributed.rank() == 0 and not (offload is not None and offload.home.outlives):
            files |= {_block_file(own): partial(self._save_block, own) for own in self._unsaved}
        result = self._result.to_dict()
        result["earlier_seconds"] += perf_counter() - self._began
        entry = {
            "next_block": index + 1,
            "blocks": [*before["blocks"], *self._unsaved],
            "forward_passes": [stream.forward_passes for stream in self._streams],
            "result": result,
        }
        old = [_inputs_file(before["next_block"], number) for number in range(len(self._streams))]
        self.work.save({_ENTRY: entry}, files, drop=old)
        self._unsaved = []

    def _save_block(self, index: int, file: Path) -> None:
        with at_work(self._runner.model, index):
            save_model(self._module(index), str(file))

    def _module(self, index: int) -> nn.Module:
        """A block, or what comes behind the blocks: the LM head."""
        model: Any = self._runner.model
        return self._runner.blocks[index] if index < len(self._runner.blocks) else model.get_output_embeddings()


def _block_file(index: int) -> str:
    return f"block_{index:04}.safetensors"


def _inputs_file(index: int, number: int) -> str:
    """This process's inputs of a block in one of its streams."""
    return f"inputs_{index:04}_{number}_{distributed.rank()}.safetensors"


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
