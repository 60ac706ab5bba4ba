"""A mixture whose experts are a list of modules, as the Hub's code may have it, called in the order of their tokens."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.engine import distributed
from hf_prune.errors import RunError
from hf_prune.methods.sparsegpt import SparseGPTConfig
from hf_prune.pruning import prune


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(hidden)))


class ListMixture(nn.Module):
    """Every token goes to one of two experts; the one that the first token goes to comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 2, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = self.router(hidden).argmax(dim=-1)
        output = torch.zeros_like(hidden)
        for expert in dict.fromkeys(chosen.flatten().tolist()):
            output[chosen == expert] = self.experts[expert](hidden[chosen == expert])
        return output


def model() -> PreTrainedModel:
    """A Llama with such mixtures for its MLPs."""
    own = tiny_model("llama")
    for block in own.model.layers:
        block.mlp = ListMixture()
    return own.eval()


def order_of_use(own: PreTrainedModel, ids: Tensor) -> list[int]:
    """The first block's experts in the order in which a forward calls them."""
    called: list[int] = []
    handles = [
        expert.register_forward_hook(lambda *_, number=number: called.append(number))
        for number, expert in enumerate(own.model.layers[0].mlp.experts)
    ]
    with torch.no_grad():
        own(input_ids=ids)
    for handle in handles:
        handle.remove()
    return called


def prune_it(own: PreTrainedModel, ids: Tensor) -> None:
    prune(own, SparseGPTConfig(sparsity=0.5), input_ids=ids)


def prune_share(ids: Tensor, rank: int, port: int, folder: Path) -> None:
    """One of two processes: saves the pruned model, or the error's sentence."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {key: str(value) for key, value in places.items()}
    distributed.initialise("cpu")
    own = model()
    try:
        prune_it(own, ids)
    except RunError as error:
        (folder / f"error-{rank}").write_text(str(error))
        sys.exit(1)
    if rank == 0:
        save_file(
            {name: value.contiguous() for name, value in own.state_dict().items() if "lm_head" not in name},
            folder / "pruned.safetensors",
        )
