"""Recurrent language models as folders: saved, loaded with hf_prune and without it, trained from a recipe."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_ids
from tiny_recurrent import RECURRENT, recurrent_model
from transformers import AutoTokenizer, Trainer

from hf_prune.checkpoint.inspect import inspect_checkpoint
from hf_prune.data.text import TextData, load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.hub.push import files_to_upload
from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
from hf_prune.methods.lottery_ticket import LotteryTicketConfig
from hf_prune.models import AutoModelForCausalLM, StackedLSTMConfig
from hf_prune.sparse_training import run_sparse
from hf_prune.tickets import run_tickets
from hf_prune.training.arguments import make_train_recipe, make_training_arguments
from hf_prune.training.masks import MaskCallback
from hf_prune.training.text import Windows, train_word_tokenizer

# Loads a folder where hf_prune cannot be imported, first without trust.
STRANGER = """
import sys
sys.modules["hf_prune"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, place = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("ran code that nobody trusted")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = load_file(place + "/ids.safetensors")["ids"]
with torch.no_grad():
    logits = model(input_ids=ids).logits
new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
save_file({"logits": logits, "new": new}, place + "/found.safetensors")
"""


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_folder_loads_again_and_holds_tied_weights_once(kind: str, tmp_path: Path) -> None:
    model = recurrent_model(kind)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    tied = kind != "stacked_lstm"
    assert ("lm_head.weight" in names) is not tied and "embed_tokens.weight" in names
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and (again.lm_head.weight is again.embed_tokens.weight) is tied
    assert torch.equal(again(tiny_ids(2, 8)).logits, model(tiny_ids(2, 8)).logits)
    rows, summary = inspect_checkpoint(tmp_path)
    gates = [row for row in rows if row["kind"] == "linear"]
    assert {row["name"] for row in gates} == {
        name.removesuffix(".weight") for name in names if name.startswith("layers.") and name.endswith("weight")
    }
    assert summary["total_parameters"] == sum(own.numel() for own in model.parameters())


@pytest.mark.slow
def test_a_folder_loads_where_there_is_no_hf_prune(tmp_path: Path) -> None:
    model = recurrent_model("awd_lstm_mos", torch.float32)
    model.save_pretrained(tmp_path / "model")
    ids = tiny_ids(2, 8)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "model"), str(tmp_path)]
    child = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert torch.equal(found["logits"], model(ids).logits)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(found["new"], new)


RECIPE = {
    "device": "cpu",
    "vocab_size": 300,
    "tokenizer_type": "word",
    "dataset_name": "builtin:python-docs",
    "seq_length": 35,
    "max_train_windows": 40,
    "eval_dataset_name": "builtin:python-docs",
    "eval_split": "test",
    "eval_seq_length": 35,
    "eval_max_windows": 6,
    "rounds": 1,
    "pruning_rate": 0.4,
    "rewind_step": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "eval_efficiency": False,
}
OVERRIDES = {
    "stacked_lstm": "hidden_size=16,num_hidden_layers=2",
    "rhn": "hidden_size=16,recurrence_depth=2",
    "awd_lstm_mos": "hidden_size=16,embedding_size=8,last_hidden_size=12,num_softmaxes=2",
}


@pytest.mark.parametrize("kind", ["stacked_lstm", "awd_lstm_mos"])
def test_a_recipe_makes_a_verified_folder(kind: str, tmp_path: Path) -> None:
    values = {**RECIPE, "model_type": kind, "config_overrides": OVERRIDES[kind], "output_dir": str(tmp_path / "out")}
    values["bf16"] = True
    report = run_tickets(make_train_recipe(values, LotteryTicketConfig))
    assert all(row["passed"] for row in report["verification"])
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(0.4, abs=2e-3)
    assert report["own_code"] == ["modeling_recurrent.py"] and (tmp_path / "out" / "modeling_recurrent.py").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True)" in card and "`modeling_recurrent.py`" in card and "nothing but" not in card
    # All of it is pushed.
    assert "modeling_recurrent.py" in files_to_upload(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    windows = evaluation_windows(load_text("builtin:python-docs", split="test"), tokenizer, 35, 6).input_ids
    assert float(window_nll(model, windows).mean().exp()) == pytest.approx(
        report["evaluation"]["pruned"]["perplexity"], rel=1e-5
    )
    # At 300 words about a third of the text is none of them.
    unknown = sum(row[1:].count(0) for row in windows.tolist()) / (6 * 34)
    assert 0.1 < unknown == pytest.approx(report["evaluation"]["unknown"])
    assert f"{100 * unknown:.1f} % of the words to predict are outside the vocabulary" in card


def test_a_highway_network_trains_sparse(tmp_path: Path) -> None:
    values = {key: own for key, own in RECIPE.items() if key not in ("rounds", "pruning_rate", "rewind_step")}
    values |= {"model_type": "rhn", "config_overrides": OVERRIDES["rhn"], "sparsity": 0.53, "update_steps": 2}
    report = run_sparse(make_train_recipe({**values, "output_dir": str(tmp_path / "out")}, DynamicSparseConfig))
    assert all(row["passed"] for row in report["verification"])
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(0.53, abs=2e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config_overrides": "hidden_size=0"}, "config_overrides: .*hidden_size: 0 is no size"),
        ({"config_overrides": "depth=3"}, "config_overrides: 'depth=3' sets no key of StackedLSTMConfig"),
        ({"tokenizer_type": "words"}, "tokenizer_type: 'words' is unknown; choose bpe or word"),
        ({"vocab_size": 2}, "vocab_size: 2 is too small; two are <unk> and <eos>"),
        ({"vocab_size": None, "tokenizer_name": "gpt2"}, "tokenizer_type: it says what is trained; add vocab_size"),
    ],
)
def test_bad_recipes_write_nothing(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = {**RECIPE, "model_type": "stacked_lstm", "output_dir": str(tmp_path / "out"), **values}
    with pytest.raises(BadInputError, match=message):
        run_tickets(make_train_recipe(recipe, LotteryTicketConfig))
    assert not list(tmp_path.iterdir())


def chain(length: int, words: int = 24, choices: int = 3) -> torch.Tensor:
    """A text in which each word has a few successors, equally likely: log(choices) nats a word once that is known."""
    generator = torch.Generator().manual_seed(3)
    successors = torch.stack([torch.randperm(words, generator=generator)[:choices] for _ in range(words)])
    picks, word, text = torch.randint(0, choices, (length,), generator=generator), 0, []
    for pick in picks.tolist():
        word = int(successors[word, pick])
        text.append(word)
    return torch.tensor(text)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_masked_training_learns_more_than_how_often_words_come(kind: str, tmp_path: Path) -> None:
    text = chain(8000).view(-1, 20)
    train, held_out = text[:320], text[320:]
    sizes = {
        "embedding_size": 16,
        "hidden_size": 16,
        "initializer_range": 0.3,
        "recurrence_depth": 2,
        "last_hidden_size": 16,
    }
    known = RECURRENT[kind][0]().to_dict()
    model = recurrent_model(
        kind,
        torch.float32,
        vocab_size=24,
        num_hidden_layers=1,
        **{key: own for key, own in sizes.items() if key in known},
    )
    names = [name for name, own in model.named_parameters() if name.startswith("layers.") and own.ndim == 2]
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.7 for name in names}
    arguments = make_training_arguments(
        {"max_steps": 120, "learning_rate": 3e-2, "per_device_train_batch_size": 16, "save_strategy": "no"},
        tmp_path, 0, "cpu",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Windows(train), callbacks=[MaskCallback(masks)]).train()
    shares = torch.bincount(held_out.flatten(), minlength=24).double() / held_out.numel()
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    found = float(window_nll(model, held_out).mean())
    # Nobody can do better than the text allows, and one who only counts words no better than their entropy.
    assert np.log(3) - 0.1 < found < 0.7 * entropy
    for name, mask in masks.items():
        assert not bool((model.get_parameter(name).detach() * ~mask).any())


def test_a_word_tokenizer_has_the_most_frequent_words() -> None:
    documents = [" the cat sat on the mat \n", " the <unk> sat \n the dog N \n", "", "the end"]
    tokenizer = train_word_tokenizer(TextData(documents, "text"), 5, 35)
    counts = Counter(word for document in documents for word in document.split() if word != "<unk>")
    frequent = [word for word, _ in counts.most_common(3)]
    assert tokenizer.get_vocab() == {"<unk>": 0, "<eos>": 1, **{word: 2 + place for place, word in enumerate(frequent)}}
    assert len(tokenizer) == 5 and (tokenizer.eos_token, tokenizer.unk_token) == ("<eos>", "<unk>")
    ids = tokenizer("the <unk> dog \n\n  \n sat").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "<unk>", "<unk>", "<eos>", "sat"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the <unk> <unk> <eos> sat"


def test_defaults_are_the_published_sizes() -> None:
    """Zaremba et al.: 66 million parameters in the large model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(StackedLSTMConfig())
    assert round(sum(own.numel() for own in model.parameters()) / 1e6) == 66
