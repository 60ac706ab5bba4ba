"""Units of a language model go by what they cause, from a recipe to a smaller model."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hf_prune.cli import main
from hf_prune.cli.train import make_recipe
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.legcnet.units import run_units
from hf_prune.methods.intra_fusion import IntraFusionConfig
from hf_prune.recipe import dump_yaml
from hf_prune.structure.budget import budget_of_units, plan_structure


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"target_windows": 10_000}, "target_windows: 10000 of .* windows leave nothing to train on"),
        ({"target_windows": 0}, "target_windows: 0 is too few"),
        ({"dtype": "bfloat16"}, "dtype: weights train in float32"),
        ({"model_type": "llama"}, "model_type: units are those of a model that has been trained; leave the key out"),
        ({"units": ["depth"]}, "units: depth cannot be watched; choose of mlp, attention, heads"),
        ({"units": []}, "units: none cannot be watched"),
        ({"units": ["attention", "heads"]}, "units: attention removes key-value groups, heads thins them"),
        ({"ignore": ["layers.0"]}, "ignore: units are watched as they are"),
        ({"perturbation": 0.1}, "perturbation: units are watched as they are"),
        ({"min_keep_ratio": 0.1}, "min_keep_ratio: units are watched as they are"),
        ({"max_lag": 14}, "max_lag: 14 lags need 44 windows"),
        ({"sparsity": 0.8}, "sparsity: 0.8 would take all 2 units of heads; lower it"),
    ],
)
def test_what_cannot_be_done_with_units_is_said_before_anything_is_trained(
    own: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    before = sorted(tmp_path.rglob("*"))
    values = {
        "method": "legcnet", "series": "units", "units": ["mlp", "heads"], "device": "cpu", "window": 8, "max_lag": 2,
        "model_name_or_path": str(tmp_path / "dense"), "dataset_name": str(tmp_path / "text.txt"), "seq_length": 32,
        "eval_dataset_name": str(tmp_path / "text.txt"), "eval_seq_length": 32, "max_steps": 80,
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    with pytest.raises(BadInputError, match=message):
        run_units(make_recipe({**values, **own}))
    assert sorted(tmp_path.rglob("*")) == before


TEXT = "".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(1500))


def test_units_of_a_language_model_go_by_what_they_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    values = {
        "method": "legcnet", "series": "units", "units": ["mlp", "heads"], "device": "cpu", "sparsity": 0.3,
        "window": 8, "max_lag": 2,
        "model_name_or_path": str(tmp_path / "dense"), "dataset_name": str(tmp_path / "text.txt"), "seq_length": 32,
        "target_windows": 4, "eval_dataset_name": str(tmp_path / "text.txt"), "eval_seq_length": 32,
        "eval_max_windows": 8, "eval_efficiency": False, "max_steps": 80, "per_device_train_batch_size": 2,
        "learning_rate": 3e-3, "save_strategy": "no", "rounds_folder": str(tmp_path / "rounds"),
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(values))
    assert main(["train", "--config", str(recipe)]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "prune_report.json").read_text())
    assert all(row["passed"] for row in report["verification"]) and report["structure"]["removed"] > 0.1
    causes, scores = (
        load_file(out / "causes.safetensors"),
        load_file(*(tmp_path / "rounds").rglob("legcnet.safetensors")),
    )
    assert (
        report["legcnet"]["causal"] == int(((causes["p"] < 0.05) & causes["tested"]).sum())
        and len(causes["p"]) == report["legcnet"]["series"]
    )
    # The neurons that stayed are those of the trained model with the smallest p, and so the heads of each group.
    trained = load_file(tmp_path / "rounds" / "dense" / "model.safetensors")
    smaller = AutoModelForCausalLM.from_pretrained(out)
    order = [f"{kind}.{block}" for block in range(len(smaller.model.layers)) for kind in ("mlp", "heads")]
    assert sorted(order) == sorted(scores)
    sizes = [len(scores[key]) for key in order]
    p, stays = (dict(zip(order, causes[key].split(sizes), strict=True)) for key in ("p", "keep"))
    for block, layer in enumerate(smaller.model.layers):
        weight = trained[f"model.layers.{block}.mlp.down_proj.weight"]
        columns = layer.mlp.down_proj.weight.T
        kept = [place for place in range(weight.shape[1]) if bool((columns == weight[:, place]).all(1).any())]
        gone = [place for place in range(weight.shape[1]) if place not in kept]
        # 30 % of 48 neurons are 14.4, and of the two heads of a group one is the nearest.
        assert len(kept) == layer.mlp.down_proj.in_features == 34
        own = p[f"mlp.{block}"]
        assert own[kept].max() <= own[gone].min() and stays[f"mlp.{block}"].nonzero().flatten().tolist() == kept
        size = smaller.config.head_dim
        queries = trained[f"model.layers.{block}.self_attn.q_proj.weight"].reshape(2, 2, size, -1)
        own, two = (found[f"heads.{block}"].reshape(2, 2) for found in (p, stays))
        assert torch.equal(two.int().argmax(1), own.argmin(1)) and two.sum(1).tolist() == [1, 1]
        assert torch.equal(
            layer.self_attn.q_proj.weight.reshape(2, size, -1), queries[torch.arange(2), own.argmin(1)]
        ) and bool((own[:, 0] != own[:, 1]).all())
    lines = list(csv.DictReader((out / "series.csv").open()))
    assert [line["kept"] == "True" for line in lines] == causes["keep"].tolist()
    assert lines[47]["series"] == "mlp 0, unit 47" and lines[48]["series"] == "heads 0, unit 0"
    # What is saved has the perplexity that the report gives.
    tokenizer = byte_tokenizer()
    windows = evaluation_windows(load_text(str(tmp_path / "text.txt"), evaluation=True), tokenizer, 32, 8).input_ids
    perplexities = report["legcnet"]["perplexities"]
    assert float(window_nll(smaller, windows).mean().exp()) == pytest.approx(perplexities["legcnet"], rel=1e-5)
    assert perplexities["legcnet"] == report["evaluation"]["pruned"]["perplexity"]
    assert len(set(perplexities.values())) == 3
    card = (out / "README.md").read_text()
    assert "units cause errors in" in capsys.readouterr().out and str(tmp_path) not in card
    assert f"by LEGCNet, {perplexities['magnitude']:.2f} by norm and {perplexities['random']:.2f} by chance" in card
    # Not the base model's perplexity is compared with, but the fine-tuned one's.
    assert f"from {report['evaluation']['dense']['perplexity']:.3f} of the dense model, trained alike, to" in card


@settings(deadline=None)
@given(st.sampled_from(["llama", "gpt2", "phi3", "gpt_neox"]), st.floats(0.01, 0.9), st.data())
def test_a_share_of_the_units_is_that_share_of_every_block(family: str, share: float, data: st.DataObject) -> None:
    model = tiny_model(family)
    config = model.config
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = 4 * config.hidden_size if family == "gpt2" else config.intermediate_size
    have = {"mlp": width, "attention": groups, "heads": heads // groups}
    units = data.draw(st.sampled_from([["mlp"], ["mlp", "attention"], *([["mlp", "heads"]] if heads > groups else [])]))
    gone = {kind: round(share * have[kind]) for kind in units}
    if any(gone[kind] == have[kind] for kind in units) or not any(gone.values()):
        return
    sparsity, budget = budget_of_units(model, units, share)
    config = IntraFusionConfig(fusion="none", units=units, sparsity=sparsity, budget=budget)
    after = plan_structure(model, config).after
    left = {"mlp": after.width, "attention": after.groups, "heads": after.heads // after.groups}
    assert {kind: have[kind] - left[kind] for kind in units} == gone


def test_less_than_half_a_unit_is_said() -> None:
    with pytest.raises(
        BadInputError, match=r"sparsity: 0.01 of the units of mlp, heads is less than half a unit.*0.021"
    ):
        budget_of_units(tiny_model("llama"), ["mlp", "heads"], 0.01)
