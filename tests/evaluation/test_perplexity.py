"""The pure core against closed forms and an independent float64 loop."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation import perplexity as core
from hf_prune.evaluation.perplexity import bits_per_byte, bootstrap_ratio, perplexity, window_nll

VOCABULARY = 37


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.5, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (5, 33), generator=torch.Generator().manual_seed(1))


def reference_nll(model: LlamaForCausalLM, windows: torch.Tensor) -> list[float]:
    """One token at a time in numpy: the logits of each prefix's last position, log-sum-exp written out."""
    means = []
    for window in windows:
        losses = []
        for position in range(1, len(window)):
            with torch.no_grad():
                last = model(window[None, :position], use_cache=False).logits[0, -1].double().numpy()
            losses.append(np.log(np.exp(last - last.max()).sum()) + last.max() - last[window[position]])
        means.append(sum(losses) / len(losses))
    return means


def test_equals_a_float64_loop_over_prefixes(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    model.train()  # dropout must be off during evaluation, and the mode is put back
    nll = window_nll(model, windows)
    assert model.training
    assert nll.dtype == torch.float64
    model.eval()
    expected = reference_nll(model, windows)
    np.testing.assert_allclose(nll.numpy(), expected, rtol=1e-5)
    assert perplexity(nll) == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_chunks_leave_no_trace(
    model: LlamaForCausalLM, windows: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = window_nll(model, windows)
    monkeypatch.setattr(core, "POSITIONS_PER_CHUNK", chunk)
    torch.testing.assert_close(window_nll(model, windows), expected, rtol=1e-6, atol=0)


def test_constant_logits_have_the_perplexity_of_the_vocabulary(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    blank = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert perplexity(window_nll(blank, windows)) == pytest.approx(VOCABULARY, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.eval()
    with torch.no_grad():
        logits = half(windows, use_cache=False).logits.double()[:, :-1]
    expected = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).squeeze(-1).mean(-1)
    # Batched and single forward passes may round differently in bfloat16 (8 bits); the loss itself must not.
    torch.testing.assert_close(window_nll(half, windows), expected, rtol=2e-3, atol=0)


def test_names_the_window_that_is_not_finite(model: LlamaForCausalLM) -> None:
    broken = LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    broken.model.embed_tokens.weight.data[3] = float("nan")
    windows = torch.ones(3, 8, dtype=torch.long)
    windows[1:, 2] = 3
    with pytest.raises(RunError, match=r"window 1 is nan \(2 of 3 windows"):
        window_nll(broken, windows)


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (8,)])
def test_refuses_windows_with_nothing_to_predict(model: LlamaForCausalLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInputError, match="at least 2 tokens"):
        window_nll(model, torch.zeros(shape, dtype=torch.long))


def test_bits_per_byte_of_a_uniform_byte_model_is_eight() -> None:
    """A model that gives each of 256 byte-tokens the same chance needs 8 bits a byte; two-byte tokens halve that."""
    nll = torch.full((4,), math.log(256), dtype=torch.float64)
    assert bits_per_byte(nll, 15, torch.full((4,), 15)) == pytest.approx(8)
    assert bits_per_byte(nll, 15, torch.full((4,), 30)) == pytest.approx(4)


def test_bits_per_byte_weighs_windows_by_their_tokens_not_by_their_bytes() -> None:
    nll = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert bits_per_byte(nll, 10, torch.tensor([20, 60])) == pytest.approx((10 + 30) / math.log(2) / 80)


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=40))
@settings(max_examples=25)
def test_ratio_of_a_model_to_itself_is_exactly_one(values: list[float]) -> None:
    nll = torch.tensor(values, dtype=torch.float64)
    assert bootstrap_ratio(nll, nll.clone(), resamples=100) == ((1, 1, 1) if len(values) > 1 else (1, None, None))


def test_bootstrap_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(3, 0.3, 48)
    pruned = dense + generator.normal(0.4, 0.1, 48)

    def ratio(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(second.mean(axis)) / np.exp(first.mean(axis))

    interval = scipy.stats.bootstrap(
        (dense, pruned), ratio, paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    middle, low, high = bootstrap_ratio(torch.from_numpy(dense), torch.from_numpy(pruned), resamples=20_000)
    assert middle == pytest.approx(ratio(dense, pruned))
    # The interval is about 0.08 wide; two resamplings of 20,000 differ by a hundredth of that.
    assert low == pytest.approx(interval.low, abs=2e-3)
    assert high == pytest.approx(interval.high, abs=2e-3)


def test_bootstrap_is_seeded_and_pairs_windows() -> None:
    dense = torch.linspace(1, 9, 20, dtype=torch.float64)
    shifted = dense + 0.5  # windows differ wildly, the change does not: an unpaired interval would be wide
    assert bootstrap_ratio(dense, shifted, resamples=200) == pytest.approx((math.exp(0.5),) * 3)
    noisy = dense + torch.linspace(0, 1, 20).flip(0)
    assert bootstrap_ratio(dense, noisy, resamples=200, seed=3) == bootstrap_ratio(dense, noisy, resamples=200, seed=3)


def test_bootstrap_refuses_different_windows() -> None:
    with pytest.raises(BadInputError, match="4 and 3 windows"):
        bootstrap_ratio(torch.zeros(4), torch.zeros(3))
