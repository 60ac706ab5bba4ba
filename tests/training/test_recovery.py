"""Recovery: zeros stay, the folder keeps its whole provenance, a cut costs nothing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_runs import kill_behind
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

from hf_prune import cli
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError, RunError
from hf_prune.hub.card import write_card
from hf_prune.hub.push import files_to_upload, public_copy
from hf_prune.pipeline import run
from hf_prune.plan import Plan, select_views
from hf_prune.recipe import make_recipe
from hf_prune.recovery import recover
from hf_prune.training.arguments import make_train_recipe
from hf_prune.training.checkpoints import alone_in, last_checkpoint
from hf_prune.training.recovery import RecoveryConfig

# Written behind all else of a checkpoint, by the main process.
CHECKPOINT = "checkpoint-*/seconds.json"
TEXT = "".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(3000))
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "seq_length": 32,
    "eval_seq_length": 32,
    "eval_max_windows": 12,
    "max_steps": 40,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 8,
    "eval_efficiency": False,
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sparse and a narrower folder of one dense model, and the text."""
    place = tmp_path_factory.mktemp("pruned")
    (place / "text.txt").write_text(TEXT)
    dense = tiny_model("llama")
    with torch.no_grad():
        # A random model says next to nothing; this one has opinions that pruning changes.
        for view in select_views(dense, None, None)[0]:
            view.parameter.mul_(8)
        dense.get_output_embeddings().weight.mul_(8)
    dense.save_pretrained(place / "dense")
    byte_tokenizer().save_pretrained(place / "dense")
    text = str(place / "text.txt")
    for name, own in {
        "sparse": {"method": "magnitude", "sparsity": 0.6},
        "narrow": {"method": "intra_fusion", "sparsity": 0.25, "fusion": "none"},
    }.items():
        run(
            make_recipe(
                {
                    **own, "model_name_or_path": str(place / "dense"), "eval_dataset_name": text, "eval_seq_length": 32,
                    "eval_max_windows": 12, "eval_efficiency": False, "output_dir": str(place / name), "device": "cpu",
                }
            )
        )  # fmt: skip
    return {"text": Path(text), **{name: place / name for name in ("dense", "sparse", "narrow")}}


def values(pruned: dict[str, Path], output: Path, **own: Any) -> dict[str, Any]:
    text = str(pruned["text"])
    return {**RECIPE, "dataset_name": text, "eval_dataset_name": text, "output_dir": str(output), **own}


def distance(dense: Path, folder: Path) -> float:
    """Mean divergence of a folder's next-token distributions from the dense model's."""
    ids = byte_tokenizer()(TEXT[: 8 * 32], return_tensors="pt").input_ids[:, : 8 * 32].reshape(8, 32)
    with torch.no_grad():
        ours, wanted = (
            Categorical(logits=AutoModelForCausalLM.from_pretrained(own)(ids).logits) for own in (folder, dense)
        )
    return float(kl_divergence(wanted, ours).mean())


