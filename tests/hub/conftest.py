"""A Hub on loopback, a finished model folder to push to it, and clients in fresh processes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import visits
from server import Hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from visits import OTHER_TOKEN, TOKEN, TOKEN_IDS, Visit

WORDS = ["<unk>", "once", "upon", "a", "time", "there", "was", "model"]
CARD = """---
base_model: me/dense
license: apache-2.0
library_name: transformers
tags:
- pruning
- hf_prune
---
# A pruned model
"""


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """Two users, `me` (TOKEN) and `you` (OTHER_TOKEN); weights are sent in parts of 32 KiB."""
    with Hub({TOKEN: "me", OTHER_TOKEN: "you"}, chunk_bytes=32 * 1024) as server:
        yield server


@pytest.fixture(scope="session")
def done() -> list[Visit]:
    """All visits of the session, for the tests that search their streams."""
    return []


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of every HF_HOME a client had."""
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(scope="session")
def visit(hub: Hub, done: list[Visit], homes: Path) -> Callable[..., Visit]:
    """visit("function", *arguments): runs a function of client.py with an empty HF_HOME against the Hub."""

    def run(function: str, *arguments: str | Path, **settings: str) -> Visit:
        here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(homes / f"{function}-{len(done)}")}
        done.append(visits.visit(function, *arguments, **{**here, **settings}))
        return done[-1]

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a finished run leaves it: tokenizer, card, results, plots; and a hidden file of mine."""
    folder = tmp_path_factory.mktemp("output") / "model"
    tiny_llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "wikitext.yaml").write_text("- dataset: {id: wikitext}\n  value: 24.2\n")
    (folder / "prune_report.json").write_text("{}")
    (folder / "plots").mkdir()
    (folder / "plots" / "density [all].png").write_bytes(b"\x89PNG\0")
    (folder / ".env").write_text("SECRET=1")
    return folder


@pytest.fixture(scope="session")
def resharded_folder(model_folder: Path) -> Path:
    """The same model in several files."""
    folder = model_folder.with_name("resharded")
    tiny_llama().save_pretrained(folder, max_shard_size="64KB")
    shutil.copy(model_folder / "README.md", folder)
    return folder


@pytest.fixture(scope="session")
def expected_logits() -> torch.Tensor:
    """Logits [1, 8, vocabulary] for TOKEN_IDS, from the model before it went anywhere, on one thread as clients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = tiny_llama()(torch.tensor([TOKEN_IDS])).logits
    torch.set_num_threads(threads)
    return logits


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()
