"""Tickets of language models: recipes, folders, their cards, every family, processes that are killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_runs import kill_behind
from safetensors.torch import load_file
from tiny import FAMILIES, MORE_FAMILIES, byte_tokenizer, tiny_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from hf_prune import cli
from hf_prune.data.text import load_text
from hf_prune.data.windows import evaluation_windows
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.methods.lottery_ticket import LotteryTicketConfig
from hf_prune.plan import select_views
from hf_prune.recipe import dump_yaml
from hf_prune.report.findings import next_step
from hf_prune.tickets import prepare_tickets, run_tickets
from hf_prune.training.arguments import make_train_recipe, make_training_arguments
from hf_prune.training.checkpoints import fingerprint
from hf_prune.training.text import Windows
from hf_prune.training.tickets import TicketSearch

RECIPE = {
    "device": "cpu",
    "dataset_name": "builtin:python-docs",
    "seq_length": 32,
    "max_train_windows": 64,
    "eval_dataset_name": "builtin:python-docs",
    "eval_split": "test",
    "eval_seq_length": 32,
    "eval_max_windows": 8,
    "rounds": 2,
    "pruning_rate": 0.4,
    "rewind_step": 2,
    "importance": "l2",
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "eval_efficiency": False,
}
FRESH = {
    "model_type": "llama",
    "config_overrides": "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2,tie_word_embeddings=true",
    "vocab_size": 300,
}


def test_another_config_is_another_training(tmp_path: Path) -> None:
    """Even where all initial weights are the same."""
    told = []
    for dropout in (0.0, 0.1):
        start = {**FRESH, "config_overrides": f"{FRESH['config_overrides']},attention_dropout={dropout}"}
        values = {**RECIPE, **start, "output_dir": str(tmp_path / "out")}
        ready = prepare_tickets(make_train_recipe(values, LotteryTicketConfig))
        told.append((ready.search.fingerprint, fingerprint("", ready.start.make_model(None).state_dict())))
    assert told[0][0] != told[1][0] and told[0][1] == told[1][1]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_has_tickets(family: str, tmp_path: Path) -> None:
    ids = tiny_ids(8, 16)
    model = tiny_model(family)
    names = [view.parameter_name for view in select_views(model, None, None, whole=True)[0]]

    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        given = make_training_arguments({"max_steps": 4, "learning_rate": 1e-3}, output_dir, 0, "cpu")
        return Trainer(model=model, args=given, train_dataset=Windows(ids), callbacks=callbacks)

    config = LotteryTicketConfig(rounds=2, pruning_rate=0.4, rewind_step=2, importance="lamp")
    make = lambda seed: tiny_model(family, seed=seed or 0).train()  # noqa: E731
    found, rounds = TicketSearch(make, names, make_trainer, lambda model: {}, config, tmp_path).run()
    total = sum(found.get_parameter(name).numel() for name in names)
    zeros = sum(int((found.get_parameter(name) == 0).sum()) for name in names)
    assert zeros == total - round(0.36 * total) and rounds[-1].kept == round(0.36 * total)
    dense = load_file(tmp_path / "round-00" / "model.safetensors")
    # Trained, and not only pruned.
    assert not torch.equal(
        found.get_parameter(names[0])[0], dense[names[0]][0] * (found.get_parameter(names[0])[0] != 0)
    )


def test_a_round_that_is_read_again_has_lost_the_same_layers(tmp_path: Path) -> None:
    """Biases, which carry paths, are zero in a fresh model."""
    names = [view.parameter_name for view in select_views(tiny_model("gpt2"), None, None, whole=True)[0]]

    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        given = make_training_arguments({"max_steps": 4, "learning_rate": 1e-2}, output_dir, 0, "cpu")
        return Trainer(model=model, args=given, train_dataset=Windows(tiny_ids(8, 16)), callbacks=callbacks)

    own = {"min_keep_ratio": 0.0, "on_collapse": "record", "controls": ["random_mask", "fresh_initialization"]}
    config = LotteryTicketConfig(rounds=1, pruning_rate=0.995, rewind_step=0, **own)
    make = lambda seed: tiny_model("gpt2", seed=seed or 0).train()  # noqa: E731
    told = [
        [
            found.collapsed
            for found in TicketSearch(make, names, make_trainer, lambda model: {}, config, tmp_path).run()[1]
        ]
        for _ in range(2)
    ]
    assert told[0] == told[1] and any(told[0])


@pytest.mark.parametrize("family", ["gpt2", None], ids=["pretrained", "fresh"])
def test_a_recipe_makes_a_verified_folder(family: str | None, tmp_path: Path) -> None:
    source = tmp_path / "model"
    start: dict[str, Any] = FRESH
    if family:
        tiny_model(family).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        start = {"model_name_or_path": str(source)}
    controls = {} if family else {"controls": ["random_mask"]}
    values = {**RECIPE, **start, **controls, "output_dir": str(tmp_path / "out"), "bf16": not family}
    report = run_tickets(make_train_recipe(values, LotteryTicketConfig))
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(1 - 0.6**2, abs=2e-3)
    assert all(row["passed"] for row in report["verification"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.use_cache is True
    zeros = sum(int((model.get_parameter(f"{view['name']}.weight") == 0).sum()) for view in report["views"])
    assert zeros / report["sparsity"]["pruned_parameters"] == pytest.approx(report["sparsity"]["achieved_pruned"])
    assert (tmp_path / "out" / "plots" / "rounds.png").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("naïve 2:4").input_ids) == "naïve 2:4"
    assert measured(tmp_path / "out") == pytest.approx(report["evaluation"]["pruned"]["perplexity"], rel=1e-5)
    # The recipe of a training says how it is evaluated as well; the weights that it began with are no dense model.
    assert cli.main(["evaluate", str(tmp_path / "out"), "--output_file", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["evaluation"]
    assert again["pruned"]["perplexity"] == pytest.approx(measured(tmp_path / "out"), rel=1e-5) and "dense" not in again
    assert not any("--sparsity" in step for step in next_step(report, "out"))
    card, last = (tmp_path / "out" / "README.md").read_text(), f"{report['evaluation']['pruned']['perplexity']:.2f}"
    assert "64.0 % of the weights of" in card and "set to zero by Layerwise lottery ticket" in card
    own = [f"{row['perplexity']:.2f}" for row in report["tickets"]]
    assert own[2] == last and f"2 rounds; perplexity {own[0]} at 0.0 %, {own[1]} at 40.0 %, {last} at 64.0 %" in card
    chance = f"; its control of a random mask {own[-1]}"
    assert (chance in card) == (not family) and len(own) == (3 if family else 4)
    # Once more from rounds that are all there: the folder says the same.
    if not family:
        shutil.rmtree(tmp_path / "out")
        once_more = run_tickets(make_train_recipe(values, LotteryTicketConfig))
        assert once_more["evaluation"] == report["evaluation"] and report["evaluation"]["dtype"] == "float32"
        assert once_more["tickets"] == report["tickets"]


def measured(folder: Path) -> float:
    """The folder's perplexity as anybody would measure it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows(load_text("builtin:python-docs", split="test"), tokenizer, 32, 8).input_ids
    return float(window_nll(model, windows).mean().exp())


