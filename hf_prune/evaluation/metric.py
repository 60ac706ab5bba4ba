"""Perplexity as a metric of Hugging Face's evaluate, by the protocol of `perplexity.py`.

`evaluate.load` copies this file and reads its imports line by line: one import a line, no relative one.

    metric = evaluate.load(hf_prune.evaluation.metric.__file__)
    metric.compute(predictions=texts, model="path/or/id", seq_length=1024, max_windows=32)
"""

from typing import Any

import datasets
import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.load import load_model, load_tokenizer, pick_device
from hf_prune.data.text import TextData
from hf_prune.data.windows import evaluation_windows, sequence_length
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import bits_per_byte, perplexity, window_nll

DESCRIPTION = """\
Perplexity of a causal language model over a text: the texts are joined with a blank line, tokenised once, and cut into
non-overlapping windows of seq_length tokens (the tail is dropped); exp of the mean over windows of the mean negative
log-likelihood of the window's seq_length - 1 predicted tokens.
"""

INPUTS = """
Args:
    predictions (list of str): the texts, in order.
    model (PreTrainedModel or str): a live causal language model, or a folder or Hub id to load one from.
    tokenizer (PreTrainedTokenizerBase, optional): the model's; may be left out where model is a folder or id.
    seq_length (int, optional): tokens per window; min(2048, the model's context) unless given.
    max_windows (int, optional): use the first so many windows only.
    add_bos (bool, optional): start every window with the BOS token; where the tokenizer does so unless given.
    dtype (str): of a model that is loaded: "auto" (as saved), "float32", ...
    device (str): of a model that is loaded: "auto" (a GPU where there is one), "cpu", "cuda", ...
Returns:
    perplexity, bits_per_byte, mean_nll (nats per token), windows, seq_length, add_bos.
"""

# Where the protocol was written down first: the evaluation of GPTQ, since used by SparseGPT and Wanda.
CITATION = """\
@inproceedings{frantar2023gptq,
  title={{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author={Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  booktitle={International Conference on Learning Representations}, year={2023}}
"""


class Perplexity(evaluate.Metric):
    """See DESCRIPTION and INPUTS; `Perplexity(keep_in_memory=True)` keeps the texts out of evaluate's disk cache."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seq_length: int | None = None,
        max_windows: int | None = None,
        add_bos: bool | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> dict[str, Any]:
        if not isinstance(model, PreTrainedModel):
            arguments = ModelArguments(model, dtype=dtype, device=device)
            tokenizer = tokenizer or load_tokenizer(model, arguments)
            model = load_model(model, arguments, pick_device(device))
        if tokenizer is None:
            raise BadInputError("tokenizer: hand over the tokenizer of the live model as well.")
        text = TextData(
            documents=list(predictions), name="predictions", config=None, split=None, revision=None, private=True
        )
        seq_length = sequence_length(model.config, seq_length)
        windows = evaluation_windows(text, tokenizer, seq_length, max_windows=max_windows, add_bos=add_bos)
        nll = window_nll(model, windows.input_ids)
        return {
            "perplexity": perplexity(nll),
            "bits_per_byte": bits_per_byte(nll, seq_length - 1, windows.num_bytes),
            "mean_nll": nll.mean().item(),
            "windows": len(nll),
            "seq_length": seq_length,
            "add_bos": windows.add_bos,
        }
