"""Verification of a saved folder against the model in memory, by a fresh process that knows nothing of hf_prune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.checkpoint import verify_folder as script
from hf_prune.checkpoint.load import free_memory
from hf_prune.engine.offload import in_turn, offload_of
from hf_prune.models import RecurrentForCausalLM

PROBE_SHAPE = (2, 32)
PROBE_TEXT = "Pruning keeps 50 % of the weights;\n\nthe naïve baseline keeps 100 %."
# What a launcher exports: the child is one process on its own, whatever started its parent.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def verify_folder(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    views: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
    seed: int = 0,
    release_model: bool = False,
) -> list[dict[str, Any]]:
    """Load `folder` with plain transformers in a fresh process and compare it with `model`.

    model: what was saved, still in memory, whole on one device (CPU or GPU; the child uses the same).
    views: the entries of prune_plan.json, each with "kept", the largest number of nonzero weights allowed.
    tokenizer: what was saved with it; without one there is no tokenizer row.
    release_model: give the model's memory back before the other process loads its own: it is left on the meta device.

    Returns rows {"check": str, "passed": bool, "detail": str}; failing rows name the modules. A child that dies gives
    one failed row with its last words. Nothing is raised for a failed check: the caller decides.
    """
    with tempfile.TemporaryDirectory(prefix="hf_prune-verify-") as scratch:
        expected_file, report_file = Path(scratch, "expected.json"), Path(scratch, "report.json")
        expected, logits = expectation(model, views, tokenizer, trust_remote_code=trust_remote_code, seed=seed)
        expected_file.write_text(json.dumps(expected))
        save_file({"logits": logits.contiguous()}, Path(scratch, "probe_logits.safetensors"))
        if release_model:
            torch.nn.Module.to(model, "meta")
            free_memory()
        files = [script.__file__, str(Path(folder).resolve()), str(expected_file), str(report_file)]
        child = in_fresh_process(files, _environment())
        if child.returncode == 0 and report_file.exists():
            return json.loads(report_file.read_text())
    reason = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    last_words = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return [{"check": script.LOADS, "passed": False, "detail": f"the verifying process died ({reason}): {last_words}"}]


def expectation(
    model: PreTrainedModel,
    views: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], torch.Tensor]:
    """What verify_folder.py must find (its docstring lists the keys), and the probe's logits [2, 32, vocabulary]."""
    offload = offload_of(model)
    if offload is not None:
        # The other process has it whole, where it may not fit on the device.
        offload.move(torch.device("cpu"))
    text_config = model.config.get_text_config()
    length = min(PROBE_SHAPE[1], getattr(text_config, "max_position_embeddings", None) or PROBE_SHAPE[1])
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(text_config.vocab_size, (PROBE_SHAPE[0], length), generator=generator).tolist()
    was_training = model.training
    model.eval()
    try:
        logits = script.probe_logits(model, input_ids)
    finally:
        model.train(was_training)
    expected = {
        "views": _counted(model, views),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "num_threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "device": str(model.device),
        # The code beside those is a copy of our own.
        "trust_remote_code": trust_remote_code or isinstance(model, RecurrentForCausalLM),
        "probe_input_ids": input_ids,
        "ties": script.tied_pairs(model),
        "tokenizer": None,
    }
    if tokenizer is not None:
        ids = tokenizer(PROBE_TEXT)["input_ids"]
        expected["tokenizer"] = {"text": PROBE_TEXT, "ids": ids, "chat_template": tokenizer.chat_template}
    return expected, logits


def _counted(model: PreTrainedModel, views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The views, each with its nonzero weights."""
    counts = {}
    for index in in_turn(model, sorted({view["block"] for view in views})):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for view in views:
            if view["block"] == index:
                weight = script.matrix(parameters, view)
                if weight is None:
                    raise KeyError(view["parameter"])
                counts[view["name"]] = int(torch.count_nonzero(weight))
    return [{**view, "nonzeros": counts[view["name"]]} for view in views]


def in_fresh_process(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python script with its arguments to its end.

    -P keeps the script's own folder off sys.path, where inspect.py would hide the standard library's.
    """
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
