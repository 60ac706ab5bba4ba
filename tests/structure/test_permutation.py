"""An order of neurons for n:m patterns: against brute force, a reordering by hand, the function it must preserve."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from tiny import FAMILIES, MORE_FAMILIES, tiny_ids, tiny_model

from hf_prune import WandaConfig, prune
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.methods.intra_fusion import IntraFusionConfig
from hf_prune.structure.permutation import spread


def kept(scores: torch.Tensor, order: list[int], n: int, m: int) -> float:
    """Sum of the n largest of every m scores of a row, in an order of the columns."""
    groups = np.sort(scores.numpy()[:, order].reshape(len(scores), -1, m), axis=2)
    return float(groups[:, :, m - n :].sum())


@given(some.integers(0, 10**6), some.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]), some.integers(1, 5))
def test_no_exchange_of_one_member_of_each_group_keeps_more(seed: int, pattern: tuple[int, int], groups: int) -> None:
    n, m = pattern
    scores = torch.rand(6, groups * m, generator=torch.Generator().manual_seed(seed)) ** 4
    order = spread(scores, n, m).tolist()
    assert sorted(order) == list(range(groups * m))
    found = kept(scores, order, n, m)
    dealt = np.array(order).reshape(groups, m)
    for exchange in permutations(range(groups)):
        other = dealt.copy()
        other[:, -1] = dealt[list(exchange), -1]
        assert kept(scores, other.flatten().tolist(), n, m) <= found + 1e-4
    # No worse than dealing out by the sums alone, RIA's first step.
    ranked = np.argsort(-scores.sum(0).numpy(), kind="stable").reshape(m, groups)
    ranked[1::2] = ranked[1::2, ::-1]
    assert found >= kept(scores, ranked.T.flatten().tolist(), n, m) - 1e-4


def test_channels_that_matter_do_not_meet_in_one_group() -> None:
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    scores[:, :4] += 100
    assert kept(scores, list(range(16)), 2, 4) < 1700
    assert kept(scores, spread(scores, 2, 4).tolist(), 2, 4) > 3200, "2 of the 4 large columns are kept without"


def test_more_groups_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_prune.structure.permutation._GROUPS_TOGETHER", 3)
    scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(3)) ** 4
    order = spread(scores, 2, 4).tolist()
    assert sorted(order) == list(range(40)) and kept(scores, order, 2, 4) > kept(scores, list(range(40)), 2, 4)


def test_statistics_of_reordered_inputs() -> None:
    inputs, order = torch.randn(50, 6, dtype=torch.float64), torch.tensor([3, 0, 5, 1, 4, 2])
    own, expected = (Statistics({"gram", "sum_of_squares", "sum"}, 6, torch.device("cpu")) for _ in range(2))
    own.add(inputs)
    expected.add(inputs[:, order])
    for statistics in (own, expected):
        statistics.finish(lambda tensor: None)
    own.reorder(order)
    for kind, total in expected.totals().items():
        torch.testing.assert_close(own.totals()[kind], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_the_function_stays(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4:4 prunes nothing, so that only the order is new."""
    drawn = torch.Generator().manual_seed(2)
    monkeypatch.setattr(
        "hf_prune.structure.permutation.spread", lambda scores, n, m: torch.randperm(scores.shape[1], generator=drawn)
    )
    model, ids = tiny_model(family), tiny_ids(4, 32)
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        prune(model, WandaConfig(pattern="4:4", channel_permutation=True), input_ids=ids)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    moved = [name for name, own in model.state_dict().items() if not torch.equal(own, before[name])]
    # Every layer of the three MLPs, and nothing else.
    assert {name.split(".mlp.")[0].split(".fc")[0] for name in moved} == {
        name.split(".mlp.")[0].split(".fc")[0] for name in before if ".mlp." in name or ".fc" in name
    }
    assert all(".mlp." in name or ".fc" in name for name in moved)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_it_is_pruning_after_a_reordering_by_hand(method: str) -> None:
    from hf_prune import PruneConfig

    ids, model, by_hand = tiny_ids(), tiny_model("llama"), tiny_model("llama")
    inputs: dict[int, list[torch.Tensor]] = {}
    for index, layer in enumerate(by_hand.model.layers):
        hook = inputs.setdefault(index, []).append
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, keep=hook: keep(args[0].detach()))
    with torch.no_grad():
        by_hand(ids)
        for index, layer in enumerate(by_hand.model.layers):
            norms = torch.cat(inputs[index]).flatten(0, 1).double().square().sum(0).sqrt().float()
            down = layer.mlp.down_proj.weight
            order = spread(down.abs() * norms if method == "wanda" else down.abs(), 2, 4)
            assert order.tolist() != list(range(48))
            down.copy_(down[:, order])
            for producer in (layer.mlp.gate_proj, layer.mlp.up_proj):
                producer.weight.copy_(producer.weight[order])
    options = {"method": method, "criterion": method, "pattern": "2:4", "propagate": False}
    prune(model, PruneConfig(**options, channel_permutation=True), input_ids=ids)
    prune(by_hand, PruneConfig(**options), input_ids=ids)
    for name, own in by_hand.state_dict().items():
        assert torch.equal(own, model.state_dict()[name]), name


def test_a_block_whose_layers_are_not_all_pruned_is_left_alone() -> None:
    model, expected = tiny_model("llama"), tiny_model("llama")
    options = {"pattern": "2:4", "ignore": ["gate_proj"]}
    prune(model, WandaConfig(**options, channel_permutation=True), input_ids=tiny_ids())
    prune(expected, WandaConfig(**options), input_ids=tiny_ids())
    assert all(torch.equal(own, model.state_dict()[name]) for name, own in expected.state_dict().items())


def test_what_it_cannot_be_used_with() -> None:
    with pytest.raises(BadInputError, match="channel_permutation: an unstructured pattern has no groups of inputs"):
        WandaConfig(sparsity=0.5, channel_permutation=True)
    with pytest.raises(BadInputError, match="channel_permutation: method intra_fusion removes whole units"):
        IntraFusionConfig(channel_permutation=True)
    with pytest.raises(BadInputError, match="which rows and columns of a mixtral block belong together"):
        prune(tiny_model("mixtral"), WandaConfig(pattern="2:4", channel_permutation=True), input_ids=tiny_ids())
