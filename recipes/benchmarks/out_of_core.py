"""What pruning takes of memory where weights stay on the disk: random Llamas of growing depth, each under a limit.

    python recipes/benchmarks/out_of_core.py --work_folder FOLDER

Writes OUT_OF_CORE.md and out_of_core.json beside this file; rows that stand there are not measured again. The folder
needs room for the largest model twice; models are deleted after use. Each run is a process of its own in a memory
cgroup where this user may make one (v2, or v1), which ends it at the limit; elsewhere its own memory is only sampled,
and the table says so. Own memory is anonymous memory (RssAnon) of the pruning process and the one that verifies, the
latter's Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 260
TEXT = """# Out of core

What `offload: disk` takes of memory on a CPU. `python recipes/benchmarks/out_of_core.py --work_folder FOLDER` writes
this: Llamas of random weights in bfloat16 (260 tokens of vocabulary), 16 x 128 calibration tokens, 50 % unstructured,
evaluated before and after on 4 windows, saved and verified, on 2 cores beside other work. Own memory is anonymous
memory, Python and libraries included (0.3 GB before any weight); with verification it is that of the pruning process
and the verifying one together.
"""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Row:
    """A run: a model of `blocks` blocks of width `width`, pruned by `method` with `offload` under `limit` bytes."""

    blocks: int
    width: int
    method: str
    offload: str
    limit: int | None


def config_of(row: Row) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=row.width,
        intermediate_size=row.width * 11 // 4,
        num_hidden_layers=row.blocks,
        num_attention_heads=row.width // 128,
        num_key_value_heads=max(row.width // 512, 1),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=256,
        dtype="bfloat16",
    )


def make_model(row: Row, folder: Path) -> int:
    """A random model in bfloat16 with a tokenizer of bytes, written block by block; its bytes."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config_of(row), dtype=torch.bfloat16)
    empty.save_pretrained(folder, state_dict={})
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in empty.named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shapes.setdefault(part, {})[name] = tuple(parameter.shape)
    weight_map = {}
    for number, (part, own) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in own.items()
        }
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@dataclass
class Cgroup:
    """A memory cgroup of this benchmark's own: `version` 2 or 1."""

    folder: Path
    version: int

    @classmethod
    def make(cls, limit: int) -> Cgroup | None:
        """With a limit in bytes; None where this user may not."""
        version = 2 if (CGROUPS / "cgroup.controllers").exists() else 1
        root = CGROUPS if version == 2 else CGROUPS / "memory"
        folder = root / f"hf_prune-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(limit))
        except OSError:
            return None
        return cls(folder, version)

    def join(self) -> None:
        """In the process that is to be limited."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        """Bytes, pages of files included that the kernel had no need to drop."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())


def own_memory(process: psutil.Process) -> int:
    """Anonymous bytes of a process and its children."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            status = Path(f"/proc/{member.pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return total


def measure(row: Row, work: Path) -> dict[str, str]:
    """Make, prune, delete: a row of the table."""
    model, output = work / "model", work / "pruned"
    size = make_model(row, model)
    options = {
        "model_name_or_path": model, "method": row.method, "sparsity": 0.5, "offload": row.offload, "device": "cpu",
        "dataset_name": "builtin:python-docs", "num_calibration_samples": 16, "seq_length": 128,
        "eval_dataset_name": "builtin:python-docs", "eval_max_windows": 4, "eval_seq_length": 128,
        "eval_efficiency": "false", "output_dir": output,
    }  # fmt: skip
    command = [sys.executable, "-m", "hf_prune", "prune", *[f"--{key}={value}" for key, value in options.items()]]
    group = Cgroup.make(row.limit) if row.limit else None
    enter: Callable[[], None] | None = group.join if group else None
    start, peak = time.perf_counter(), 0
    with (
        (work / "log.txt").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=enter) as child,
    ):
        while child.poll() is None:
            try:
                peak = max(peak, own_memory(psutil.Process(child.pid)))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.03)
    seconds = time.perf_counter() - start
    limited = "none"
    if row.limit:
        limited = (
            f"{row.limit / 1e9:.0f} GB, cgroup v{group.version}" if group else f"{row.limit / 1e9:.0f} GB, sampled"
        )
    found = {
        "blocks": str(row.blocks),
        "weights": f"{size / 1e9:.2f} GB",
        "method": row.method,
        "`offload`": row.offload,
        "limit": limited,
        "cgroup's peak, page cache included": f"{group.peak / 1e9:.2f} GB" if group else "",
    }
    if group:
        group.folder.rmdir()
    shutil.rmtree(model)
    if child.returncode:
        raise SystemExit((work / "log.txt").read_text()[-2000:])
    report = json.loads((output / "prune_report.json").read_text())
    shutil.rmtree(output)
    return {
        **found,
        "own memory, load to evaluation": f"{report['peak_memory_bytes'] / 1e9:.2f} GB",
        "with verification": f"{peak / 1e9:.2f} GB",
        "seconds pruning / in all": f"{report['seconds']['prune']:.0f} / {seconds:.0f}",
    }


ROWS = [
    # 25 MB a block, then 89 MB.
    *(Row(blocks, 1024, "wanda", offload, None) for offload in ("none", "disk") for blocks in (8, 16, 32)),
    *(Row(blocks, 1024, "balanced", "disk", None) for blocks in (8, 16, 32)),
    Row(90, 2048, "wanda", "disk", 3 * 10**9),
]


def table(measured: list[dict[str, str]]) -> str:
    """Markdown of rows that all have the same columns, or fewer."""
    columns = list(max(measured, key=len))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in measured)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work_folder.mkdir(parents=True, exist_ok=True)
    kept, page = Path(__file__).with_suffix(".json"), Path(__file__).with_name("OUT_OF_CORE.md")
    done: dict[str, dict[str, str]] = json.loads(kept.read_text()) if kept.exists() else {}
    rows = {" ".join(map(str, vars(row).values())): row for row in ROWS}
    for name, row in rows.items():
        if name not in done:
            done[name] = measure(row, arguments.work_folder)
            print(json.dumps(done[name]), flush=True)
            kept.write_text(json.dumps(done, indent=1) + "\n")
            page.write_text(f"{TEXT}\n{table([done[own] for own in rows if own in done])}\n")


if __name__ == "__main__":
    main()
