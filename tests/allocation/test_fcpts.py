"""Learned thresholds: densities against scipy, gradients against finite differences, budgets, resuming, memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde, norm
from tiny import matrix_of, tiny_ids, tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune.allocation.base import Work
from hf_prune.allocation.bridge import Bridge
from hf_prune.allocation.density import ScoreDensity
from hf_prune.allocation.fcpts import Fcpts
from hf_prune.compose import make_allocation, make_config, make_solver
from hf_prune.engine.gradients import fisher_factors
from hf_prune.engine.masked import ThresholdedView, ThresholdedWeight, thresholded
from hf_prune.engine.teacher import TeacherLogits
from hf_prune.engine.threshold_training import ThresholdTask
from hf_prune.errors import BadInputError, RunError
from hf_prune.plan import Plan
from hf_prune.pruning import plan_pruning, provisional_plan, prune
from hf_prune.weights import find_blocks, find_views


def scores(count: int = 20_000) -> Tensor:
    """Two bumps and a tail, nothing that a normal distribution would fit."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, count // 2, generator=generator)
    return torch.cat([0.02 * left - 0.03, 0.01 * right + 0.02 * right**3])


def learned(model: nn.Module, folder: Path | None = None, **options: object) -> Plan:
    """The plan of a short learning on a tiny model."""
    values = {"method": "magnitude", "allocation": "fcpts", "sparsity": 0.7, "fcpts_steps": 20, **options}
    return plan_pruning(model, make_config(values), input_ids=tiny_ids(), statistics_folder=folder)


