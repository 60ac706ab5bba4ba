"""A network of two layers, learnt from random rows: what trainings of any module are tested on."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers and a loss, as a Trainer wants them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.second(torch.tanh(self.first(inputs)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batches(count: int = 12, size: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, size, 6, generator=generator)
    labels = (inputs[..., 0] > 0).long() + (inputs[..., 1] > 0).long()
    return [{"inputs": one, "labels": other} for one, other in zip(inputs, labels, strict=True)]


class Data(torch.utils.data.Dataset):
    """The rows of all batches."""

    def __init__(self) -> None:
        self.rows = [
            {"inputs": one, "labels": other}
            for batch in batches()
            for one, other in zip(batch["inputs"], batch["labels"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.rows[number]