def log_perplexity(folder: Path, text: Path) -> float:
    """Of the text's first twelve windows of 32 tokens, in float64 by torch.distributions."""
    ids = evaluation_windows(load_text(str(text), evaluation=True), byte_tokenizer(), 32, 12).input_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.double()
    return -float(Categorical(logits=logits[:, :-1]).log_prob(ids[:, 1:]).mean())


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("sparse", {"recovery": "lora"}),
        ("sparse", {"recovery": "full", "loss": "distillation"}),
        ("narrow", {"recovery": "full"}),
        ("narrow", {"recovery": "full", "loss": "distillation"}),
    ],
    ids=lambda own: own if isinstance(own, str) else "+".join(own.values()),
)
def test_recovery_keeps_zeros_shapes_and_provenance(
    kind: str, own: dict[str, str], pruned: dict[str, Path], tmp_path: Path
) -> None:
    report = recover(str(pruned[kind]), make_train_recipe(values(pruned, tmp_path / "out", **own), RecoveryConfig))
    before = load_file(pruned[kind] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.shape == after[name].shape
        if name.endswith("_proj.weight"):
            assert torch.equal(weight == 0, after[name] == 0) and not torch.equal(weight, after[name])
    assert all(row["passed"] for row in report["verification"])
    # A narrower model has no target of zeros.
    assert (
        report["verification"][0]["check"] == {"sparse": "density within the plan", "narrow": "sizes as planned"}[kind]
    )
    entry = report["recoveries"][0]
    if own.get("loss") != "distillation":
        assert entry["perplexity_after"] < 0.9 * entry["perplexity_before"]
    else:
        ends = [distance(pruned["dense"], folder) for folder in (pruned[kind], tmp_path / "out")]
        assert ends[1] < 0.7 * ends[0]
    dense = report["evaluation"]["dense"]["perplexity"]
    logs = [torch.tensor(value).log() for value in (dense, entry["perplexity_before"], entry["perplexity_after"])]
    # By the folders themselves.
    for folder, figure in ((pruned[kind], logs[1]), (tmp_path / "out", logs[2]), (pruned["dense"], logs[0])):
        assert log_perplexity(folder, pruned["text"]) == pytest.approx(float(figure), rel=1e-4)
    assert kind == "narrow" or entry["gap_closed"] is not None
    if entry["gap_closed"] is not None:
        assert entry["gap_closed"] == pytest.approx(float((logs[1] - logs[2]) / (logs[1] - logs[0])), rel=1e-3)
    assert not (tmp_path / "out.training").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hf_prune_recovery.yaml" in card and report["method"]["title"] in card and str(pruned["text"]) not in card
    saved = tmp_path / "out"
    with public_copy(saved, files_to_upload(saved)) as public:
        for file in ("hf_prune_recipe.yaml", "hf_prune_recovery.yaml", "prune_report.json"):
            assert "text.txt" not in (public / file).read_text(), file
        assert "max_steps: 40" in (public / "hf_prune_recovery.yaml").read_text()
    if own == {"recovery": "lora"}:
        # Once more, from there.
        again = values(pruned, tmp_path / "again", max_steps=2)
        first = report["seconds"]["recovery, train"]
        report = recover(str(tmp_path / "out"), make_train_recipe(again, RecoveryConfig))
        assert report["seconds"]["recovery, train"] == first and 0 < report["seconds"]["recovery 2, train"] != first
        names = {path.name for path in (tmp_path / "again").iterdir()}
        assert len(report["recoveries"]) == 2 and {"hf_prune_recovery.yaml", "hf_prune_recovery2.yaml"} <= names


def test_zeros_of_an_earlier_pruning_stay_as_well(pruned: dict[str, Path], tmp_path: Path) -> None:
    """The folder's plan speaks of its last pruning alone."""
    model = AutoModelForCausalLM.from_pretrained(pruned["sparse"])
    shutil.copytree(pruned["sparse"], tmp_path / "twice")
    plan = Plan.load(tmp_path / "twice" / "prune_plan.json")
    plan.views = [view for view in plan.views if "mlp" in view.name]
    plan.save(tmp_path / "twice" / "prune_plan.json")
    model.get_input_embeddings().weight.data[::3, ::2] = 0
    model.save_pretrained(tmp_path / "twice")
    own = make_train_recipe(values(pruned, tmp_path / "out", recovery="full", max_steps=3), RecoveryConfig)
    recover(str(tmp_path / "twice"), own)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("twice", "out"))
    for name, weight in before.items():
        if weight.ndim > 1:
            assert bool((after[name][weight == 0] == 0).all()) and not torch.equal(weight, after[name]), name