def lively_model() -> nn.Module:
    """A tiny model whose blocks move its output."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 8.0)
    return model


def densities(plan: Plan) -> list[float]:
    return [view.density for view in plan.views]


@pytest.mark.parametrize("count", [1_000, 20_000])
def test_the_kernel_density_is_scipys(count: int) -> None:
    values = scores(count)
    ours = ScoreDensity.kernel(values)
    theirs = gaussian_kde(values.double().numpy(), bw_method=1.06 * count**-0.2)
    places = numpy.linspace(-0.12, 0.12, 41)
    expected = theirs(places)
    assert [ours.at(place) for place in places] == pytest.approx(expected, rel=2e-3, abs=1e-3 * expected.max())
    assert ours.at(1e3) == 0.0
    assert ours.sparsity_slope(0.03) == pytest.approx(theirs([0.03])[0] + theirs([-0.03])[0], rel=2e-3)


def test_the_histogram_density_is_numpys() -> None:
    values = scores()
    heights, edges = numpy.histogram(values.numpy(), bins=100, density=True)
    ours = ScoreDensity.histogram(values)
    middles = (edges[1:] + edges[:-1]) / 2
    assert [ours.at(place) for place in middles] == pytest.approx(heights, rel=1e-5)
    assert ours.at(edges[0] - 1) == ours.at(edges[-1] + 1) == 0.0


@pytest.mark.parametrize(("kind", "tolerance"), [("kernel", 0.02), ("histogram", 0.06)])
def test_the_slope_is_the_derivative_of_the_count(kind: str, tolerance: float) -> None:
    values = 0.02 * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    density = getattr(ScoreDensity, kind)(values)
    for threshold in (0.005, 0.015, 0.03):
        step = 0.001
        counted = ((values.abs() <= threshold + step).sum() - (values.abs() <= threshold - step).sum()) / len(values)
        assert density.sparsity_slope(threshold) == pytest.approx(float(counted) / (2 * step), rel=tolerance)
        assert density.sparsity_slope(threshold) == pytest.approx(2 * norm.pdf(threshold, scale=0.02), rel=tolerance)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_the_threshold_gradient_is_that_of_a_ramp(scaled: bool, by_row: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    gradient = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    scale = torch.rand(30, generator=generator, dtype=torch.float64) + 0.5 if scaled else None
    row_scale = torch.rand(40, 1, generator=generator, dtype=torch.float64) + 0.5 if by_row else None
    threshold = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    window = 0.1
    (ThresholdedWeight.apply(weight, scale, row_scale, threshold, window) * gradient).sum().backward()

    def smoothed(at: float) -> float:
        q = weight.abs() * (1.0 if scale is None else scale) * (1.0 if row_scale is None else row_scale)
        return float((((q - at) / (2 * window) + 0.5).clamp(0, 1) * weight * gradient).sum())

    # Small enough that no weight crosses the ramp's ends on the way.
    step = 1e-7
    numeric = (smoothed(0.6 + step) - smoothed(0.6 - step)) / (2 * step)
    assert float(threshold.grad) == pytest.approx(numeric, rel=1e-4)


def test_a_window_of_one_is_the_released_estimator() -> None:
    weight = torch.tensor([[0.3, -0.8, 1.9, -0.1]])
    gradient = torch.tensor([[2.0, 1.0, 5.0, 3.0]])
    threshold = torch.tensor(0.5, requires_grad=True)
    trained = weight.clone().requires_grad_(True)
    masked = ThresholdedWeight.apply(trained, None, None, threshold, 1.0)
    assert masked.tolist() == [[0.0, pytest.approx(-0.8), pytest.approx(1.9), 0.0]]
    (masked * gradient).sum().backward()
    # 0.5 sign(|w| - t) + 0.5, its gradient let through where ||w| - t| < 1: all but 1.9.
    assert float(threshold.grad) == pytest.approx(-0.5 * (0.6 - 0.8 - 0.3))
    assert trained.grad is not None and trained.grad.tolist() == [[0.0, 1.0, 5.0, 0.0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masked_forwards_are_those_of_a_masked_model(family: str) -> None:
    model, masked = tiny_model(family), tiny_model(family)
    views = [view for view in find_views(model) if view.block < 3]
    scales = [torch.rand(view.shape[1], generator=torch.Generator().manual_seed(5)) + 0.5 for view in views]
    row_scales = [torch.rand(view.shape[0], generator=torch.Generator().manual_seed(6)) + 0.5 for view in views]
    thresholds = torch.linspace(0.005, 0.03, len(views))
    for view, scale, row_scale, threshold in zip(find_views(masked), scales, row_scales, thresholds, strict=False):
        weight = view.read()
        view.write(weight * (weight.abs() * scale * row_scale[:, None] > threshold))
    parts = [
        ThresholdedView(view, scale, 0.01, own) for view, scale, own in zip(views, scales, row_scales, strict=True)
    ]
    input_ids = tiny_ids(2, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), thresholded(find_blocks(model)[1], parts, thresholds):
        got = model(input_ids).logits
    assert torch.equal(got, masked(input_ids).logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(model(input_ids).logits, got)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_torchs_and_a_lower_bound_where_cut(temperature: float) -> None:
    teacher, student = torch.randn(2, 3, 7, 50, generator=torch.Generator().manual_seed(2)).mul(3).unbind(0)
    whole = functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.log_softmax(teacher / temperature, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert torch.allclose(TeacherLogits.of(teacher, temperature, 50).divergence(student, temperature), whole, atol=1e-5)
    bounds = [TeacherLogits.of(teacher, temperature, kept).divergence(student, temperature) for kept in (2, 10, 49)]
    assert all((low <= high + 1e-5).all() for low, high in zip(bounds, [*bounds[1:], whole], strict=True))
    assert (bounds[0] >= 0).all()
    # Cut to two tokens it is the divergence of three-way distributions.
    p, q = (functional.softmax(logits / temperature, -1) for logits in (teacher, student))
    top = p.topk(2, -1).indices
    three = [torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q)]
    expected = (three[0] * (three[0] / three[1]).log()).sum(-1)
    assert torch.allclose(bounds[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@given(
    sparsity=st.floats(0.1, 0.95),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    use=st.sampled_from([("fcpts", "magnitude"), ("fcpts", "wanda"), ("wanda", "wanda")]),
)
@example(sparsity=0.6, share=0.9, use=("fcpts", "wanda"))
@example(sparsity=0.61, share=0.0, use=("wanda", "wanda"))
@settings(max_examples=8, deadline=None)
def test_any_budget_is_met(family: str, sparsity: float, share: float, use: tuple[str, str]) -> None:
    model = tiny_model(family)
    # The highest floors lie above what rows of 32 inputs can keep of such a budget in whole weights: see below.
    floor = share * (1 - sparsity) if use[0] == "fcpts" else 0.0
    values = {
        "method": use[0], "allocation": "fcpts", "fcpts_score": use[1], "sparsity": sparsity, "min_keep_ratio": floor,
        "fcpts_steps": 3, "fcpts_learning_rate": 0.5,
    }  # fmt: skip
    result = prune(model, make_config(values), input_ids=tiny_ids(4, 32))
    kept = sum(int((matrix_of(model.state_dict(), view) != 0).sum()) for view in result.plan.views)
    total = sum(view.numel for view in result.plan.views)
    planned = sum(view.density * view.numel for view in result.plan.views) / total
    # Wanda keeps a whole number of weights in every row: the budget is met to half a weight a row of one matrix.
    rows = max(view.shape[0] for view in result.plan.views) if use[0] == "wanda" else 0
    assert 1 - planned == pytest.approx(sparsity, abs=1e-6 + rows / 2 / total)
    assert all(view.density >= floor - 1e-12 for view in result.plan.views)
    # A tiny model's matrices are counted in whole weights: half a weight each, or what whole weights a row are more.
    least = [math.ceil(floor * view.shape[1] - 1e-9) * view.shape[0] for view in result.plan.views]
    slack = sum(
        0.5 + max(own - view.density * view.numel, 0) for own, view in zip(least, result.plan.views, strict=True)
    )
    assert abs(1 - kept / total - sparsity) <= max(5e-4, (slack + rows / 2) / total)
    assert (sparsity, share) != (0.6, 0.9) or any(view.floor for view in result.plan.views)


def test_learning_from_fisher_starts_at_one_threshold_over_all_layers() -> None:
    model = lively_model()
    views = [view for view in find_views(model) if view.name != "lm_head"]
    options = {"fcpts_score": "fisher", "fcpts_start": "fisher", "fcpts_steps": 5}
    # So small a rate moves nothing.
    still = densities(learned(model, fcpts_learning_rate=1e-12, **options))
    factors = fisher_factors(model, views, tiny_ids())
    scores = []
    for view in views:
        own = factors[view.name]
        costs = own.outputs + 0.5 * own.outputs.mean()
        scores.append(view.read() ** 2 * own.inputs * costs[:, None])
    everything = torch.cat([own.flatten() for own in scores])
    threshold = everything.kthvalue(round(0.7 * everything.numel())).values
    assert still == pytest.approx([float((own > threshold).float().mean()) for own in scores], abs=5e-3)
    assert max(still) - min(still) > 0.1
    # Learning goes elsewhere.
    gained = densities(
        learned(model, fcpts_steps=30, fcpts_learning_rate=0.1, fcpts_score="fisher", fcpts_start="fisher")
    )
    assert gained != pytest.approx(still, abs=1e-2)
    with pytest.raises(BadInputError, match="fcpts_start: fisher compares"):
        Fcpts(fcpts_start="fisher")
    with pytest.raises(BadInputError, match="fcpts_score: fisher is for allocation fcpts"):
        make_solver(make_config({"method": "fcpts", "fcpts_score": "fisher", "sparsity": 0.5}))


def test_weights_that_do_nothing_are_pruned_first() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for view in find_views(model):
            if view.name.endswith("1.self_attn.o_proj") or view.name.endswith("1.mlp.down_proj"):
                view.parameter.mul_(1e-6)
    plan = learned(model, fcpts_start="uniform", fcpts_steps=40, fcpts_learning_rate=0.1)
    # Whatever q, k, v, gate and up of block 1 compute goes nowhere.
    idle = [view.density for view in plan.views if view.block == 1 and view.shape[1] == 32]
    busy = [view.density for view in plan.views if view.block != 1]
    assert max(idle) < 0.3 < sum(busy) / len(busy) and sum(idle) / len(idle) < 0.6 * sum(busy) / len(busy)


def test_layers_that_erk_keeps_whole_learn_where_they_begin_capped() -> None:
    def keys_and_values(start: str) -> list[float]:
        plan = learned(tiny_model("llama"), sparsity=0.3, fcpts_start=start, fcpts_steps=30, fcpts_learning_rate=0.1)
        total = sum(view.numel for view in plan.views)
        assert sum(view.density * view.numel for view in plan.views) / total == pytest.approx(0.7, abs=1e-6)
        return [view.density for view in plan.views if view.name.endswith(("k_proj", "v_proj"))]

    # ERK would keep more of these than there is.
    assert min(keys_and_values("erk")) > 0.999
    assert max(abs(density - 0.85) for density in keys_and_values("capped_erk")) > 0.05


def test_without_the_gradient_the_allocation_stays_where_it_started() -> None:
    stuck = learned(tiny_model("llama"), fcpts_gradient=False, fcpts_start="erk")
    start = plan_pruning(
        tiny_model("llama"), make_config({"method": "magnitude", "allocation": "erk", "sparsity": 0.7})
    )
    assert densities(stuck) == pytest.approx(densities(start), abs=3e-3)
    moved = densities(learned(tiny_model("llama")))
    assert max(abs(a - b) for a, b in zip(moved, densities(start), strict=True)) > 0.01


def test_the_penalty_pulls_towards_the_budget() -> None:
    config = make_config({"method": "magnitude", "allocation": "fcpts", "sparsity": 0.7})
    rule = make_allocation(config)
    assert isinstance(rule, Fcpts)
    layers = [rule.measure_scores(scores(), None), rule.measure_scores(3 * scores(4_000), None)]
    bridge = Bridge(layers, 0.7)
    places = bridge.scores([0.5, 0.4])
    assert bridge.sparsities(places) == pytest.approx([0.5, 0.6], abs=1e-3)
    assert bridge.total(places) == pytest.approx((0.5 * 20_000 + 0.6 * 4_000) / 24_000, abs=1e-3)
    for number in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[number] = 0.2
        difference = (abs(bridge.total(places + step) - 0.7) - abs(bridge.total(places - step) - 0.7)) / 0.4
        assert float(bridge.penalty_gradient(places)[number]) == pytest.approx(difference, rel=0.1)
    assert bridge.total(bridge.on_budget(places)) == pytest.approx(0.7, abs=1e-6)
    along = bridge.along_budget(torch.tensor([1.0, -2.0], dtype=torch.float64), places)
    assert float(along @ bridge.growth(places)) == pytest.approx(0, abs=1e-12)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    first, again, other = (densities(learned(tiny_model("llama"), fcpts_seed=seed)) for seed in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("train_weights", [False, True])
def test_a_cut_run_goes_on_and_ends_the_same(
    train_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "method": "fcpts",
        "sparsity": 0.7,
        "fcpts_steps": 20,
        "fcpts_patience": 9,
        "train_weights": train_weights,
    }
    config = make_config({**values, "weight_learning_rate": 1e-3} if train_weights else values)
    whole = tiny_model("llama")
    expected = plan_pruning(whole, config, input_ids=tiny_ids())
    looked = []
    original = ThresholdTask.held_out_loss

    def cut(self: ThresholdTask, thresholds: Tensor) -> float:
        looked.append(1)
        if len(looked) == 4:
            raise KeyboardInterrupt
        return original(self, thresholds)

    monkeypatch.setattr(ThresholdTask, "held_out_loss", cut)
    with pytest.raises(KeyboardInterrupt):
        plan_pruning(tiny_model("llama"), config, input_ids=tiny_ids(), statistics_folder=tmp_path)
    resumed = tiny_model("llama")
    assert plan_pruning(resumed, config, input_ids=tiny_ids(), statistics_folder=tmp_path) == expected
    # Six looks in all, one of them before the first step: three before the cut, one lost, three after it.
    assert len(looked) == 4 + 3
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    # Other text, other learning.
    plan_pruning(tiny_model("llama"), config, input_ids=tiny_ids(seed=9), statistics_folder=tmp_path)
    assert len(looked) == 4 + 3 + 6


def test_learning_ends_when_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    original = ThresholdTask.held_out_loss
    monkeypatch.setattr(ThresholdTask, "held_out_loss", lambda *own: looks.append(original(*own)) or looks[-1])
    # Thresholds without a gradient stay where they are: one look before the first step, then as many as are borne.
    learned(tiny_model("llama"), fcpts_gradient=False, fcpts_steps=50, fcpts_patience=2)
    assert len(looks) == 3 and looks[0] == pytest.approx(looks[2], rel=1e-3)


def test_what_overflows_is_said() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.mul_(1e38)
    with pytest.raises(RunError, match="gradient of the thresholds is not finite"):
        learned(model)


def test_trained_weights_come_nearer_to_the_dense_model() -> None:
    def distance(train_weights: bool) -> float:
        dense, model = lively_model(), lively_model()
        values = {"method": "fcpts", "sparsity": 0.5, "fcpts_batch_size": 4, "train_weights": train_weights}
        result = prune(
            model, make_config({**values, **({"weight_learning_rate": 1e-2} if train_weights else {})}), input_ids=ids
        )
        assert result.sparsity == pytest.approx(0.5, abs=1e-3)
        with torch.no_grad():
            return float(TeacherLogits.of(dense(ids).logits, 1.0, 260).divergence(model(ids).logits, 1.0).mean())

    ids = tiny_ids()
    assert distance(True) < 0.8 * distance(False)


def test_training_weights_is_for_the_method_alone() -> None:
    with pytest.raises(BadInputError, match="train_weights: method sparsegpt starts from the dense weights"):
        make_config({"method": "sparsegpt", "allocation": "fcpts", "train_weights": True})
    with pytest.raises(BadInputError, match="nothing to decide"):
        make_config({"method": "fcpts", "pattern": "2:4"})
    plan, final = provisional_plan(tiny_model("llama"), make_config({"method": "fcpts", "train_weights": True}))
    assert (final, plan.allocation, plan.sparsity) == (False, "fcpts", 0.5)
    with pytest.raises(BadInputError, match="train_weights: weights are learned together with thresholds"):
        make_config({"method": "fcpts", "allocation": "erk", "train_weights": True})
    for key, value in {
        "criterion": "wanda",
        "update": "sparsegpt",
        "reconstruct": "block",
        "fcpts_score": "wanda",
    }.items():
        with pytest.raises(BadInputError, match=f"{key}: {value} would start from weights"):
            make_config({"method": "fcpts", "train_weights": True, key: value})
    with pytest.raises(BadInputError, match=r"train_weights: .* set dtype to float32"):
        config = make_config({"method": "fcpts", "train_weights": True})
        plan_pruning(tiny_model("llama").bfloat16(), config, input_ids=tiny_ids())
    with pytest.raises(BadInputError, match="2 or more"):
        plan_pruning(tiny_model("llama"), make_config({"method": "fcpts"}), input_ids=tiny_ids(1))


def test_recomputing_changes_no_result_and_keeps_less() -> None:
    def run(recompute: bool) -> tuple[list[float], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plan = learned(tiny_model("llama"), gradient_checkpointing=recompute, fcpts_steps=2)
        return densities(plan), kept

    (plain, much), (frugal, little) = run(False), run(True)
    assert plain == pytest.approx(frugal, abs=1e-6)
    assert little < 0.6 * much


def test_the_estimated_memory_is_near_what_a_step_holds() -> None:
    """Bytes that autograd keeps at one time, each storage once and parameters not at all, against `memory_bytes`."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, vocab_size=300
    )
    model = LlamaForCausalLM(config).eval()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.place = tensor, tensor.untyped_storage().data_ptr()
            if self.place not in own:
                nonlocal peak
                held[self.place] = tensor.untyped_storage().nbytes()
                peak = max(peak, sum(held.values()))

        def __del__(self) -> None:
            held.pop(self.place, None)

    options = {"fcpts_steps": 1, "fcpts_teacher_tokens": 10}
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        learned(model, **options)
    samples, tokens = tiny_ids().shape
    blocks = [[view.shape for view in find_views(model) if view.block == number] for number in range(6)]
    work = Work(blocks, samples, tokens, 64, 300, 4)
    estimated, frugal = (
        make_allocation(
            make_config({"allocation": "fcpts", **options, "gradient_checkpointing": recompute})
        ).memory_bytes(work)
        for recompute in (False, True)
    )
    assert 0.5 * estimated < peak < 1.1 * estimated
    # One block at a time of the six.
    assert frugal < 0.5 * estimated
