"""Greedy continuations against transformers' own generate."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_prune.evaluation.greedy import greedy_tokens
from hf_prune.evaluation.samples import generate_samples

TinyModel = Callable[..., PreTrainedModel]
TEMPLATE = (
    "<s> {% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}w7{% endif %}"
)


def generated(model: torch.nn.Module, input_ids: list[int], count: int) -> list[int]:
    prompt = torch.tensor([input_ids])
    output = model.generate(prompt, do_sample=False, max_new_tokens=count, use_cache=False)
    return output[0, len(input_ids) :].tolist()


def text_up_to(tokens: list[int], stop: int = 2) -> str:
    """The words before the stop token, </s> unless said otherwise: 3 is "user", 4 and on are w0 and on."""
    words = tokens[: tokens.index(stop)] if stop in tokens else tokens
    return " ".join("user" if token == 3 else f"w{token - 4}" for token in words if token > 2)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "mixtral"])
def test_greedy_tokens_are_those_of_generate(tiny: TinyModel, family: str) -> None:
    """With the cache, past Gemma's sliding window, against generate without one."""
    model = tiny(family)
    prompt = [1, 5, 9, 33, 12, 60, 8, 8, 21, 40]
    tokens = greedy_tokens(model, torch.tensor([prompt]))
    assert [next(tokens) for _ in range(12)] == generated(model, prompt, 12)


def test_continues_text_where_there_is_no_chat_template(tiny: TinyModel, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = tiny("llama"), tiny("gpt2").train()
    samples = generate_samples({"dense": first, "pruned": second}, tokenizer, ["w3 w4", "w9"], max_new_tokens=6)
    assert second.training
    second.eval()
    expected = [
        {
            "prompt": prompt,
            "dense": text_up_to(generated(first, ids, 6)),
            "pruned": text_up_to(generated(second, ids, 6)),
        }
        for prompt, ids in [("w3 w4", [1, 4 + 3, 4 + 4]), ("w9", [1, 4 + 9])]
    ]
    assert samples == expected


def test_asks_as_a_user_where_there_is_a_chat_template(tiny: TinyModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    model = tiny("llama")
    [sample] = generate_samples({"dense": model}, tokenizer, ["w3"], max_new_tokens=8)
    turn = [1, 3, 4 + 3, 4 + 7]  # <s> user w3, then the generation prompt; <s> once, though both write it
    assert sample["dense"] == text_up_to(generated(model, turn, 8))


@pytest.mark.parametrize("several", [False, True])
def test_ends_before_a_stop_token(tiny: TinyModel, tokenizer: PreTrainedTokenizerFast, several: bool) -> None:
    model = tiny("llama")
    new = generated(model, [1, 7], 12)
    stop = new[5]
    model.generation_config.eos_token_id = [0, stop] if several else stop
    [sample] = generate_samples({"dense": model}, tokenizer, ["w3"], max_new_tokens=12)
    assert sample["dense"] == text_up_to(new, stop)
