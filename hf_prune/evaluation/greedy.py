"""Greedy decoding, one token at a time: samples show its text, the efficiency measurement times its steps."""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel


def greedy_tokens(model: PreTrainedModel, input_ids: Tensor) -> Iterator[int]:
    """Yield the most likely next token, for ever: the first costs one prefill, each further one a step with the cache.

    No sampling, penalty or stop token from the generation config: what the weights say, and nothing else. Asking for a
    token waits for the device, so the time between two tokens is that token's latency.

    Args:
        model: a causal language model in eval mode.
        input_ids: the prompt, int64 [1, prompt length], on the model's device.
    """
    # As in transformers' generate: only the last position goes through the head, where the model can do that.
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = None
    while True:
        with torch.inference_mode():
            output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **only_last)
            input_ids = output.logits[:, -1:].argmax(dim=-1)
        cache = output.past_key_values
        yield int(input_ids.item())
