"""Collapsed layers: against a search through a small network's graph, and against gradients of whole models."""

import itertools

import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor, nn

from hf_prune.plan import select_views
from hf_prune.structure.paths import collapsed_layers


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2)),
        nn.MaxPool2d(1), nn.Flatten(), nn.Linear(2 * 4, 5), nn.Tanh(), nn.Linear(5, 3),
        nn.LayerNorm(3), nn.Linear(3, 2),
    )  # fmt: skip


CHAIN = ["0.0.weight", "0.3.weight", "3.weight", "5.weight"]


def on_a_path(masks: dict[str, Tensor]) -> set[str]:
    """Layers of the chain with an edge on a path, by following every edge from every input, one after another."""
    edges: list[list[tuple[int, int]]] = []
    for name in CHAIN:
        mask, own = masks[name], []
        for place in mask.nonzero().tolist():
            # The linear layer behind the convolution has four inputs for each of its channels.
            before = place[1] // 4 if name == "3.weight" else place[1]
            own.append((before, place[0]))
        edges.append(own)
    found = set()

    def follow(layer: int, node: int) -> bool:
        if layer == len(CHAIN):
            return True
        arrives = False
        for before, after in edges[layer]:
            if before == node and follow(layer + 1, after):
                found.add(CHAIN[layer])
                arrives = True
        return arrives

    for node in range(2):
        follow(0, node)
    return found


def test_sequences_are_searched_by_hand() -> None:
    generator, seen = torch.Generator().manual_seed(0), set()
    model = network()
    for density in (0.02, 0.05, 0.1, 0.15, 0.3) * 8:
        masks = {
            name: torch.rand(own.shape, generator=generator) < density
            for name, own in model.named_parameters()
            if own.ndim > 1
        }
        wanted = on_a_path(masks)
        # Behind a normalisation over features nothing is known but the number.
        wanted |= {"7.weight"} if bool(masks["7.weight"].any()) else set()
        found = collapsed_layers(model, masks)
        assert found == [name for name in masks if name not in wanted]
        seen |= {(name in found, bool(masks[name].any())) for name in CHAIN}
    assert {(True, True), (True, False), (False, True)} == seen
    # What has no mask is whole.
    assert collapsed_layers(model, {"5.weight": torch.zeros(3, 5, dtype=torch.bool)}) == ["5.weight"]


def gradients(model: nn.Module, names: list[str], masks: dict[str, Tensor]) -> set[str]:
    """Layers of whose kept weights any has a gradient in the masked model."""
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(masks[name])
    logits = model(input_ids=tiny_ids(2, 12), use_cache=False).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    # Rounding in double precision leaves less than that of nothing.
    return {name for name in names if bool((model.get_parameter(name).grad[masks[name]].abs() > 1e-15).any())}


def cut_masks(model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Few rows and few columns stay, so that the survivors of two layers often miss each other.

    Queries and keys, and what is fused with them, have heads as a whole: whether two single features of a head meet is
    up to the family's positions.
    """
    head = model.config.hidden_size // model.config.num_attention_heads
    masks = {}
    for name in names:
        shape = model.get_parameter(name).shape
        rows, columns = (torch.rand(size, generator=generator) < 0.12 for size in shape)
        outputs = 1 if "c_attn" in name else 0
        if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value")):
            heads = (torch.rand(shape[outputs] // head, generator=generator) < 0.4).repeat_interleave(head)
            rows, columns = (rows, heads) if outputs else (heads, columns)
        masks[name] = rows[:, None] & columns
    return masks


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gpt_neox"])
def test_blocks_have_a_path_where_a_loss_has_a_gradient(family: str) -> None:
    generator, seen = torch.Generator().manual_seed(2), set()
    for seed in range(2):
        model = tiny_model(family, seed=seed).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and parameter.ndim == 1 and "norm" not in name and "ln_" not in name:
                    parameter.zero_()
        views = [view for view in select_views(model, None, None, whole=True)[0] if view.block < 3]
        names = [view.parameter_name for view in views]
        masks = cut_masks(model, names, generator)
        found = collapsed_layers(model, masks)
        assert found == [name for name in names if name not in gradients(model, names, masks)]
        seen |= {(name in found, bool(masks[name].any())) for name in names}
    assert {(True, True), (False, True)} <= seen


@pytest.mark.parametrize(
    ("family", "attention", "output"),
    [("qwen2", "model.layers.1.self_attn", "o_proj"), ("opt", "model.decoder.layers.1.self_attn", "out_proj")],
)
def test_a_bias_is_a_factor_and_no_path(family: str, attention: str, output: str) -> None:
    """A key meets the constant query of a head that has no weights; a query a constant key where places turn it."""
    for query, key in itertools.product((True, False), repeat=2):
        model = tiny_model(family).double()
        names = [f"{attention}.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", output)]
        masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names}
        masks[names[0]][:] = masks[names[1]][:] = False
        masks[names[0]][0], masks[names[1]][0] = query, key
        with torch.no_grad():
            for part in ("q", "k"):
                model.get_submodule(f"{attention}.{part}_proj").bias.fill_(0.5)
        found = collapsed_layers(model, masks)
        assert found == [name for name in names if name not in gradients(model, names, masks)]
        masks[names[2]][:] = False
        assert collapsed_layers(model, masks) == names
