"""Sensitivity against the slow way: a model for each part, pruned and evaluated by itself."""

import copy
import math

import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor, nn

from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.pruning import prune
from hf_prune.sensitivity import PartSensitivity, Sensitivity, agreement, measure_sensitivity


def evaluator(model: nn.Module) -> object:
    windows = tiny_ids(6, 48, seed=11)
    return lambda name: window_nll(model, windows)


@pytest.mark.parametrize("by", ["block", "kind", "layer"])
def test_each_part_is_pruned_alone_behind_the_dense_model(by: str) -> None:
    input_ids = tiny_ids(8, 48)
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    config = make_config({"method": "wanda", "sparsity": 0.7})
    measured = measure_sensitivity(model, config, evaluator(model), by=by, input_ids=input_ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    patterns = {"block": "model.layers.1", "kind": "mlp.down_proj", "layer": "model.layers.2.mlp.up_proj"}
    part = next(part for part in measured.parts if part.part == patterns[by])
    # The same part as a target of its own: nothing else is pruned, so that its inputs are the dense model's.
    alone = tiny_model("llama")
    targets = [patterns[by]] if by != "kind" else ["down_proj"]
    result = prune(
        alone,
        make_config({"method": "wanda", "sparsity": 0.7, "targets": targets, "propagate": False}),
        input_ids=input_ids,
    )
    assert part.weights == sum(view.numel for view in result.plan.views) - sum(view.kept for view in result.views)
    nll: Tensor = evaluator(alone)("")
    assert part.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-6)
    assert part.cost == pytest.approx(math.log(part.perplexity / measured.dense_perplexity), abs=1e-9)
    assert len(measured.parts) == {"block": 3, "kind": 7, "layer": 21}[by]


def test_parts_that_stand_out_are_named_dearest_first() -> None:
    parts = [PartSensitivity(f"part{n}", 100, 10.0, math.exp(0.01), None, None) for n in range(5)]
    parts += [PartSensitivity("dear", 100, 20.0, math.exp(0.5), None, None)]
    parts += [PartSensitivity("large", 100_000, 20.0, math.exp(0.5), None, None)]
    parts += [PartSensitivity("dearest", 10, 20.0, math.exp(0.5), None, None)]
    plan = measure_sensitivity(
        tiny_model("llama"), make_config({"method": "magnitude"}), lambda name: torch.ones(2, dtype=torch.float64)
    ).plan
    assert Sensitivity("layer", 10.0, 100.0, parts, plan).outstanding() == ["dearest", "dear"]


def test_agreement_ranks_the_allocations() -> None:
    """Costs that fall with the block: an allocation that keeps less of later blocks agrees perfectly."""
    model = tiny_model("llama")
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0 - index)
    config = make_config({"method": "magnitude", "sparsity": 0.6})
    plan = measure_sensitivity(model, config, lambda name: torch.ones(2, dtype=torch.float64)).plan
    costs = {f"model.layers.{index}": 0.3 - 0.1 * index for index in range(3)}
    parts = [PartSensitivity(name, 100, 10.0, math.exp(cost), None, None) for name, cost in costs.items()]
    found = agreement(model, config, Sensitivity("block", 10.0, 20.0, parts, plan))
    assert found["global"] == pytest.approx(1.0)
    assert "owl" not in found and -1 <= found["layerwise_l2"] <= 1
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(BadInputError, match="by: 'row' is unknown"):
        measure_sensitivity(tiny_model("llama"), make_config({"method": "magnitude"}), None, by="row")
    with pytest.raises(BadInputError, match="needs calibration text"):
        measure_sensitivity(tiny_model("llama"), make_config({"method": "wanda"}), None)
