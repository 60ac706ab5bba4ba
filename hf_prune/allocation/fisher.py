"""Fisher: drop what the second-order loss misses least, over all layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hf_prune.allocation.base import Allocation
from hf_prune.allocation.histogram import Histogram, shares_above
from hf_prune.engine.gradients import FisherFactors
from hf_prune.engine.offload import in_turn
from hf_prune.weights import WeightView


@dataclass(frozen=True)
class Fisher(Allocation):
    """One threshold over W_ij^2 E[g_i^2] E[x_j^2]: what dropping a weight alone costs, in nats a token, times two.

    x_j is the layer's input and g_i the gradient of the log-likelihood by its output on the dense model, with tokens
    drawn from the model's own distribution: the diagonal of the Kronecker-factored Fisher information (K-FAC, Martens &
    Grosse, 2015, https://arxiv.org/abs/1503.05671), as the LLM Surgeon (van der Ouderaa et al., 2024,
    https://arxiv.org/abs/2312.17244) takes it for the loss. As an allocation for any criterion and update it is our
    extension.
    """

    needs_weights = True
    summary = "one threshold over what each weight costs the loss by the Fisher information"
    paper = "https://arxiv.org/abs/2312.17244"

    @property
    def needs_fisher(self) -> bool:
        return True

    @property
    def needs_text(self) -> bool:
        return True

    def decide(
        self,
        model: nn.Module,
        views: Sequence[WeightView],
        measures: Mapping[str, FisherFactors],
        sparsity: float,
        input_ids: Tensor | None,
        folder: Path | None,
    ) -> list[float]:
        histograms = {}
        for index in in_turn(model, sorted({view.block for view in views})):
            for view in (view for view in views if view.block == index):
                own = measures[view.name]
                costs = view.read().square_().mul_(own.inputs).mul_(own.outputs[:, None])
                histograms[view.name] = Histogram.of(costs)
        return shares_above([histograms[view.name] for view in views], [1.0] * len(views), 1 - sparsity)

    def shares_of_units(
        self, views: Sequence[WeightView], measures: Mapping[str, FisherFactors], sparsity: float
    ) -> list[float]:
        """Share of the inputs of each view that stays: one threshold over the costs of whole columns.

        Of what consumes an MLP's neurons a column is all that a neuron does, and what dropping it costs is the Fisher
        information of a gate on it (Molchanov et al., 2019, https://arxiv.org/abs/1906.10771, with labels that the
        model draws). As widths of blocks this is ours; FLAP (An et al., 2023, https://arxiv.org/abs/2312.11983)
        compares fluctuations instead.

        Args:
            measures: with `columns`.
        """
        columns = [measures[view.name].columns for view in views]
        return shares_above([Histogram.of(own) for own in columns if own is not None], [1.0] * len(views), 1 - sparsity)
