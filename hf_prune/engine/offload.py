"""Models that are larger than the device: a block's weights are there while the block is at work, and no longer.

The blocks' parameters stand in for weights that live elsewhere. Whoever wants those of one block says so
(`at_work`), and a block that is called brings its own; so that any forward works, and one that takes the blocks in turn
works without reading a weight twice.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_prune.errors import BadInputError
from hf_prune.weights import find_blocks

_ATTRIBUTE = "_hf_prune_offload"
# glibc's M_MMAP_THRESHOLD, and the bytes from which memory is to go back to the system as soon as it is free.
_MMAP_THRESHOLD, _RETURNED = -3, 2**20


class Home(Protocol):
    """Where weights live while their block is not at work."""

    @property
    def outlives(self) -> bool:
        """Whether what is written is there after the process has died."""
        ...

    @property
    def spill_folder(self) -> Path | None:
        """Where hidden states go; None: they stay on the device."""
        ...

    def read(self, unit: int) -> dict[str, Tensor]:
        """A unit's tensors by their names in the model, in host memory or mapped to a file."""
        ...

    def write(self, unit: int, tensors: dict[str, Tensor]) -> None:
        """From now on the unit is this; every process calls it, with the same tensors."""
        ...

    def adopt(self, unit: int) -> None:
        """From now on the unit is what an earlier session wrote."""
        ...


class HostMemory:
    """Weights live in the parameters themselves, in the memory of the host."""

    outlives = False
    spill_folder = None

    def __init__(self, model: nn.Module) -> None:
        self._tensors = model.state_dict()
        self._units = units_of(model)

    def read(self, unit: int) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in self._units[unit]}

    def write(self, unit: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor)

    def adopt(self, unit: int) -> None:
        raise NotImplementedError("memory does not outlive a session")


def units_of(model: nn.Module) -> list[dict[str, list[tuple[nn.Module, str]]]]:
    """What is brought and released together: each block, and at the end all that is in none.

    Each is name -> places (module, attribute) of a parameter or persistent buffer, several where it is tied.

    Raises:
        BadInputError: blocks share weights.
    """
    prefix, blocks = find_blocks(model)
    own = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    units: list[dict[str, list[tuple[nn.Module, str]]]] = [{} for _ in range(len(blocks) + 1)]
    seen: dict[int, tuple[int, str]] = {}
    for module_name, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or leaf in module._non_persistent_buffers_set:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            unit = own.get(module, len(blocks))
            first_unit, first = seen.setdefault(id(tensor), (unit, name))
            if first_unit != unit:
                raise BadInputError(
                    f"offload: {name} and {first} are one weight, which {prefix} shares; set it to none."
                )
            units[unit].setdefault(first, []).append((module, leaf))
    return units


