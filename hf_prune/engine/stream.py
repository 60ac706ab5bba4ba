"""The calibration windows on their way through the blocks: cached hidden states, advanced one block at a time."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_prune.checkpoint.folder import explained_disk_errors
from hf_prune.engine import distributed
from hf_prune.engine.capture import BlockRunner, InputObserver
from hf_prune.engine.offload import offload_of
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError, RunError
from hf_prune.weights import WeightView

# Tokens a forward: large enough for full-speed matrix products, small enough to keep activations out of the peak.
TOKENS_PER_FORWARD = 1024
Groups = list[tuple[Statistics, list[WeightView]]]


def windows_per_forward(seq_length: int) -> int:
    """Calibration windows that go through a block together."""
    return max(TOKENS_PER_FORWARD // seq_length, 1)


class HiddenStates:
    """Where hidden states wait for the next block: on the device, or in files where weights live in some.

    Attributes:
        folder: of the files; None, on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        offload = offload_of(model)
        self.folder = offload.home.spill_folder if offload is not None else None

    def keep(self, states: Tensor) -> Tensor:
        """The same tensor, or a copy that is mapped to a file without a name, which goes when the copy does.

        Raises:
            RunError: the disk is full.
        """
        if self.folder is None:
            return states
        values = states.detach().cpu().contiguous()
        with explained_disk_errors(self.folder, self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(values.flatten().view(torch.uint8).numpy().data)
            file.flush()
            # Private: nothing is written back, and torch wants memory that it could write to.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=values.dtype).view(values.shape)


class Stream:
    """This process's share of the calibration windows and their hidden states in front of the next block.

    Attributes:
        chunks: int64 [sequences, tokens] each, one forward's windows.
        numbers: each chunk's place among those of all processes.
        hidden: [sequences, tokens, width] each, None in front of the first block.
        num_chunks: of all processes.
        forward_passes: taken so far over the calibration set.
    """

    def __init__(self, runner: BlockRunner, input_ids: Tensor) -> None:
        # How samples are grouped never depends on the number of processes.
        chunks = list(input_ids.split(windows_per_forward(input_ids.shape[1])))
        if len(chunks) < distributed.world_size():
            raise BadInputError(
                f"num_calibration_samples: {len(input_ids)} windows make {len(chunks)} forwards, fewer than the "
                f"{distributed.world_size()} processes; use more windows or fewer processes."
            )
        self.runner = runner
        self.num_chunks = len(chunks)
        self.numbers = list(range(len(chunks)))[distributed.rank() :: distributed.world_size()]
        self.chunks = [chunks[number] for number in self.numbers]
        self.hidden: list[Tensor | None] = [None] * len(self.chunks)
        self.states = HiddenStates(runner.model)
        self.window_counts = [len(chunk) for chunk in chunks]
        self.forward_passes = 0.0

    def observe(
        self, index: int, views: list[WeightView], kinds: frozenset[str], *, outputs: bool = False
    ) -> tuple[Groups, list[Tensor | None] | None]:
        """Statistics of every distinct input of a block's views, not yet added up over processes.

        They come in the order of the views, the same on every process, whichever layer was first to see a token there.

        Args:
            outputs: also return the block's outputs, which takes the forward to the block's end.

        Raises:
            RunError: a layer saw no token, here or on another process.
        """
        observer = InputObserver(views, kinds, leave_early=not outputs)
        seen: list[Tensor | None] | None = [] if outputs else None
        with observer.listening():
            for chunk, states in zip(self.chunks, self.hidden, strict=True):
                with observer.forward():
                    if seen is None:
                        self.runner.observe(index, chunk, states)
                    else:
                        seen.append(self.states.keep(self.runner.run(index, chunk, states)))
        self.forward_passes += 1 / len(self.runner.blocks)
        return _agreed(observer.groups, views), seen

    def advance(self, index: int, outputs: Sequence[Tensor | None] | None = None) -> None:
        """Move past block `index`: through it, or onto `outputs` where they are known already."""
        if outputs is not None:
            self.hidden = list(outputs)
            return
        for place, chunk in enumerate(self.chunks):
            self.hidden[place] = self.states.keep(self.runner.run(index, chunk, self.hidden[place]))
        self.forward_passes += 1 / len(self.runner.blocks)


def _agreed(groups: Groups, views: list[WeightView]) -> Groups:
    """Groups in the order of `views`, as all processes have them.

    Raises:
        RunError: a process has no tokens of a layer, or others share its input.
    """
    place = {view.name: at for at, view in enumerate(views)}
    ordered = [(own, sorted(members, key=lambda view: place[view.name])) for own, members in groups]
    ordered.sort(key=lambda group: place[group[1][0].name])
    named = [[view.name for view in members] for _, members in ordered]
    everywhere = distributed.gather(named)
    for theirs in everywhere:
        silent = [name for name in place if name not in {own for members in theirs for own in members}]
        if silent:
            where = "" if len(everywhere) == 1 else " on one of the processes"
            raise RunError(
                f"{silent[0]} saw no calibration token{where}; put it on ignore or use more calibration text."
            )
    if any(theirs != named for theirs in everywhere):
        raise RunError("the processes do not agree which layers share an input; prune this model with one process.")
    return ordered
