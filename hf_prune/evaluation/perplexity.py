"""Perplexity, bits per byte and the uncertainty of a change: plain torch and numpy, nothing else.

The protocol is that of the GPTQ / SparseGPT / Wanda line of work: non-overlapping windows of `seq_length` tokens, and
perplexity = exp(mean over windows of the mean negative log-likelihood of the window's seq_length - 1 predicted tokens).
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.offload import in_turn, offload_of
from hf_prune.engine.stream import HiddenStates
from hf_prune.errors import BadInputError, RunError
from hf_prune.progress import progress

# The logits of a window are there once, in the model's dtype; only this many positions at a time are copied to float32.
POSITIONS_PER_CHUNK = 128


def window_nll(model: PreTrainedModel, input_ids: Tensor, *, description: str = "evaluating") -> Tensor:
    """Mean negative log-likelihood (nats per token) of each window's tokens 2..seq_length given those before them.

    Windows go through the model one by one, without padding, mask or cache, with dropout off.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        input_ids: int64 [windows, seq_length], on any device.
        description: the progress bar's label.

    Returns:
        float64 [windows] on the CPU.

    Raises:
        BadInputError: no window, or windows with nothing to predict.
        RunError: a window's likelihood is NaN or infinite.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise BadInputError(
            f"perplexity needs at least one window of at least 2 tokens, but input_ids has shape"
            f" {list(input_ids.shape)}; raise seq_length or hand over more text."
        )
    was_training = model.training
    model.eval()
    try:
        if offload_of(model) is None:
            windows = progress(input_ids, description, total=len(input_ids))
            losses = [one_window_nll(model, window) for window in windows]
        else:
            losses = _by_block(model, input_ids, description)
    finally:
        model.train(was_training)
    nll = torch.tensor(losses, dtype=torch.float64)
    broken = (~nll.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise RunError(
            f"the model's likelihood of window {broken[0]} is {losses[broken[0]]} ({len(broken)} of {len(losses)}"
            f" windows are not finite); look for NaN or infinite weights, or evaluate with dtype float32."
        )
    return nll


def _by_block(model: PreTrainedModel, input_ids: Tensor, description: str) -> list[float]:
    """The same numbers, each block read once: all windows go through it before the next one comes."""
    states = HiddenStates(model)
    hidden: list[Tensor | None] = [None] * len(input_ids)
    with BlockRunner(model) as runner:
        for index in in_turn(model, progress(range(len(runner.blocks)), description)):
            for place, window in enumerate(input_ids):
                hidden[place] = states.keep(runner.run(index, window[None], hidden[place]))
        losses = []
        for window, last in zip(input_ids, hidden, strict=True):
            with runner.behind(last):
                losses.append(one_window_nll(model, window))
    return losses


@torch.inference_mode()
def one_window_nll(model: PreTrainedModel, window: Tensor) -> float:
    """Mean negative log-likelihood of one window, int64 [seq_length]; summed in float64, so chunks leave no trace."""
    logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
    targets = window[1:].to(logits.device)
    chunks = zip(logits.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True)
    losses = [torch.nn.functional.cross_entropy(rows.float(), ids, reduction="none") for rows, ids in chunks]
    return torch.cat(losses).cpu().double().mean().item()


def perplexity(nll: Tensor) -> float:
    """exp of the mean over windows of `nll`, float64 [windows]; infinite where that leaves the range of a float."""
    return nll.mean().exp().item()


def bits_per_byte(nll: Tensor, num_predicted_per_window: int, num_bytes: Tensor) -> float:
    """Bits needed per byte of text, comparable between tokenizers.

    Args:
        nll: float64 [windows], mean nats per predicted token.
        num_predicted_per_window: predicted tokens per window, seq_length - 1.
        num_bytes: int [windows], UTF-8 bytes of the predicted tokens' text.
    """
    bits = nll.sum().item() * num_predicted_per_window / math.log(2)
    return bits / num_bytes.sum().item()


def bootstrap_ratio(
    dense_nll: Tensor, pruned_nll: Tensor, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Perplexity of pruned over dense, with a percentile bootstrap interval (Efron 1979).

    Both models saw the same windows, so windows are resampled in pairs: what makes a window hard for both cancels.

    Args:
        dense_nll: float64 [windows], mean nats per token.
        pruned_nll: the same windows in the same order.
        resamples: bootstrap samples.
        seed: of the resampling.
        confidence: of the interval, in (0, 1).

    Returns:
        (ratio, low, high); low and high are None for a single window, which says nothing of its own spread.
    """
    if dense_nll.shape != pruned_nll.shape:
        raise BadInputError(
            f"the dense and the pruned model were evaluated on {len(dense_nll)} and {len(pruned_nll)} windows;"
            f" evaluate both on the same windows to compare them."
        )
    change = (pruned_nll - dense_nll).double().cpu().numpy()
    ratio = math.exp(change.mean())
    if len(change) < 2:
        return ratio, None, None
    generator = np.random.default_rng(seed)
    # One resample at a time: no [resamples, windows] matrix, which long texts would make large.
    means = [change[generator.integers(len(change), size=len(change))].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(means, [tail, 1 - tail]))
    return ratio, float(low), float(high)