class Offload:
    """The blocks of a model, each on the device only while it is at work; made for a model once, before it is used.

    What is in no block stays on the device. On CUDA the next block is read ahead into pinned memory.

    Args:
        model: whose blocks' parameters are in their home, or on the meta device.
    """

    def __init__(self, model: nn.Module, home: Home, device: torch.device) -> None:
        self.home = home
        self.device = device
        self._model = model
        self.units = units_of(model)
        self.count = len(self.units) - 1
        self._held: set[int] = set()
        self._stand_ins: dict[int, list[tuple[dict[str, Any], str, Any]]] = {}
        _return_freed_memory()
        self._reader = ThreadPoolExecutor(max_workers=1) if device.type == "cuda" else None
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._last = -1
        self._bring(self.count)
        for index, block in enumerate(find_blocks(model)[1]):
            block.forward = self._forward(index, block.forward)
        model.__dict__[_ATTRIBUTE] = self

    def _forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.at_work(index):
                return original(*args, **kwargs)

        return forward

    @contextmanager
    def at_work(self, index: int) -> Iterator[None]:
        """Inside, block `index` is on the device; what is changed there is lost unless it is kept."""
        if index in self._held or index == self.count:
            yield
            return
        self._bring(index)
        self._held.add(index)
        try:
            yield
        finally:
            self._held.discard(index)
            for table, leaf, stand_in in self._stand_ins.pop(index):
                table[leaf] = stand_in

    def keep(self, index: int) -> None:
        """A block at work, or with the number of blocks what is in none, is from now on as it is."""
        unit = self.units[index]
        self._ahead.pop(index, None)
        self.home.write(index, {name: _table(*places[0])[places[0][1]].detach() for name, places in unit.items()})

    def adopt(self, index: int) -> None:
        """A block is from now on what an earlier session kept; only where the home outlives it."""
        self._ahead.pop(index, None)
        self.home.adopt(index)

    def move(self, device: torch.device) -> None:
        """From now on the model computes elsewhere; no block may be at work."""
        self.device = device
        self._reader, self._ahead = None, {}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)

    def _bring(self, index: int) -> None:
        tensors = self._read(index)
        missing = self.units[index].keys() - tensors.keys()
        if missing:
            raise BadInputError(
                f"model_name_or_path: the files hold no {min(missing)}, which offload does not make up; get the model "
                "again, or set offload to none."
            )
        stand_ins = self._stand_ins[index] = []
        for name, places in self.units[index].items():
            stand_in = _table(*places[0])[places[0][1]]
            tensor = tensors[name].to(self.device, non_blocking=True)
            if isinstance(stand_in, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=stand_in.requires_grad)
            for module, leaf in places:
                stand_ins.append((_table(module, leaf), leaf, stand_in))
                _table(module, leaf)[leaf] = tensor

    def _read(self, index: int) -> dict[str, Tensor]:
        if self._reader is None:
            return self.home.read(index)
        ahead = self._ahead.pop(index, None)
        tensors = ahead.result() if ahead is not None else self._pinned(index)
        # A backward pass takes the blocks in reverse.
        following = index + 1 if index >= self._last else index - 1
        self._last = index
        self._ahead.clear()
        if 0 <= following < self.count and index < self.count:
            self._ahead[following] = self._reader.submit(self._pinned, following)
        return tensors

    def _pinned(self, index: int) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() for name, tensor in self.home.read(index).items()}


def _return_freed_memory() -> None:
    """For the rest of the process, free memory goes back to the system in pieces of 1 MiB and more.

    glibc raises its own threshold with every large piece that is freed, up to 32 MiB, and keeps what is smaller: what
    blocks long gone have left would add up with depth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _RETURNED)


def _table(module: nn.Module, leaf: str) -> dict[str, Any]:
    return module._parameters if leaf in module._parameters else module._buffers


def offload_of(model: nn.Module) -> Offload | None:
    """How a model is offloaded; None where it is whole on its device."""
    found: Offload | None = model.__dict__.get(_ATTRIBUTE)
    return found


def at_work(model: nn.Module, index: int) -> AbstractContextManager[None]:
    """Inside, block `index` is on the device, as are all blocks of a model that is not offloaded."""
    offload = offload_of(model)
    return nullcontext() if offload is None else offload.at_work(index)


def in_turn(model: nn.Module, indices: Iterable[int]) -> Iterator[int]:
    """The indices one by one, each while its block is at work."""
    for index in indices:
        with at_work(model, index):
            yield index


def keep(model: nn.Module, index: int) -> None:
    """What was done to a block at work, or behind the blocks, is to last."""
    offload = offload_of(model)
    if offload is not None:
        offload.keep(index)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter, tied ones once, and buffer; of one block after the other where offloaded."""
    offload = offload_of(model)
    if offload is None:
        yield from model.named_parameters()
        yield from model.named_buffers()
        return
    for index in in_turn(model, (offload.count, *range(offload.count))):
        for name, places in offload.units[index].items():
            yield name, _table(*places[0])[places[0][1]]
    persistent = {name for unit in offload.units for name in unit}
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in persistent)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes."""
    offload = offload_of(model)
    return next(model.parameters()).device if offload is None else offload.device
