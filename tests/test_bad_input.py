"""Three hundred bad recipes, texts and checkpoints, drawn by a seed: one sentence, exit code 2, nothing written."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model

from hf_prune import cli
from hf_prune.arguments import SECTIONS
from hf_prune.fields import field_types
from hf_prune.methods.sparsegpt import SparseGPTConfig

COUNT = 100
# Beside these, every key of the sections is mistyped and misspelt.
OUTSIDE = {
    "sparsity": [-0.1, 1, 1.5], "min_keep_ratio": [-0.5, 1, 0.9], "num_calibration_samples": [0, -3],
    "seq_length": [1, 0, -8, 10**6], "eval_seq_length": [1, -2], "eval_max_windows": [0, -1], "num_processes": [0, -1],
    "checkpoint_every": [-1], "block_size": [0, -1], "damping": [-0.1],
    "pattern": ["4:2", "0:4", "2:4:8", "a:b", "2:5", "structured", "2:"], "time_limit": ["soon", "-1h", "6x"],
    "deadline": ["25:00", "noon", "6"], "device": ["toaster", "cuda:", "cuda:99"], "dtype": ["int7", "float64"],
    "offload": ["moon"], "method": ["sparsegbt", ""], "criterion": ["wandas"], "update": ["magic"],
    "reconstruct": ["blocks"], "allocation": ["evenly", "nowhere.json"], "output_importance": ["fischer"],
    "targets": [["nothing_proj"], ["re:("], [""]], "ignore": [["re:["]], "output_dir": ["/proc/nowhere/out"],
    "dataset_name": ["./absent.jsonl", "nobody/nothing", "builtin:java-docs"], "dataset_split": ["tests"],
    "text_column": ["body"], "eval_dataset_name": ["./absent.txt"], "eval_split": ["dev"],
    "model_name_or_path": ["./absent", "nobody/nothing", "builtin:gpt-5"],
}  # fmt: skip
SPOILT = [
    "sparsity: [0.5", "sparsity: 0.5\nsparsity: 0.6", "model: {name: x}", "- a\n- b", "\tsparsity: 0.5", "just words",
    "sparsity: *anchor", "!!python/object/apply:os.system ['true']", "? [a, b]\n: c", "sparsity: !!float x",
    "1: 2", "{a: b", "'", "%YAML 9.9\n---\n: :",
]  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a recipe that would run."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": f"{n}: {n * n} foxes, {n % 7} dogs"} for n in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def values_of(dense: Path, place: Path) -> dict[str, Any]:
    text = str(dense / "text.jsonl")
    return {
        "method": "sparsegpt", "sparsity": 0.5, "model_name_or_path": str(dense / "model"), "dataset_name": text,
        "num_calibration_samples": 4, "seq_length": 32, "eval_dataset_name": text, "eval_seq_length": 32,
        "eval_max_windows": 4, "eval_efficiency": False, "output_dir": str(place / "out"),
    }  # fmt: skip


def check_refused(recipe: str | bytes, place: Path, capsys: pytest.CaptureFixture, case: object) -> None:
    """One sentence on stderr, exit code 2, and beside the recipe nothing that was not there."""
    path = place / "recipe.yaml"
    path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    code = cli.main(["prune", "--config", str(path)])
    said = capsys.readouterr().err
    assert code == 2, (case, code, said)
    assert said.startswith("hf-prune: ") and said.endswith((".\n", "?\n")) and said.count("\n") == 1, (case, said)
    assert not said.startswith("hf-prune: unexpected") and "Traceback" not in said and len(said) < 600, (case, said)
    assert sorted(place.rglob("*")) == before, (case, said)


def bad_recipe(draw: random.Random, good: dict[str, Any]) -> str | bytes:
    """A recipe with one thing wrong, or a text that is none."""
    sections = (*SECTIONS.values(), SparseGPTConfig)
    kinds = {key: kind for section in sections for key, kind in field_types(section).items()}
    what = draw.choice(["misspelt", "mistyped", "mistyped", "outside", "outside", "outside", "spoilt", "bytes"])
    if what == "spoilt":
        return draw.choice(SPOILT)
    if what == "bytes":
        return yaml.safe_dump(good).encode() + bytes(draw.randrange(128, 256) for _ in range(draw.randrange(1, 9)))
    changed = dict(good)
    if what == "misspelt":
        key = draw.choice(sorted(kinds))
        at = draw.randrange(len(key))
        slip = draw.choice([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key + "s"])
        changed[slip if slip not in kinds else key + "_x"] = changed.pop(key, 1)
    elif what == "mistyped":
        key = draw.choice(sorted(key for key, kind in kinds.items() if "list" not in str(kind) and key != "options"))
        if "bool" in str(kinds[key]):
            changed[key] = draw.choice([3, "perhaps", [True], 0.5])
        elif "str" in str(kinds[key]):
            changed[key] = draw.choice([[1, 2], True, ["a"]])
        else:
            changed[key] = draw.choice(["many", [1, 2], True, "1,5", float("nan"), float("inf")])
    else:
        key = draw.choice(sorted(OUTSIDE))
        changed[key] = draw.choice(OUTSIDE[key])
    return yaml.safe_dump(changed)


@pytest.mark.parametrize("part", range(4))
def test_bad_recipes(part: int, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for case in range(part, COUNT, 4):
        recipe = bad_recipe(random.Random(case), values_of(dense, tmp_path))
        check_refused(recipe, tmp_path, capsys, (case, recipe))


def bad_text(draw: random.Random, dense: Path, place: Path) -> tuple[str, dict[str, Any]]:
    """(name of a file in `place` that cannot be a calibration text, changes of the recipe)."""
    good = (dense / "text.jsonl").read_bytes()
    lines = good.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    at = draw.randrange(len(lines))
    whole = pd.DataFrame(rows)

    def written(name: str, content: bytes, **changes: Any) -> tuple[str, dict[str, Any]]:
        (place / name).write_bytes(content)
        return name, changes

    def parquet(damage: Callable[[bytes], bytes]) -> tuple[str, dict[str, Any]]:
        whole.to_parquet(place / "text.parquet")
        return written("text.parquet", damage((place / "text.parquet").read_bytes()))

    cut = draw.randrange(3, 25)
    return draw.choice(
        [
            lambda: written("text.jsonl", b""),
            lambda: written("text.jsonl", b"\n" * draw.randrange(1, 5)),
            lambda: written("text.jsonl", b"".join([*lines[:at], lines[at][:-cut] + b"\n", *lines[at + 1 :]])),
            lambda: written("text.jsonl", b"".join([*lines[:at], b'{"text": %d}\n' % at, *lines[at + 1 :]][at:])),
            lambda: written("text.jsonl", bytes(draw.randrange(256) for _ in range(200))),
            lambda: written("text.jsonl", lines[0]),
            lambda: written("text.json", b"[" + b",".join(lines)[: -draw.randrange(2, 90)]),
            lambda: written("text.txt", good[: 40 * draw.randrange(1, 9)] + b"\xff\xfe\xfa" + good),
            lambda: written("text.txt", b"x" * draw.randrange(32)),
            lambda: written("text.csv", whole.rename(columns={"text": "words"}).assign(more="x").to_csv().encode()),
            lambda: written("text.csv", b"text\n"),
            lambda: written("text.docx", good),
            lambda: written("text.jsonl", good, text_column=draw.choice(["body", "Text", " "])),
            lambda: written("text.jsonl", good, dataset_split=draw.choice(["test", "trains"])),
            lambda: written("text.jsonl", good, num_calibration_samples=10 ** draw.randrange(5, 9)),
            lambda: parquet(lambda content: content[: draw.randrange(8, len(content) - 8)]),
            lambda: parquet(lambda content: content[:-4] + b"PARX"),
            lambda: parquet(lambda content: b"PAR1"),
            lambda: ("absent.jsonl", {}),
        ]
    )()


@pytest.mark.parametrize("part", range(4))
def test_bad_texts(part: int, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for case in range(part, COUNT, 4):
        place = tmp_path / str(case)
        place.mkdir()
        draw = random.Random(1000 + case)
        name, changes = bad_text(draw, dense, place)
        own = {"dataset_name": str(place / name)}
        if not changes and draw.random() < 0.3:
            own = {"eval_dataset_name": str(place / name)}
        recipe = yaml.safe_dump({**values_of(dense, place), **own, **changes})
        check_refused(recipe, place, capsys, (case, name, changes))


def bad_checkpoint(draw: random.Random, folder: Path) -> str:
    """Damage a checkpoint in one way; returns what was done."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    content, tensors = weights.read_bytes(), load_file(weights)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    name = draw.choice(sorted(tensors))
    values = json.loads(config.read_text())

    def configured(**changes: Any) -> None:
        own = {key: value for key, value in {**values, **changes}.items() if value is not ...}
        config.write_text(json.dumps(own))

    def saved(own: dict[str, torch.Tensor]) -> None:
        save_file(own, weights, metadata={"format": "pt"})

    def poisoned() -> None:
        own = tensors[name].clone()
        own.view(-1)[draw.randrange(own.numel())] = draw.choice([float("nan"), float("inf")])
        saved({**tensors, name: own})

    def pickled() -> None:
        torch.save(tensors, folder / "pytorch_model.bin")
        weights.unlink()

    def indexed() -> None:
        shard = "model-00001-of-00002.safetensors"
        weights.rename(folder / shard)
        table = {key: shard if key != name else "model-00002-of-00002.safetensors" for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))

    damages: dict[str, Callable[[], Any]] = {
        "no config": config.unlink,
        "half a config": lambda: config.write_text(config.read_text()[: draw.randrange(1, 200)]),
        "a list for a config": lambda: config.write_text("[]"),
        "unknown type": lambda: configured(model_type="llamma"),
        "no type": lambda: configured(model_type=..., architectures=...),
        "no causal model": lambda: configured(model_type="bert", architectures=["BertModel"]),
        "code of its own": lambda: configured(
            model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        ),
        "other sizes": lambda: configured(hidden_size=64),
        "wider": lambda: configured(intermediate_size=96),
        "more blocks": lambda: configured(num_hidden_layers=draw.randrange(4, 9)),
        "heads that do not divide": lambda: configured(num_attention_heads=5, head_dim=...),
        "a word for a size": lambda: configured(hidden_size="large"),
        "quantized": lambda: configured(quantization_config={"quant_method": "fp8"}),
        "no weights": weights.unlink,
        "empty weights": lambda: weights.write_bytes(b""),
        "cut weights": lambda: weights.write_bytes(content[: draw.randrange(1, len(content))]),
        "cut header": lambda: weights.write_bytes(content[: draw.randrange(9, header)]),
        "a header too long": lambda: weights.write_bytes(struct.pack("<Q", 2 ** draw.randrange(30, 63)) + content[8:]),
        "no header": lambda: weights.write_bytes(content[:8] + b"x" * (header - 8) + content[header:]),
        "a missing weight": lambda: saved({key: own for key, own in tensors.items() if key != name}),
        "a weight of another shape": lambda: saved({**tensors, name: torch.zeros(3, 5)}),
        "not a number": poisoned,
        "a pickle": pickled,
        "an absent shard": indexed,
        "a page instead of weights": lambda: weights.write_bytes(b"<html>" + content[6:100]),
        "a pointer instead of weights": lambda: weights.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "no tokenizer": lambda: [own.unlink() for own in folder.glob("token*")],
        "half a tokenizer": lambda: (folder / "tokenizer.json").write_text('{"version": "1.0", "trunc'),
        "a file instead of a folder": lambda: (shutil.rmtree(folder), folder.write_text("model")),
    }
    what = draw.choice(sorted(damages))
    damages[what]()
    return f"{what} ({name})"


@pytest.mark.parametrize("part", range(4))
def test_bad_checkpoints(part: int, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for case in range(part, COUNT, 4):
        place = tmp_path / str(case)
        shutil.copytree(dense / "model", place / "model")
        what = bad_checkpoint(random.Random(2000 + case), place / "model")
        recipe = yaml.safe_dump({**values_of(dense, place), "model_name_or_path": str(place / "model")})
        check_refused(recipe, place, capsys, (case, what))
        shutil.rmtree(place)
