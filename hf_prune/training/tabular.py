"""Small classifiers of tables: scikit-learn's data sets, and a perceptron with hidden layers as a stock model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_prune.errors import BadInputError

TABLES = ("breast_cancer", "digits", "iris", "wine")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


@dataclass
class TableArguments:
    """The table that is learnt."""

    dataset_name: str | None = field(default=None, metadata={"help": f"sklearn:NAME, of {', '.join(TABLES)}"})
    held_out_share: float = field(default=0.2, metadata={"help": "of the rows, for the accuracies that are reported"})
    seed: int = field(default=0, metadata={"help": "of the split, the initial weights and the order of rows"})

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise BadInputError(f"held_out_share: {self.held_out_share} is outside (0, 1).")


@dataclass
class PerceptronArguments:
    """The perceptron that learns it."""

    hidden_sizes: list[str] = field(default_factory=lambda: ["6"], metadata={"help": "units of each hidden layer"})
    activation: str = field(default="relu", metadata={"help": ", ".join(ACTIVATIONS)})
    benchmark_accuracy: float | None = field(
        default=None, metadata={"help": "of the training rows, ends a pruned training; 99 % of the dense one's"}
    )
    explain: bool = field(
        default=False,
        metadata={
            "help": "add WeightWatcher's alpha of each layer and SHAP's ranks of the features (the extra explain)"
        },
    )

    def __post_init__(self) -> None:
        for size in self.hidden_sizes:
            if not size.isdigit() or not int(size):
                raise BadInputError(f"hidden_sizes: {size!r} is no number of units; write [50, 30].")
        if self.activation not in ACTIVATIONS:
            raise BadInputError(f"activation: {self.activation!r} is unknown; choose {', '.join(ACTIVATIONS)}.")
        if self.benchmark_accuracy is not None and not 0 < self.benchmark_accuracy <= 1:
            raise BadInputError(f"benchmark_accuracy: {self.benchmark_accuracy} is outside (0, 1].")


class PerceptronConfig(PreTrainedConfig):
    """Sizes of a perceptron, from features to classes."""

    model_type = "hf_prune_perceptron"

    def __init__(self, sizes: Sequence[int] = (4, 6, 3), activation: str = "relu", **more: Any) -> None:
        self.sizes = list(sizes)
        self.activation = activation
        super().__init__(**more)


@dataclass
class PerceptronOutput(ModelOutput):
    """Logits [rows, classes], and the loss where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Perceptron(PreTrainedModel):
    """Linear layers with an activation between them; saved and loaded as any other model."""

    config_class = PerceptronConfig
    base_model_prefix = "layers"

    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__(config)
        parts: list[nn.Module] = []
        for size in pairwise(config.sizes):
            parts += [nn.Linear(*size), ACTIVATIONS[config.activation]()]
        self.layers = nn.Sequential(*parts[:-1])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> PerceptronOutput:
        """`inputs` float [rows, features], `labels` int64 [rows]."""
        logits = self.layers(inputs)
        return PerceptronOutput(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


class Rows(Dataset[dict[str, Tensor]]):
    """Some rows of a table, as a Trainer takes them: float32 `inputs` [rows, features], int64 `labels` [rows]."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[number], "labels": self.labels[number]}

    @torch.no_grad()
    def figures(self, model: nn.Module) -> tuple[float, float]:
        """(accuracy, mean cross-entropy) of a model."""
        output = model(self.inputs.to(next(model.parameters()).device), self.labels.to(next(model.parameters()).device))
        hits = output.logits.argmax(1).cpu() == self.labels
        return float(hits.double().mean()), float(output.loss)


def load_table(arguments: TableArguments) -> tuple[Rows, Rows]:
    """(training, held-out) rows, as many of each class in both, features standardised on the training rows.

    Raises:
        BadInputError: no such table, no such split of it, or scikit-learn is not installed.
    """
    name = str(arguments.dataset_name or "")
    if not name.startswith("sklearn:") or name.removeprefix("sklearn:") not in TABLES:
        raise BadInputError(f"dataset_name: {name or 'nothing'} is no table; choose sklearn: and {', '.join(TABLES)}.")
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise BadInputError("dataset_name: tables need scikit-learn; pip install hf-prune[tables].") from None
    table = getattr(datasets, f"load_{name.removeprefix('sklearn:')}")()
    try:
        parts = train_test_split(
            torch.tensor(table.data, dtype=torch.float32),
            torch.tensor(table.target, dtype=torch.int64),
            test_size=arguments.held_out_share,
            random_state=arguments.seed,
            stratify=table.target,
        )
    except ValueError as error:
        raise BadInputError(f"held_out_share: {arguments.held_out_share} cannot split {name} ({error}).") from None
    training, held_out, labels, held_out_labels = parts
    mean, deviation = training.mean(0), training.std(0, correction=0)
    # A feature that never changes says nothing.
    deviation[deviation == 0] = 1
    return Rows((training - mean) / deviation, labels), Rows((held_out - mean) / deviation, held_out_labels)
