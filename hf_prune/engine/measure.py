"""One look at every dense weight matrix and, where asked, at its inputs: what allocations decide upon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_prune.engine import distributed
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.offload import in_turn
from hf_prune.engine.statistics import Statistics, check_finite
from hf_prune.engine.stream import Stream
from hf_prune.errors import BadInputError
from hf_prune.progress import progress
from hf_prune.weights import WeightView

Measure = Callable[[Tensor, Statistics | None], Any]


def measure_views(
    model: nn.Module, views: Sequence[WeightView], measure: Measure, kinds: frozenset[str], input_ids: Tensor | None
) -> dict[str, Any]:
    """`measure(weight, statistics)` of every view by name, the same on every process; the model is left as it is.

    Args:
        measure: takes float32 [out, in] and the statistics of the dense model's inputs, None where `kinds` is empty;
            returns something small.
        kinds: statistics that it needs; one forward pass over the calibration windows unless empty.
        input_ids: int64 [samples, tokens]; may be None where `kinds` is empty.

    Raises:
        BadInputError: calibration text is needed and missing.
        RunError: a layer's inputs hold NaN or Inf.
    """
    if not kinds:
        own = list(views)[distributed.rank() :: distributed.world_size()]
        found: dict[str, Any] = {}
        for index in in_turn(model, progress(sorted({view.block for view in own}), "measuring")):
            found |= {view.name: measure(view.read(), None) for view in own if view.block == index}
        return _merged(found)
    if input_ids is None:
        raise BadInputError("dataset_name: this allocation needs calibration text; name a dataset or pass input_ids.")
    measured: dict[str, Any] = {}
    last = max(view.block for view in views)
    with BlockRunner(model) as runner:
        stream = Stream(runner, input_ids)
        for index in in_turn(model, progress(range(last + 1), "measuring blocks", total=last + 1)):
            inside = [view for view in views if view.block == index]
            outputs = None
            if inside:
                groups, outputs = stream.observe(index, inside, kinds, outputs=index < last)
                for number, (statistics, members) in enumerate(groups):
                    owner = number % distributed.world_size()
                    statistics.finish(lambda tensor, owner=owner: distributed.sum_at(tensor, owner))  # type: ignore[misc]
                    if owner == distributed.rank():
                        check_finite(statistics, members[0].name)
                        measured |= {view.name: measure(view.read(), statistics) for view in members}
                    statistics.release()
            if index < last:
                stream.advance(index, outputs)
    return _merged(measured)


def _merged(own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in distributed.gather(own) for name, value in part.items()}
