"""What a method is: a criterion (what to drop), an update (what the survivors become), or both.

Neither sees a model, a module, a device, a rank or a file. They see float32 weights [out, in], the statistics they
declare, and a rule that says how much is kept and in which pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from hf_prune.arguments import PruneConfig
from hf_prune.engine.statistics import Statistics
from hf_prune.masks import MaskRule

registered: dict[str, type[PruneConfig]] = {}
Config = TypeVar("Config", bound=type[PruneConfig])


@dataclass(frozen=True)
class MethodInfo:
    """What tables and cards say of a method."""

    name: str
    title: str
    summary: str
    paper: str | None = None
    paper_title: str | None = None
    citation: str | None = None


def register(config: Config) -> Config:
    """Class decorator: make a method's config known under `config.info.name`."""
    registered[config.info.name] = config
    return config


class Criterion:
    """Scores weights; the lowest are dropped. `statistics` declares what it needs, `by_row` how scores compare."""

    statistics: ClassVar[frozenset[str]] = frozenset()
    by_row: ClassVar[bool] = False

    def score(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        """Importance, float32 [out, in]; higher is kept."""
        raise NotImplementedError


class Update:
    """Changes surviving weights so that the layer's output on the calibration inputs stays close to the dense one."""

    statistics: ClassVar[frozenset[str]] = frozenset()

    def flops(self, rows: int, columns: int) -> float:
        """Floating point operations of one solve of a [rows, columns] weight, for estimates."""
        return 0.0

    def solve(
        self, weight: Tensor, statistics: Statistics | None, rule: MaskRule, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """New weight and mask, both [out, in].

        Args:
            mask: the weights to keep; None where the criterion is the update's own, which may then select as it goes.
        """
        raise NotImplementedError


class NoUpdate(Update):
    """Survivors keep their values."""

    def solve(
        self, weight: Tensor, statistics: Statistics | None, rule: MaskRule, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert mask is not None
        return weight * mask, mask


class Refit(Protocol):
    """A last improvement of each weight matrix on its support."""

    statistics: ClassVar[frozenset[str]]

    def refit(self, dense: Tensor, weight: Tensor, mask: Tensor, statistics: Statistics | None) -> Tensor: ...


@dataclass(frozen=True)
class Solver:
    """A criterion, an update and perhaps a refit, put together; no criterion where the update selects by itself."""

    criterion_name: str
    criterion: Criterion | None
    update_name: str
    update: Update
    refit: Refit | None = None

    @property
    def statistics(self) -> frozenset[str]:
        """Everything the parts need to know of a layer's inputs."""
        needed = self.update.statistics
        for part in (self.criterion, self.refit):
            needed |= part.statistics if part else frozenset()
        return needed

    def solve(self, weight: Tensor, statistics: Statistics | None, rule: MaskRule) -> tuple[Tensor, Tensor]:
        """Prune one weight matrix: (weight, mask), both [out, in]."""
        mask = None
        if self.criterion is not None:
            mask = rule.select(self.criterion.score(weight, statistics), self.criterion.by_row)
        pruned, mask = self.update.solve(weight, statistics, rule, mask)
        if self.refit is not None:
            pruned = self.refit.refit(weight, pruned, mask, statistics)
        return pruned, mask
