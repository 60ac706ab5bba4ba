"""Perplexity and sample generations of one model before and after, over all processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.arguments import EvaluationArguments
from hf_prune.data.text import TextData, load_text
from hf_prune.data.windows import EvaluationWindows, evaluation_windows, sequence_length
from hf_prune.engine import distributed
from hf_prune.evaluation.perplexity import bits_per_byte, bootstrap_ratio, perplexity, window_nll
from hf_prune.evaluation.samples import generate_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Quality:
    """Measurements of one model: float64 nll [windows], its continuations of the prompts, seconds."""

    nll: Tensor
    continuations: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, to the bit."""
        return {"nll": self.nll.tolist(), "continuations": self.continuations, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quality:
        """What `to_dict` told of."""
        return cls(**{**values, "nll": torch.tensor(values["nll"], dtype=torch.float64)})


@dataclass
class QualityEvaluation:
    """An evaluation text cut into windows, ready for any number of models; made before weights are loaded.

    Raises:
        BadInputError: the text is missing, broken or too short.
    """

    arguments: EvaluationArguments
    tokenizer: PreTrainedTokenizerBase
    model_config: Any
    text: TextData = field(init=False)
    windows: EvaluationWindows = field(init=False)
    dtype: str = ""

    def __post_init__(self) -> None:
        own = self.arguments
        assert own.eval_dataset_name is not None
        self.text = load_text(
            own.eval_dataset_name,
            config=own.eval_dataset_config,
            split=own.eval_split,
            text_column=own.eval_text_column,
            revision=own.eval_dataset_revision,
            tokenizer=self.tokenizer,
            evaluation=True,
        )
        length = sequence_length(self.model_config, own.eval_seq_length, "eval_seq_length")
        self.windows = evaluation_windows(self.text, self.tokenizer, length, own.eval_max_windows, own.eval_add_bos)

    def of(self, model: Any) -> QualityEvaluation:
        """This one, with the dtype of a model whose figures were measured earlier, maybe by another process."""
        self.dtype = str(model.dtype).removeprefix("torch.")
        return self

    def measure(self, model: PreTrainedModel, description: str) -> Quality:
        """Windows are shared out over the processes; the prompts are continued by the main one."""
        start = perf_counter()
        self.of(model)
        mine = self.windows.input_ids[distributed.rank() :: distributed.world_size()]
        parts = distributed.gather(window_nll(model, mine, description=description) if len(mine) else torch.empty(0))
        nll = torch.empty(len(self.windows.input_ids), dtype=torch.float64)
        for rank, part in enumerate(parts):
            nll[rank :: len(parts)] = part
        seconds = perf_counter() - start
        samples: list[dict[str, str]] = []
        if distributed.rank() == 0 and self.arguments.sample_prompts:
            samples = generate_samples({"text": model}, self.tokenizer, self.arguments.sample_prompts)
        continuations = distributed.gather([sample["text"] for sample in samples])[0]
        return Quality(nll, continuations, seconds)

    def report(self, **models: Quality) -> dict[str, Any]:
        """The report's `evaluation` entry; with `dense` and `pruned` also the change between them.

        Where the tokenizer has no token for some words, `unknown` is their share of what is predicted.
        """
        length = self.windows.input_ids.shape[1]
        entry: dict[str, Any] = {
            "dataset": self.text.name,
            "config": self.text.config,
            "split": self.text.split,
            "revision": self.text.revision,
            "private": self.text.private,
            "seq_length": length,
            "windows": len(self.windows.input_ids),
            "add_bos": self.windows.add_bos,
            "dtype": self.dtype,
        }
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and bool((self.windows.input_ids == unknown).any()):
            entry["unknown"] = float((self.windows.input_ids[:, 1:] == unknown).double().mean())
        for name, quality in models.items():
            entry[name] = {
                "perplexity": perplexity(quality.nll),
                "bits_per_byte": bits_per_byte(quality.nll, length - 1, self.windows.num_bytes),
                "seconds": quality.seconds,
            }
        if "dense" in models and "pruned" in models:
            ratio, low, high = bootstrap_ratio(models["dense"].nll, models["pruned"].nll)
            entry["change"] = {"ratio": ratio, "low": low, "high": high, "confidence": 0.95}
        return entry

    def samples(self, **models: Quality) -> list[dict[str, str]]:
        """The report's `samples` entry: each prompt with every model's continuation."""
        return [
            {"prompt": prompt, **{name: quality.continuations[place] for name, quality in models.items()}}
            for place, prompt in enumerate(self.arguments.sample_prompts or [])
        ]
