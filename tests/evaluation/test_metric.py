"""The evaluate.Metric, loaded the way evaluate loads any metric, against windows cut by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import evaluate
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_prune.errors import BadInputError
from hf_prune.evaluation import metric as metric_file

WORDS = [f"w{number}" for number in range(60)]
TinyModel = Callable[..., PreTrainedModel]
TEXTS = [" ".join(WORDS[start : start + 13]) for start in range(0, 40, 3)]
LENGTH = 8


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> evaluate.Metric:
    """`evaluate.load` of the file by its path; copies and caches go to a temporary folder."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(metric_file.__file__, keep_in_memory=True, cache_dir=str(tmp_path / "cache"))


def expected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, bos: bool, count: int) -> dict[str, float]:
    """Protocol written out: join, tokenise, cut, mean of log-softmax in float64; every token is one word."""
    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + LENGTH] for start in range(0, count * LENGTH, LENGTH)]
    if bos:
        windows = [[1, *window[1:]] for window in windows]
    with torch.no_grad():
        scores = model(torch.tensor(windows)).logits.double().log_softmax(-1)
    losses = [
        -sum(scores[row, place, window[place + 1]].item() for place in range(LENGTH - 1)) / (LENGTH - 1)
        for row, window in enumerate(windows)
    ]
    mean = sum(losses) / len(losses)
    return {"perplexity": math.exp(mean), "mean_nll": mean}


@pytest.mark.parametrize("bos", [False, True])
def test_follows_the_protocol(
    tiny: TinyModel, metric: evaluate.Metric, tokenizer: PreTrainedTokenizerFast, bos: bool
) -> None:
    model = tiny("llama")
    result = metric.compute(
        predictions=TEXTS, model=model, tokenizer=tokenizer, seq_length=LENGTH, max_windows=5, add_bos=bos
    )
    figures = expected(model, tokenizer, bos, 5)
    assert {key: result[key] for key in figures} == pytest.approx(figures, rel=1e-5)
    assert (result["windows"], result["seq_length"], result["add_bos"]) == (5, LENGTH, bos)
    # Bits of all predicted tokens over the bytes of their text: between 2 ("w1") and 5 ("w10" and a blank line) each.
    bytes_per_token = figures["mean_nll"] / math.log(2) / result["bits_per_byte"]
    assert 2 < bytes_per_token < 5


def test_loads_a_folder_and_takes_every_window(
    tiny: TinyModel, metric: evaluate.Metric, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = metric.compute(predictions=TEXTS, model=str(tmp_path / "model"), seq_length=LENGTH, device="cpu")
    assert result["add_bos"]  # this tokenizer adds one
    assert result["windows"] == len(TEXTS) * 13 // LENGTH
    assert result["perplexity"] == pytest.approx(expected(model, tokenizer, True, result["windows"])["perplexity"])


def test_works_directly_and_in_batches(tiny: TinyModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    metric = metric_file.Perplexity(keep_in_memory=True, cache_dir=str(tmp_path))
    for text in TEXTS:
        metric.add(prediction=text)
    model = tiny("llama")
    result = metric.compute(model=model, tokenizer=tokenizer, add_bos=False)
    assert result["seq_length"] == 64  # the model's context
    assert result["windows"] == len(TEXTS) * 13 // 64


def test_a_live_model_needs_its_tokenizer(tiny: TinyModel, metric: evaluate.Metric) -> None:
    with pytest.raises(BadInputError, match="tokenizer"):
        metric.compute(predictions=TEXTS, model=tiny("llama"))
