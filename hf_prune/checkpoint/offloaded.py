"""Models whose weights stay in files: opened without them, read a block at a time, and written a block at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.files import tensor_digest
from hf_prune.checkpoint.inspect import check_safetensors, local_folder
from hf_prune.checkpoint.load import check_finite, explained, load_model
from hf_prune.checkpoint.source import WeightFiles, stored_names
from hf_prune.checkpoint.work import WorkFolder
from hf_prune.engine import distributed
from hf_prune.engine.offload import HostMemory, Offload, offload_of, units_of
from hf_prune.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METADATA = {"format": "pt"}


class Shards:
    """The home of weights that are not in memory: the files they came from and, once pruned, those they go to.

    Attributes:
        count: of blocks, and the number of the unit that is in none.
        finished: files of the units that have been written.

    Args:
        model: on the meta device.
        files: that it was opened from.
        work: where finished blocks and hidden states go; without it nothing can be written.
    """

    outlives = True

    def __init__(self, model: PreTrainedModel, files: Sequence[Path], work: WorkFolder | None) -> None:
        self.work = work
        self.finished: dict[int, Path] = {}
        self._model = model
        self._units = units_of(model)
        self.count = len(self._units) - 1
        self._sources = dict.fromkeys(range(len(self._units)), WeightFiles(model, files))
        self._expected: dict[str, str] = {}

    @property
    def spill_folder(self) -> Path:
        return self.work.path if self.work is not None else Path(tempfile.gettempdir())

    def expect(self, digests: dict[str, str]) -> None:
        """From now on the weights of the model's own files are these, by name and digest, whenever they are read.

        A run takes hours, reads each block several times, and could make two models into one.
        """
        self._expected = digests

    def read(self, unit: int) -> dict[str, Tensor]:
        tensors = self._sources[unit].read(self._units[unit].__contains__)
        if unit not in self.finished:
            for name in tensors.keys() & self._expected.keys():
                if tensor_digest(tensors[name]) != self._expected[name]:
                    raise BadInputError(
                        f"model_name_or_path: the file of {name} is not what it was when the run began; get it again, "
                        "then start the same run again to go on."
                    )
        return tensors

    def write(self, unit: int, tensors: dict[str, Tensor]) -> None:
        assert self.work is not None
        put = partial(self._put, tensors)
        self.work.save({}, {_shard(unit): put} if distributed.rank() == 0 else {})
        self._turn_to(unit, self.work.path / _shard(unit))

    def adopt(self, unit: int) -> None:
        assert self.work is not None
        self._turn_to(unit, self.work.file(_shard(unit)))

    def save(self, unit: int, file: Path) -> None:
        """A unit as a file of its own: the finished one under a second name, or a copy from where it came from."""
        if unit not in self.finished:
            self._put(self.read(unit), file)
            return
        assert self.work is not None
        whole = self.work.file(_shard(unit))
        try:
            os.link(whole, file)
        except OSError:
            # Not every file system has links.
            shutil.copyfile(whole, file)

    def _put(self, tensors: dict[str, Tensor], file: Path) -> None:
        save_file(stored_names(self._model, tensors), file, metadata=_METADATA)

    def _turn_to(self, unit: int, file: Path) -> None:
        self.finished[unit] = file
        self._sources[unit] = WeightFiles(self._model, [file])


def _shard(unit: int) -> str:
    return f"shard_{unit:04}.safetensors"


def open_shards(
    folder: Path, dtype: str, device: torch.device, work: WorkFolder | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a folder in eval mode, its weights in their files until a block is at work; an `Offload` is made."""
    from accelerate import init_empty_weights

    from hf_prune.models import AutoModelForCausalLM

    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    # Everything that loading decides (dtypes, ties, conversions, the generation config) without a weight.
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "meta"}, **options)
    # What no file holds, as a model makes it: rotary frequencies.
    with init_empty_weights(include_buffers=False):
        twin = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype, trust_remote_code=trust_remote_code)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        for leaf in module._non_persistent_buffers_set:
            buffer = other._buffers[leaf]
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    Offload(model, Shards(model, check_safetensors(folder), work), device)
    return model.eval()


def open_model(
    path: str,
    arguments: ModelArguments,
    device: torch.device,
    revision: str | None = None,
    work: WorkFolder | None = None,
) -> Any:
    """The model in eval mode, every weight finite: whole on its device, or offloaded as the arguments ask.

    Args:
        work: where a model that stays on the disk puts what becomes of it; without it, it can only be read.

    Raises:
        BadInputError: not found, damaged, NaN or Inf weights; blocks that cannot be offloaded.
        RunError: out of memory.
    """
    plain = replace(arguments, offload="none")
    if arguments.offload == "disk":
        with explained(path):
            folder = local_folder(path, revision)
            model = open_shards(folder, arguments.dtype, device, work, arguments.trust_remote_code)
        check_finite(model)
        return model
    if arguments.offload == "none" or device.type == "cpu":
        return load_model(path, plain, device, revision)
    model = load_model(path, plain, torch.device("cpu"), revision)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    Offload(model, HostMemory(model), device)
    return model


def shards_of(model: PreTrainedModel) -> Shards | None:
    """The files that an offloaded model's weights live in, None where they are in memory."""
    offload = offload_of(model)
    return offload.home if offload is not None and isinstance(offload.home, Shards) else None
