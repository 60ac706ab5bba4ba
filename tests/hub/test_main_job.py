"""The whole job against a Hub: model and text come from it, the folder goes back, and a recipe says all of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from server import Hub
from tiny import byte_tokenizer, tiny_model
from visits import TOKEN, Visit, command_line


@pytest.mark.slow
def test_a_recipe_takes_model_and_text_from_the_hub_and_pushes(
    hub: Hub, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    base, corpora, output = tmp_path / "base", tmp_path / "corpora", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (corpora / "corpus").mkdir(parents=True)
    for split, count in (("train", 80), ("test", 40)):
        rows = [json.dumps({"text": f"{split} {number}: {number * 37} foxes jump"}) for number in range(count)]
        (corpora / "corpus" / f"{split}.jsonl").write_text("\n".join(rows))
    visit("publish_text", corpora, HF_TOKEN=TOKEN)
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    assert command_line("push", base, "--repo_id", "me/base", **here).returncode == 0

    recipe = {
        "model_name_or_path": "me/base", "method": "wanda", "pattern": "2:4", "dataset_name": "me/corpus",
        "num_calibration_samples": 16, "seq_length": 64, "eval_dataset_name": "me/corpus", "eval_split": "test",
        "eval_seq_length": 64, "eval_efficiency": False, "output_dir": str(output), "push_to_hub": True,
        "hub_model_id": "me/pruned", "hub_private_repo": True,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = command_line("prune", "--config", tmp_path / "recipe.yaml", **here)
    assert done.returncode == 0, done.stderr

    files = hub.files("me/pruned")
    assert hub.repos["models", "me/pruned"].private
    weights, local = load(files["model.safetensors"]), load_file(output / "model.safetensors")
    assert weights.keys() == local.keys() and all((weights[name] == local[name]).all() for name in weights)
    up = weights["model.layers.0.mlp.up_proj.weight"] != 0
    assert (up.view(len(up), -1, 4).sum(-1) <= 2).all()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.license == "mit" and card.data.datasets == ["me/corpus"]
    results = yaml.safe_load(next(content for path, content in files.items() if path.startswith(".eval_results/")))
    report = json.loads(files["prune_report.json"])
    assert results[0]["dataset"]["id"] == "me/corpus"
    assert report["evaluation"]["pruned"]["perplexity"] in [result["value"] for result in results]
    again = command_line(
        "prune",
        "--model_name_or_path",
        "me/pruned",
        "--method",
        "intra_fusion",
        "--output_dir",
        tmp_path / "twice",
        **here,
    )
    assert again.returncode == 2 and "me/pruned has been pruned before" in " ".join(again.stderr.split())
    for content in [*files.values(), done.stdout.encode(), done.stderr.encode()]:
        assert TOKEN.encode() not in content
