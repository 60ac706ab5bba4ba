"""What the models say: the same prompts continued greedily by each, side by side."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, takewhile

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.evaluation.greedy import greedy_tokens
from hf_prune.progress import progress


def generate_samples(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    max_new_tokens: int = 48,
) -> list[dict[str, str]]:
    """Continue each prompt with each model, greedily, up to a stop token or `max_new_tokens`.

    A prompt is a user's turn where the tokenizer has a chat template, and text to be continued where it has none.

    Args:
        models: name -> model; the names become keys of the result.
        tokenizer: the tokenizer of all of them.
        prompts: plain strings.
        max_new_tokens: at most so many tokens each.

    Returns:
        For each prompt {"prompt": prompt, name: the new text alone, ...}.
    """
    prompts = list(prompts)
    samples = []
    for prompt in progress(prompts, "sample generations", total=len(prompts)):
        input_ids = encode_prompt(tokenizer, prompt)
        texts = {name: continue_text(model, tokenizer, input_ids, max_new_tokens) for name, model in models.items()}
        samples.append({"prompt": prompt, **texts})
    return samples


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """The prompt as the model expects it, int64 [1, length]."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]  # the template wrote them


def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, max_new_tokens: int
) -> str:
    """The new text alone, without special tokens."""
    stop = stop_tokens(model, tokenizer)
    tokens = islice(greedy_tokens(model, input_ids.to(model.device)), max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        new = list(takewhile(lambda token: token not in stop, tokens))
    finally:
        model.train(was_training)
    return str(tokenizer.decode(new, skip_special_tokens=True))


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-text tokens: the generation config's (one, several or none) and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed: Sequence[int | None] = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
