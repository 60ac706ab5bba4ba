"""Which units stay and what their consumer becomes, against least squares, brute force, loops and autograd."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_ids, tiny_model

from hf_prune.engine.gradients import loss_gradients
from hf_prune.engine.statistics import Statistics
from hf_prune.errors import BadInputError
from hf_prune.methods.intra_fusion import IntraFusionConfig
from hf_prune.pruning import prune
from hf_prune.structure.groups import MLP, block_shape, find_groups
from hf_prune.structure.importance import Evidence, importance, least_output_error, most_important
from hf_prune.structure.refit import damped, refit_kept, refit_new


def weights(seed=0, rows=6, columns=10, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator)
    return weight, torch.randn(tokens, columns, generator=generator) @ mixed


def test_the_refit_is_the_least_squares_solution():
    weight, inputs = weights()
    gram = damped((inputs.T @ inputs).double(), 0.01)
    kept = torch.tensor([0, 2, 3, 7])
    own = refit_kept(weight, gram, kept)
    # Damping is as good as so many more, uncorrelated, tokens.
    extra = float(gram.diagonal().mean() - (inputs.T @ inputs).diagonal().mean()) ** 0.5
    rows = np.concatenate([inputs.double().numpy(), extra * np.eye(10)])
    expected, *_ = np.linalg.lstsq(rows[:, kept.numpy()], rows @ weight.double().numpy().T, rcond=None)
    assert np.allclose(own.numpy(), expected.T, atol=1e-4)
    assert torch.allclose(refit_kept(weight, gram, torch.arange(10)), weight, atol=1e-4)


def test_the_refit_of_fused_units_is_the_ridge_solution():
    weight, inputs = weights(1)
    fused = weights(2, rows=6, columns=4)[0]
    new = torch.tanh(inputs[:, :4])
    residual = new.T @ (inputs @ weight.T - new @ fused.T)
    own = refit_new(fused, (new.T @ new).double(), residual, 0.05)
    penalty = (0.05 * float((new.T @ new).diagonal().mean())) ** 0.5
    rows = np.concatenate([new.double().numpy(), penalty * np.eye(4)])
    wanted = np.concatenate([(inputs @ weight.T).double().numpy(), penalty * fused.double().numpy().T])
    expected, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    assert np.allclose(own.numpy(), expected.T, atol=1e-4)


def output_error(weight, gram, kept):
    """Squared output error, damping included, of the best weights on some columns; by lstsq through a factor."""
    rows = np.linalg.cholesky(gram.numpy()).T
    target = rows @ weight.double().numpy().T
    solution, *_ = np.linalg.lstsq(rows[:, kept], target, rcond=None)
    return float(((target - rows[:, kept] @ solution) ** 2).sum())


def test_backward_elimination_removes_what_a_brute_force_search_removes():
    model = tiny_model("llama")
    group = find_groups(model, 0, MLP, block_shape(model))[0]
    inputs = torch.randn(200, 48, generator=torch.Generator().manual_seed(3)) @ weights(4, 48, 48)[0]
    gram = damped((inputs.T @ inputs).double(), 0.01)
    weight = group.consumer.view.read()
    left = list(range(48))
    while len(left) > 40:
        # One at a time, each time the unit that the others make up for best.
        errors = [output_error(weight, gram, [unit for unit in left if unit != gone]) for gone in left]
        left.remove(left[int(np.argmin(errors))])
    assert least_output_error(group, gram, 40).tolist() == left


def test_backward_elimination_of_whole_heads_is_near_the_best_subset():
    model = tiny_model("llama")
    shape = block_shape(model)
    group = find_groups(model, 0, "heads", shape)[1]
    inputs = torch.randn(300, 32, generator=torch.Generator().manual_seed(3)) @ weights(4, 32, 32)[0]
    gram = damped((inputs.T @ inputs).double(), 0.01)
    weight = group.consumer.view.read()

    def columns(heads):
        others = [c for c in range(32) if not 16 <= c < 32]
        return others + [c for head in heads for c in range(16 + 8 * head, 24 + 8 * head)]

    best = min(itertools.combinations(range(2), 1), key=lambda heads: output_error(weight, gram, columns(heads)))
    assert least_output_error(group, gram, 1).tolist() == list(best)


def test_importances_against_plain_loops():
    model = tiny_model("llama")
    group = find_groups(model, 1, MLP, block_shape(model))[0]
    mlp = model.model.layers[1].mlp
    inputs = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)) + 0.3
    statistics = Statistics(("sum", "sum_of_squares"), 48, torch.device("cpu"))
    statistics.add(inputs)
    statistics.finish(lambda tensor: None)
    down, x = mlp.down_proj.weight.detach().numpy(), inputs.double().numpy()
    expected = {
        "activation": [np.linalg.norm(x[:, j]) for j in range(48)],
        "wanda": [np.linalg.norm(down[:, j]) * np.linalg.norm(x[:, j]) for j in range(48)],
        "variance": [np.var(x[:, j]) * np.sum(down[:, j] ** 2) for j in range(48)],
    }
    for name, values in expected.items():
        assert np.allclose(importance(name, group, Evidence(statistics)).numpy(), values, rtol=1e-4)
    gate, up = mlp.gate_proj.weight.detach().numpy(), mlp.up_proj.weight.detach().numpy()
    sums = np.array([(abs(gate[j]).sum() + abs(up[j]).sum() + abs(down[:, j]).sum()) / 3 for j in range(48)])
    assert np.allclose(importance("l1", group, Evidence()).numpy(), sums / sums.mean(), rtol=1e-5)


def test_the_product_of_norms_does_not_see_where_inside_a_unit_its_scale_stands():
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data = torch.linspace(0.5, 2, 32)
    group, mlp = find_groups(model, 1, MLP, block_shape(model))[0], model.model.layers[1].mlp
    gain = model.model.layers[1].post_attention_layernorm.weight
    expected = (mlp.gate_proj.weight * gain).norm(dim=1) * (mlp.up_proj.weight * gain).norm(dim=1)
    expected = expected * mlp.down_proj.weight.norm(dim=0)
    assert torch.allclose(importance("product", group, Evidence()), expected, rtol=1e-4)
    # The same function, scaled otherwise inside.
    mlp.up_proj.weight.data[5] *= 8
    mlp.down_proj.weight.data[:, 5] /= 8
    assert torch.allclose(importance("product", group, Evidence()), expected, rtol=1e-4)


def test_taylor_importance_is_the_gradient_of_the_loss():
    model, ids = tiny_model("gpt2"), tiny_ids(3, 16)
    gradients = loss_gradients(model, ids)
    group = find_groups(model, 2, MLP, block_shape(model))[0]
    scores = importance("taylor", group, Evidence(gradients=gradients))
    for parameter in model.parameters():
        assert parameter.grad is None and parameter.requires_grad
    sum(model(window[None], labels=window[None]).loss for window in ids).backward()
    mlp = model.transformer.h[2].mlp
    expected = (mlp.c_fc.weight * mlp.c_fc.weight.grad).abs().sum(dim=0)
    expected += (mlp.c_proj.weight * mlp.c_proj.weight.grad).abs().sum(dim=1)
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-7)


def test_ties_go_to_the_earlier_unit():
    assert most_important(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


def test_a_file_of_scores_says_which_units_stay(tmp_path):
    model = tiny_model("llama")
    shape = block_shape(model)
    generator = torch.Generator().manual_seed(5)
    scores = {f"mlp.{block}": torch.rand(48, generator=generator) for block in range(len(model.model.layers))}
    save_file(scores, tmp_path / "scores.safetensors")
    dense = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    config = IntraFusionConfig(fusion="none", importance=str(tmp_path / "scores.safetensors"), sparsity=0.2)
    result = prune(model, config)
    for block, layer in enumerate(model.model.layers):
        kept = scores[f"mlp.{block}"].argsort(descending=True)[: layer.mlp.up_proj.out_features].sort().values
        assert len(kept) < 48 and torch.equal(layer.mlp.up_proj.weight, dense[block][kept])
        assert result.reduction.kept[block]["mlp"] == kept.tolist()
    group = find_groups(tiny_model("llama"), 1, MLP, shape)[0]
    for wrong, message in (({}, "has no scores for mlp.1"), ({"mlp.1": torch.ones(3)}, "has 3 scores for mlp.1")):
        with pytest.raises(BadInputError, match=f"importance: x.safetensors {message}, whose units are 48"):
            importance("x.safetensors", group, Evidence(scores=wrong))
    with pytest.raises(BadInputError, match=r"importance: .*gone\.safetensors cannot be read"):
        prune(tiny_model("llama"), IntraFusionConfig(fusion="none", importance=str(tmp_path / "gone.safetensors")))
    with pytest.raises(BadInputError, match="importance: a file scores no whole blocks; leave depth out of units"):
        IntraFusionConfig(fusion="none", importance="x.safetensors", units=["mlp", "depth"])


def test_a_file_that_lacks_a_block_changes_nothing(tmp_path):
    model = tiny_model("llama")
    before = {name: own.clone() for name, own in model.state_dict().items()}
    save_file({"mlp.0": torch.rand(48)}, tmp_path / "scores.safetensors")
    config = IntraFusionConfig(fusion="none", importance=str(tmp_path / "scores.safetensors"), sparsity=0.2)
    with pytest.raises(BadInputError, match=r"no scores .*mlp\.1"):
        prune(model, config)
    assert all(torch.equal(before[name], own) for name, own in model.state_dict().items())


@pytest.mark.parametrize("mass", ["source_mass", "target_mass"])
def test_masses_in_proportion_to_nothing_are_refused(mass, tmp_path):
    model = tiny_model("llama")
    save_file({f"mlp.{block}": -torch.rand(48) for block in range(3)}, tmp_path / "scores.safetensors")
    config = IntraFusionConfig(importance=str(tmp_path / "scores.safetensors"), sparsity=0.2, **{mass: "importance"})
    with pytest.raises(BadInputError, match="no unit of mlp in block 0 has a score above 0"):
        prune(model, config)


def test_a_file_scores_heads_through_all_key_value_groups(tmp_path):
    model = tiny_model("llama")
    size, blocks = block_shape(model).head_size, len(model.model.layers)
    # Two heads in each of two groups: one of each stays, though both of the best are in the first.
    scores = torch.tensor([4.0, 3.0, 1.0, 2.0])
    save_file({f"heads.{block}": scores.clone() for block in range(blocks)}, tmp_path / "scores.safetensors")
    dense = [layer.self_attn.q_proj.weight.detach().clone() for layer in model.model.layers]
    importance_file = str(tmp_path / "scores.safetensors")
    result = prune(model, IntraFusionConfig(fusion="none", importance=importance_file, units=["heads"], sparsity=0.1))
    for block, layer in enumerate(model.model.layers):
        heads = dense[block].reshape(4, size, -1)
        assert torch.equal(layer.self_attn.q_proj.weight, heads[[0, 3]].flatten(0, 1))
        assert result.reduction.kept[block]["heads"] == [0, 3]
    with pytest.raises(BadInputError, match=r"has 2 scores for heads\.0, whose units are 4"):
        group = find_groups(tiny_model("llama"), 0, "heads", block_shape(tiny_model("llama")))[1]
        importance("x.safetensors", group, Evidence(scores={"heads.0": torch.ones(2)}))