def train(folder: Path, values: dict[str, Any], name: str, processes: int = 1) -> subprocess.Popen:
    file = folder / f"{name}.yaml"
    file.write_text(dump_yaml({**RECIPE, **FRESH, **values, "output_dir": str(folder / name)}))
    command = [sys.executable, "-m", "hf_prune", "train", "--config", str(file), "--num_processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(run: subprocess.Popen) -> None:
    _, errors = run.communicate(timeout=400)
    assert run.returncode == 0, errors[-2000:]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    values = {"max_steps": 40, "save_steps": 3}
    finished(train(tmp_path, values, "whole"))
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    rounds = tmp_path / "cut.rounds"
    # Killed in the middle of the first ticket's training, behind one of its checkpoints.
    kill_behind(train(tmp_path, values, "cut"), rounds, "l2-*/round-01.unfinished/checkpoints/checkpoint-*")
    assert (rounds / "round-00").is_dir() and not (tmp_path / "cut").exists()
    finished(train(tmp_path, values, "cut"))
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_two_killed_processes_go_on_to_the_same_bits(tmp_path: Path) -> None:
    values = {"max_steps": 20, "save_steps": 3}
    finished(train(tmp_path, values, "whole", processes=2))
    rounds = tmp_path / "two.rounds"
    unfinished = "l2-*/round-01.unfinished/checkpoints/checkpoint-*/trainer_state.json"
    kill_behind(train(tmp_path, values, "two", processes=2), rounds, unfinished)
    dense = rounds / "round-00" / "model.safetensors"
    written = dense.stat().st_mtime_ns
    assert not (tmp_path / "two").exists()
    finished(train(tmp_path, values, "two", processes=2))
    # What was finished was not made again.
    assert dense.stat().st_mtime_ns == written
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "two")]
    assert weights[0] == weights[1]
    report = json.loads((tmp_path / "two" / "prune_report.json").read_text())
    assert report["num_processes"] == 2 and report["training"]["batch_size"] == 8
    assert all(row["passed"] for row in report["verification"])
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(1 - 0.6**2, abs=1e-3)
    # Half of the windows were measured by each process: both have the saved weights.
    assert measured(tmp_path / "two") == pytest.approx(report["evaluation"]["pruned"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": None}, "dataset_name: training needs text"),
        ({"seq_length": 500_000}, "seq_length: .* holds"),
        ({"model_type": "lama"}, "model_type: 'lama' is no architecture"),
        ({"model_type": "mixtral"}, "model_type: mixtures of experts are not pruned while they train"),
        ({"config_overrides": "hidden=32"}, "config_overrides: 'hidden=32' sets no key of LlamaConfig"),
        ({"config_overrides": "hidden_size=30,num_attention_heads=4"}, "config_overrides: "),
        ({"vocab_size": 100}, "vocab_size: 100 is too small"),
        ({"vocab_size": None}, "vocab_size: a fresh model"),
        ({"model_name_or_path": "builtin:smollm2-135m-instruct"}, "model_name_or_path: name a model to go on with, or"),
        ({"learning_rat": 1e-3}, "learning_rat: unknown recipe key; did you mean learning_rate?"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not a number"),
        ({"lr_scheduler_type": "zigzag"}, "training: transformers' TrainingArguments refuses"),
        ({"ignore_data_skip": True}, "ignore_data_skip: a training that was cut"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: a training that begins anew"),
        ({"eval_strategy": "steps"}, "eval_strategy: the evaluation is before and behind"),
        ({"tokenizer_name": "gpt2"}, "tokenizer_name: vocab_size trains a tokenizer"),
        ({"config_overrides": "to_dict=3"}, "config_overrides: 'to_dict=3' sets no key"),
        ({"dtype": "bfloat16"}, "dtype: weights train in float32"),
        ({"device": "cuda:1"}, "device: cuda:1 names one of several"),
        ({"hub_token": "secret"}, "hub_token: log in with `hf auth login`"),
        ({"eval_dataset_name": None}, "eval_dataset_name: the recipe does not say"),
        ({"optim": "schedule_free_adamw"}, "optim: schedule-free optimizers keep the weights"),
        (
            {"model_type": "stacked_lstm", "config_overrides": "hidden_size=32", "label_smoothing_factor": 0.1},
            "label_smoothing_factor: .* of which StackedLSTMForCausalLM is none",
        ),
        (
            {"model_type": "gpt2", "config_overrides": "n_embd=32,n_layer=1,n_head=2,n_positions=16"},
            "seq_length: 32 is more than the 16 positions",
        ),
        (
            {"dataloader_drop_last": True, "max_train_windows": 3, "save_strategy": "epoch"},
            "training: there is not one step to take",
        ),
        ({"rewind_step": 6}, "rewind_step: 6 is past the end of the training, which takes 6 steps"),
    ],
)
def test_bad_recipes_write_nothing(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        run_tickets(
            make_train_recipe({**RECIPE, **FRESH, "output_dir": str(tmp_path / "out"), **values}, LotteryTicketConfig)
        )
    assert not list(tmp_path.iterdir())


def test_rounds_do_not_lie_where_the_result_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for rounds in (out, out / "rounds"):
        own = {**RECIPE, **FRESH, "output_dir": str(out), "rounds_folder": str(rounds)}
        with pytest.raises(BadInputError, match=r"rounds_folder: .* lies in output_dir"):
            run_tickets(make_train_recipe(own, LotteryTicketConfig))
    assert not list(tmp_path.iterdir())