@pytest.mark.slow
def test_two_processes_recover(pruned: dict[str, Path], tmp_path: Path) -> None:
    """Killed, both of them, and gone on with, to the bits of a run that was not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(name: str) -> list[str]:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(json.dumps(values(pruned, tmp_path / name, max_steps=12, save_steps=2)))
        own = [sys.executable, "-m", "hf_prune", "recover", str(pruned["sparse"]), "--config", str(recipe)]
        return [*own, "--num_processes", "2"]

    begun = subprocess.Popen(command("out"), env=environment, stdout=subprocess.DEVNULL)
    kill_behind(begun, tmp_path / "out.training", CHECKPOINT)
    assert not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        done = subprocess.run(command(name), env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, [line for line in done.stderr.splitlines() if "hf-prune" in line]
    assert not (tmp_path / "out.training").exists()
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert report["num_processes"] == 2 and report["recoveries"][0]["training"]["batch_size"] == 16
    before, after, whole = (
        load_file(folder / "model.safetensors") for folder in (pruned["sparse"], tmp_path / "out", tmp_path / "whole")
    )
    assert all(torch.equal(after[name], own) for name, own in whole.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"recovery": "prayer"}, "recovery: 'prayer' is unknown"),
        ({"loss": "mse"}, "loss: 'mse' is unknown"),
        ({"lora_rank": 0}, "lora_rank: 0 is too few"),
        ({"lora_alpha": 0}, "lora_alpha: 0.0 must be above 0"),
        ({"dataset_name": None}, "dataset_name: training needs text"),
        ({"recovery": "full", "lora_rank": 4}, "lora_rank: means something with recovery: lora only"),
        ({"distillation_temperature": 2.0}, "distillation_temperature: means something with loss: distillation only"),
        ({"loss": "distillation", "label_smoothing_factor": 0.1}, "label_smoothing_factor: a distillation has no"),
        ({"model_name_or_path": "gpt2"}, "model_name_or_path: it follows from the folder"),
        ({"loss": "distillation", "base_model": "OTHER"}, "base_model: .* tokens and the pruned model"),
        (
            {"dataloader_drop_last": True, "max_train_windows": 4, "save_strategy": "epoch"},
            "training: there is not one step to take",
        ),
        ({"plan": "layers.7"}, r"prune_plan.json: model\.layers\.7\.\S+ is \[\d+, \d+\] in the plan and is not in the"),
        ({"plan": [8, 8]}, r"prune_plan.json: \S+ is \[8, 8\] in the plan and is \[\d+, \d+\] in the model"),
    ],
)
def test_bad_input_writes_nothing(own: dict[str, Any], message: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    if own.get("base_model") == "OTHER":
        config = tiny_model("llama").config
        config.vocab_size = 300
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        own = {**own, "base_model": str(tmp_path / "other")}
    folder = pruned["sparse"]
    if wrong := own.get("plan"):
        # A plan of another model.
        folder, own = tmp_path / "mixed", {}
        shutil.copytree(pruned["sparse"], folder)
        plan = Plan.load(folder / "prune_plan.json")
        first = plan.views[0]
        changed = {"shape": (8, 8)} if isinstance(wrong, list) else {"name": first.name.replace("layers.0", wrong)}
        plan.views[0] = replace(first, **changed)
        plan.save(folder / "prune_plan.json")
    with pytest.raises(BadInputError, match=message):
        recover(str(folder), make_train_recipe(values(pruned, tmp_path / "out", **own), RecoveryConfig))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("recovery", ["full", "lora"])
def test_a_recovery_that_ends_in_no_numbers_says_where(recovery: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = {"recovery": recovery, "learning_rate": 1e30, "lr_scheduler_type": "constant", "save_steps": 1}
    recipe = make_train_recipe(values(pruned, out, **own, logging_steps=1), RecoveryConfig)
    before = {path.name: path.read_bytes() for path in pruned["sparse"].iterdir() if path.is_file()}
    said = r"recovery: .* at step [23]; checkpoint-[12] before it is kept in .*out\.training"
    with pytest.raises(RunError, match=said):
        recover(str(pruned["sparse"]), recipe)
    assert not out.exists()
    assert before == {path.name: path.read_bytes() for path in pruned["sparse"].iterdir() if path.is_file()}
    kept = [file for file in (tmp_path / "out.training").rglob("*.safetensors") if file.parent.name[:5] == "check"]
    assert kept and all(bool(own.isfinite().all()) for file in kept for own in load_file(file).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [("sparse", {"recovery": "full"}), ("narrow", {"recovery": "lora", "loss": "distillation"})],
    ids=["sparse-full", "narrow-lora"],
)
def test_a_killed_recovery_goes_on_to_the_same_bits(
    kind: str, how: dict[str, str], pruned: dict[str, Path], tmp_path: Path
) -> None:
    own: dict[str, Any] = {"max_steps": 60, "save_steps": 2, **how}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recover(str(pruned[kind]), make_train_recipe(values(pruned, whole, **own), RecoveryConfig))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values(pruned, cut, **own)))
    command = [sys.executable, "-m", "hf_prune", "recover", str(pruned[kind]), "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_PRUNE_QUIET": "1"}
    begun = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    kill_behind(begun, tmp_path / "cut.training", CHECKPOINT)
    assert not cut.exists()
    # Neither another recipe nor another model goes on from there.
    another = pruned["narrow" if kind == "sparse" else "sparse"]
    for folder, other in ((pruned[kind], {"learning_rate": 1e-3}), (another, {})):
        with pytest.raises(BadInputError, match=r"cut\.training holds a training of another model, text or recipe"):
            recover(str(folder), make_train_recipe(values(pruned, cut, **own, **other), RecoveryConfig))
    last = last_checkpoint(tmp_path / "cut.training")
    assert last is not None
    before = float((last / "seconds.json").read_text())
    report = recover(str(pruned[kind]), make_train_recipe(values(pruned, cut, **own), RecoveryConfig))
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # What was trained before the kill took its time as well.
    assert report["recoveries"][0]["training"]["seconds"] > before > 0


@pytest.mark.parametrize("own", [{"recovery": "full", "bf16": True}, {"recovery": "lora"}], ids=["full", "lora"])
def test_sixteen_bit_weights_train_in_float32(own: dict[str, Any], pruned: dict[str, Path], tmp_path: Path) -> None:
    """Steps of 1e-5 are far below what bfloat16 weights could take up, and mixed precision leaves nothing behind."""
    half = tmp_path / "half"
    shutil.copytree(pruned["sparse"], half)
    model = AutoModelForCausalLM.from_pretrained(half).to(torch.bfloat16)
    model.save_pretrained(half)
    own = {**own, "max_steps": 30, "learning_rate": 1e-4 if own["recovery"] == "full" else 3e-3}
    report = recover(str(half), make_train_recipe(values(pruned, tmp_path / "out", **own), RecoveryConfig))
    before, after = (load_file(folder / "model.safetensors") for folder in (half, tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16 and report["dtype"] == "bfloat16"
    assert torch.equal(before[name] == 0, after[name] == 0)
    moved = (after[name] - before[name])[before[name] != 0]
    assert float((moved != 0).float().mean()) > 0.2
    assert all(row["passed"] for row in report["verification"])
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.use_cache is True


def test_without_its_dense_model_it_says_what_it_can(pruned: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "sparse"
    shutil.copytree(pruned["sparse"], place)
    recipe = (place / "hf_prune_recipe.yaml").read_text()
    (place / "hf_prune_recipe.yaml").write_text(recipe.replace(str(pruned["dense"]), str(tmp_path / "gone")))
    own = {"max_steps": 2, "eval_efficiency": True, "sample_prompts": ["7: "], "publish_samples": True}
    report = recover(str(place), make_train_recipe(values(pruned, tmp_path / "out", **own), RecoveryConfig))
    assert "dense" not in report["evaluation"] and report["recoveries"][0]["gap_closed"] is None
    assert "pruned" in report["efficiency"] and "dense" not in report["efficiency"]
    assert set(report["samples"][0]) == {"prompt", "pruned"}
    assert report["evaluation"]["pruned"]["perplexity"] == report["recoveries"][0]["perplexity_after"]


def test_prompts_are_shown_as_the_recovery_says(pruned: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = {"max_steps": 2, "sample_prompts": ["a secret prompt"], "publish_samples": True}
    report = recover(str(pruned["sparse"]), make_train_recipe(values(pruned, out, **own), RecoveryConfig))
    assert len(report["samples"]) == 1
    recipe = (out / "hf_prune_recovery.yaml").read_text()
    for agreed in (True, False):
        (out / "hf_prune_recovery.yaml").write_text(
            recipe.replace("publish_samples: true", f"publish_samples: {agreed}")
        )
        write_card(out, report, (out / "hf_prune_recipe.yaml").read_text())
        with public_copy(out, files_to_upload(out)) as public:
            texts = [path.read_text() for path in public.glob("*") if path.suffix in (".md", ".json", ".yaml")]
        assert any("a secret prompt" in text for text in texts) is agreed
        assert not any(str(pruned["dense"].parent) in text for text in texts)


def test_a_folder_that_was_never_pruned_is_refused(pruned: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_train_recipe(values(pruned, tmp_path / "out"), RecoveryConfig)
    with pytest.raises(BadInputError, match="no pruned model that hf_prune has written"):
        recover(str(pruned["dense"]), recipe)
    shutil.copytree(pruned["sparse"], tmp_path / "without")
    (tmp_path / "without" / "hf_prune_recipe.yaml").unlink()
    with pytest.raises(BadInputError, match=r"has written, hf_prune_recipe\.yaml is missing"):
        recover(str(tmp_path / "without"), recipe)


def test_what_only_the_pruning_saw_is_still_said(pruned: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "sparse"
    shutil.copytree(pruned["sparse"], place)
    report = json.loads((place / "prune_report.json").read_text())
    report["views"][1] |= {"zeros_before": 7, "scarce": True}
    (place / "prune_report.json").write_text(json.dumps(report))
    after = recover(str(place), make_train_recipe(values(pruned, tmp_path / "out", max_steps=2), RecoveryConfig))
    assert [(row["zeros_before"], row["scarce"]) for row in after["views"][:3]] == [(0, False), (7, True), (0, False)]
    total = sum(view.numel for view in Plan.load(place / "prune_plan.json").views)
    assert after["sparsity"]["zeros_before_pruned"] == pytest.approx(7 / total)


def test_evaluate_goes_by_the_last_recipe_alone(pruned: dict[str, Path], tmp_path: Path) -> None:
    """What the pruning was scored on is none of the recovery's business, where that one is silent too."""
    place, out = tmp_path / "sparse", tmp_path / "out"
    shutil.copytree(pruned["sparse"], place)
    recipe = (place / "hf_prune_recipe.yaml").read_text().replace(str(pruned["dense"]), str(tmp_path / "gone"))
    (place / "hf_prune_recipe.yaml").write_text(f"{recipe}eval_add_bos: true\n")
    own = {"max_steps": 2, "base_model": str(pruned["dense"])}
    report = recover(str(place), make_train_recipe(values(pruned, out, **own), RecoveryConfig))
    assert cli.main(["evaluate", str(out), "--output_file", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["evaluation"]
    assert again["windows"] == report["evaluation"]["windows"] == 12 and again["add_bos"] is False
    for name in ("dense", "pruned"):
        assert again[name]["perplexity"] == pytest.approx(report["evaluation"][name]["perplexity"], rel=1e-6)


def test_one_run_at_a_time(pruned: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_train_recipe(values(pruned, tmp_path / "out", max_steps=2), RecoveryConfig)
    with alone_in(tmp_path / "out.training"):
        with pytest.raises(BadInputError, match=r"another run trains in .*out.training already"):
            recover(str(pruned["sparse"]), recipe)
    assert not list(tmp_path.iterdir())
    recover(str(pruned["sparse"]), recipe)


def test_a_launchers_precision_decides_as_well(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, named = (
        make_train_recipe(values(pruned, tmp_path / "out", **own), RecoveryConfig) for own in ({}, {"bf16": True})
    )
    before = (plain.decisive, named.decisive)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert plain.decisive != before[0] and named.decisive == before[1]
