"""Displacement against a matrix whose changes were made by hand."""

from pathlib import Path

import pytest
import torch
from tiny import matrix_of, tiny_model

from hf_prune.checkpoint.displacement import displacement, overall
from hf_prune.methods.magnitude import MagnitudeConfig
from hf_prune.pruning import plan_pruning
from hf_prune.weights import find_views


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_was_moved_by_hand_is_found(family: str, tmp_path: Path) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    plan = plan_pruning(dense, MagnitudeConfig(sparsity=0.5))
    first, second = find_views(model)[:2]
    # Half goes; of the other half a quarter grows by a tenth.
    flat = first.read().flatten()
    numel = flat.numel()
    flat[: numel // 2] = 0
    grown = slice(numel // 2, numel // 2 + numel // 8)
    before = flat.clone()
    flat[grown] *= 1.1
    with torch.no_grad():
        first.write(flat.reshape(first.shape))
        second.write(torch.zeros(second.shape))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = displacement(tmp_path, dense, plan.views)
    expected = 0.1 * float(before[grown].norm() / before[numel // 2 :].norm())
    own = found[plan.views[0].name]
    assert own["changed"] == pytest.approx(0.25, abs=1 / numel)
    assert own["moved"] == pytest.approx(expected, rel=1e-4) and own["kept"] == numel - numel // 2
    assert found[plan.views[1].name] == {"moved": 0.0, "changed": 0.0, "kept": 0, "squared": 0.0}
    assert all(found[view.name]["moved"] == found[view.name]["changed"] == 0 for view in plan.views[2:])
    survivors = [matrix_of(model.state_dict(), view) for view in plan.views]
    originals = [matrix_of(dense.state_dict(), view) for view in plan.views]
    pairs = [(new[new != 0], old[new != 0]) for new, old in zip(survivors, originals, strict=True)]
    new, old = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    together = overall(found)
    assert together is not None
    assert together["moved"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    assert together["changed"] == pytest.approx(float((new != old).float().mean()), rel=1e-4)
    assert overall({}) is None
