"""A published protocol on a real model: the figure that an independent evaluation of SmolLM2 found."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune.data.builtin import resolve_model
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import perplexity, window_nll


@pytest.mark.slow
def test_smollm2_on_wikitext2(shared_folder: Path) -> None:
    """24.191 in float32 on the first 32 windows of 1024 tokens of WikiText-2's raw test split, which has 304,986.

    That is 22.882 on the first 16, which take half the time.
    """
    try:
        source = resolve_model("builtin:smollm2-135m-instruct")
    except BadInputError as error:
        pytest.skip(str(error))
    text_file = shared_folder / "data" / "wikitext-2-raw" / "wiki.test.raw"
    if not text_file.exists():
        pytest.skip("the WikiText-2 test split is not among the real assets")
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    windows = evaluation_windows(load_text(str(text_file)), tokenizer, seq_length=1024, max_windows=16)
    assert windows.input_ids.shape == (16, 1024)
    assert not windows.add_bos
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    assert perplexity(window_nll(model, windows.input_ids)) == pytest.approx(22.882, rel=0.005)
