"""Statistics of the dense model's activations, kept in a folder and shared by runs that do not propagate.

Only where nothing is propagated do the inputs of a layer not depend on what was pruned before it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_prune.checkpoint.files import replaced
from hf_prune.engine import distributed
from hf_prune.engine.capture import least_tokens
from hf_prune.engine.offload import tensors_of
from hf_prune.engine.statistics import Statistics
from hf_prune.engine.stream import Groups
from hf_prune.weights import WeightView


class StatisticsCache:
    """One file for each block: the sums of every distinct input with the names of the layers that share it."""

    def __init__(
        self, folder: Path, model: nn.Module, input_ids: Tensor, views: list[WeightView], kinds: frozenset[str]
    ):
        digest = hashlib.sha256(json.dumps([torch.__version__, sorted(kinds), [view.name for view in views]]).encode())
        for tensor in (*(tensor for _, tensor in tensors_of(model)), input_ids):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.folder = folder / digest.hexdigest()[:16]
        self.views = {view.name: view for view in views}
        self.kinds = kinds
        self.complete = (self.folder / "complete").exists() and distributed.world_size() == 1

    def _file(self, index: int) -> Path:
        return self.folder / f"block_{index}.safetensors"

    def load(self, index: int) -> Groups:
        """The groups of a block, on the device of their layers."""
        groups = []
        with safe_open(self._file(index), framework="pt") as file:
            for number, group in enumerate(json.loads(file.metadata()["groups"])):
                members = [self.views[name] for name in group["members"]]
                totals = {kind: file.get_tensor(f"{number}.{kind}") for kind in self.kinds}
                first = members[0]
                device, least = first.parameter.device, least_tokens(first)
                groups.append((Statistics.restore(totals, group["count"], first.shape[1], device, least), members))
        return groups

    def save(self, index: int, groups: Groups) -> None:
        """Keep a block's sums; nothing is kept where several processes each hold a part of them."""
        if distributed.world_size() > 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{number}.{kind}": total.contiguous()
            for number, (statistics, _) in enumerate(groups)
            for kind, total in statistics.totals().items()
        }
        described = [{"count": own.count, "members": [view.name for view in members]} for own, members in groups]
        # Other runs may be writing, or already reading, the same one.
        with replaced(self._file(index)) as part:
            save_file(tensors, part, {"groups": json.dumps(described)})

    def finish(self) -> None:
        """If all blocks are there, from now on they are read instead of gathered.

        They are not where a walk that had been cut kept the first ones elsewhere, or nowhere.
        """
        blocks = {view.block for view in self.views.values()}
        if distributed.world_size() == 1 and not self.complete and all(self._file(index).exists() for index in blocks):
            (self.folder / "complete").touch()
