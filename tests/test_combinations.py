"""Everything combines: criterion x allocation x pattern x update x reconstruction, on a tiny model."""

import itertools

import pytest
import torch
from tiny import tiny_ids, tiny_model

from hf_prune.allocation import ALLOCATIONS
from hf_prune.arguments import RECONSTRUCT
from hf_prune.compose import make_config, make_solver
from hf_prune.description import describe_method
from hf_prune.errors import BadInputError
from hf_prune.methods import methods
from hf_prune.pruning import prune

PARTS = [name for name in methods() if methods()[name].info.name == methods()[name].criterion_name]
UPDATES = ["none", *(name for name in PARTS if methods()[name].update_name == name)]
PATTERNS = ["unstructured", "2:4", "4:8"]


def refused(criterion: str, update: str, allocation: str, pattern: str, reconstruct: str) -> str | None:
    """The reason for which a combination makes no sense, written down here by hand."""
    if criterion == "admm" and update != "admm":
        return "selects weights only while it updates"
    if update == "admm" and reconstruct == "linear":
        return "what the update admm ends with already"
    if allocation != "uniform" and pattern != "unstructured":
        return "nothing to decide"
    return None


@pytest.mark.parametrize(("criterion", "update", "allocation"), itertools.product(PARTS, UPDATES, ALLOCATIONS))
def test_every_combination_works_or_is_refused_with_the_reason(criterion: str, update: str, allocation: str) -> None:
    input_ids = tiny_ids(8, 32)
    for pattern, reconstruct in itertools.product(PATTERNS, RECONSTRUCT):
        own = (criterion, update, allocation, pattern, reconstruct)
        values = {"criterion": criterion, "update": update, "allocation": allocation, "pattern": pattern}
        values |= {"reconstruct": reconstruct, "min_keep_ratio": 0.05}
        values |= {"sparsity": 0.6} if pattern == "unstructured" else {}
        values |= {"fcpts_steps": 2} if allocation == "fcpts" else {}
        if reconstruct == "block":
            values |= {"reconstruct_passes": 1, "reconstruct_batch_size": 2}
        reason = refused(*own)
        if reason is not None:
            with pytest.raises(BadInputError, match=reason):
                make_config(values)
            continue
        model = tiny_model("llama")
        result = prune(model, make_config(values), input_ids=input_ids)
        for view, outcome in zip(result.plan.views, result.views, strict=True):
            kept = model.state_dict()[view.parameter] != 0
            assert outcome.kept == int(kept.sum()), own
            assert abs(int(kept.sum()) - view.density * view.numel) <= view.shape[0], own
            if pattern != "unstructured":
                n, m = map(int, pattern.split(":"))
                assert int(kept.reshape(-1, m).sum(-1).max()) <= n, own
        assert torch.isfinite(model(input_ids).logits).all(), own


def test_presets_are_named_combinations() -> None:
    assert make_config({}).method == "balanced"
    solver = make_solver(make_config({"method": "fast"}))
    assert (solver.criterion_name, solver.update_name) == ("sparsegpt", "sparsegpt")
    best = make_config({"method": "best"})
    assert best.reconstruct == "block" and make_solver(best).update_name == "admm"
    assert make_config({"method": "best", "reconstruct": "none"}).reconstruct == "none"


@pytest.mark.parametrize(
    ("options", "name", "title"),
    [
        ({"criterion": "wanda", "update": "none"}, "wanda", "Wanda"),
        ({"criterion": "sparsegpt", "update": "sparsegpt"}, "sparsegpt", "SparseGPT"),
        ({"method": "fast"}, "fast", "Fast preset (SparseGPT)"),
        ({"method": "wanda", "update": "sparsegpt"}, "wanda+sparsegpt", "Wanda criterion, sparsegpt update"),
    ],
)
def test_parts_that_make_a_method_are_called_by_its_name(options: dict[str, str], name: str, title: str) -> None:
    described = describe_method(make_config(options))
    assert (described["name"], described["title"]) == (name, title)
