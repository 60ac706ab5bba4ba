"""What structured pruning refuses, foresees and says of itself."""

import json
import re

import pytest
import torch
from reduced import reduced
from safetensors.torch import save_file
from tiny import byte_tokenizer, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_prune.cli import main
from hf_prune.compose import make_allocation, make_config
from hf_prune.errors import BadInputError, RunError
from hf_prune.estimate import estimate_reduction
from hf_prune.pruning import plan_pruning, prune
from hf_prune.report import findings
from hf_prune.structure import reduction, transport
from hf_prune.structure.groups import MLP, block_shape, find_groups


def test_gradients_that_overflow_are_said():
    from hf_prune.engine.gradients import loss_gradients

    model = tiny_model("llama")
    model.model.norm.weight.data *= float("inf")
    with pytest.raises(RunError, match="gradients hold NaN or Inf"):
        loss_gradients(model, tiny_ids(2, 16))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.7}, "would leave the MLPs empty"),
        ({"units": ["attention"], "sparsity": 0.9}, "would take all 2 units of attention"),
        ({"units": ["attention", "heads"]}, "choose one of the two"),
        ({"units": ["neurons"]}, "is unknown"),
        ({"units": ["mlp", "depth"], "budget": ["mlp=0.7", "depth=0.7"]}, "must make 1"),
        ({"units": ["mlp"], "budget": ["depth=1"]}, "it names depth"),
        ({"pattern": "2:4", "sparsity": 0.5}, "removes whole units"),
        ({"allocation": "erk"}, "layout to pad"),
        ({"fusion": "melt"}, "fusion: 'melt' is unknown"),
        ({"units": ["depth"], "sparsity": 0.1}, "nothing would go"),
        ({"layout": "pad", "allocation": "plan.json"}, "plan.json"),
        ({"budget": ["search"]}, "name both in units"),
        ({"budget": ["mlp=nan"]}, "must make 1"),
        ({"propagate": False}, "removes whole units"),
        ({"reconstruct": "linear"}, "set fusion to refit"),
        ({"importance": "output", "source_mass": "importance"}, "gives no masses"),
        ({"fusion_target": "kmeans", "fusion_cost": "activations"}, "centres of weights"),
    ],
)
def test_bad_input_is_one_sentence(options, words):
    with pytest.raises(BadInputError, match=words):
        reduced("llama", **options)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (None, "scores.safetensors cannot be read"),
        (torch.ones(48, 2), r"holds \[48, 2\] numbers for mlp.0"),
        (torch.full((48,), float("nan")), "or not finite ones"),
    ],
)
def test_scores_that_are_none_are_refused_before_anything_is_loaded(scores, words, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    if scores is not None:
        save_file({"mlp.0": scores}, tmp_path / "scores.safetensors")
    command = ["plan", "--model_name_or_path", str(tmp_path / "model"), "--method", "intra_fusion", "--fusion", "none"]
    assert main([*command, "--importance", str(tmp_path / "scores.safetensors")]) == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("options", "name", "fuses"),
    [
        ({"units": ["depth"]}, "structured-depth", False),
        ({"units": ["heads"]}, "structured-product", False),
        ({"units": ["mlp", "depth"]}, "intra_fusion", True),
        ({"units": ["attention"], "fusion": "none"}, "structured-product", False),
    ],
)
def test_a_run_is_named_after_what_it_does(options, name, fuses):
    config = make_config({"method": "intra_fusion", "importance": "product", **options})
    said = config.describe_run()
    assert said.name == name and ("optimal transport" in said.summary) == fuses
    assert config.make_reducer().fuses(config.units) == fuses


def test_a_transport_that_is_less_than_was_asked_for_is_said_with_its_numbers(monkeypatch, caplog):
    """Too many units for L1 distances, and too few rounds of sinkhorn."""
    _, plain = reduced("llama", fusion="ot")
    assert plain.reduction.cost == ["weights, L1"] and plain.reduction.converged and not caplog.messages
    monkeypatch.setattr(transport, "MOST_EXACT", 40)
    monkeypatch.setattr(transport, "MOST_ROUNDS", 1)
    seen = []

    def see(cost, source, target, solver):
        plan, error = own(cost, source, target, solver)
        seen.append((cost, error))
        return plan, error

    own = transport.transport
    monkeypatch.setattr(reduction, "transport", see)
    model = tiny_model("llama")
    group = find_groups(model, 0, MLP, block_shape(model))[0]
    rows = [[*(part.read()[unit].flatten() for part in (*group.producers, group.consumer))] for unit in range(48)]
    rows = torch.stack([torch.cat(row) / torch.cat(row).norm() for row in rows])
    config = make_config({"method": "intra_fusion", "sparsity": 0.25, "fusion_solver": "sinkhorn"})
    result = prune(model, config, input_ids=None).reduction
    kept = torch.tensor(result.kept[0]["mlp"])
    assert torch.allclose(seen[0][0], (rows[:, None] - rows[kept]).square().sum(2).sqrt(), atol=2e-3)
    # One round from zero potentials, in the plain domain: the columns' masses are met, then the rows'.
    cost = seen[0][0].double()
    kernel = (-cost / (0.05 * cost.mean())).exp()
    kernel = kernel / kernel.sum(dim=0) / len(kept)
    kernel = kernel / kernel.sum(dim=1, keepdim=True) / 48
    assert seen[0][1] == pytest.approx(float((kernel.sum(dim=0) - 1 / len(kept)).abs().sum()) / 2, rel=1e-3)
    worst = max(error for _, error in seen)
    assert result.marginal_error == worst > 1e-3 and not result.converged
    assert result.cost == ["weights, L2"] and result.solver == ["sinkhorn"]
    assert "between 48 units would take hours here; L2 is taken" in caplog.messages[0]
    assert f"not converge in block 0, {seen[0][1]:.2g} of the mass" in caplog.messages[1]
    told = findings.fused({"structure": result.to_dict()})
    assert "L2, as there were too many" in told and f"{100 * worst:.2f} % of the mass is in the wrong place" in told


@pytest.mark.filterwarnings("ignore:numItermax")
def test_an_exact_transport_that_is_cut_short_is_no_result(monkeypatch):
    monkeypatch.setattr(transport, "_ITERATIONS", 1)
    with pytest.raises(RunError, match=r"fusion_solver: emd of 48 units to \d+ ended before its optimum"):
        reduced("llama", fusion="ot")


@pytest.mark.parametrize(("most", "asked"), [(2, True), (1, False)])
def test_exact_transport_of_any_kind_of_unit_is_known_to_need_a_library_beforehand(most, asked, monkeypatch):
    """Of two key-value groups, where 48 neurons are too many for it."""
    looked = []
    monkeypatch.setattr("hf_prune.reduction.check_installed", lambda: looked.append(True))
    monkeypatch.setattr(transport, "MOST_EXACT", most)
    config = make_config({"method": "intra_fusion", "sparsity": 0.4, "units": ["mlp", "attention"]})
    plan_pruning(tiny_model("llama"), config)
    assert bool(looked) is asked


def test_a_transport_is_foreseen_to_take_about_what_it_took(monkeypatch):
    """The shape of SmolLM2-135M at 20 %: 48 s were measured on two idle cores, 94 are the parts' sum on one."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=128))
    config = make_config({"method": "intra_fusion", "sparsity": 0.2})
    plan = plan_pruning(model, config)
    for threads, seconds in ((2, 48), (1, 94)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        foreseen = estimate_reduction(model, plan, config, None, False, 0, 128, "float32", torch.device("cpu"))
        assert 0.6 * seconds < foreseen.seconds < 2 * seconds


def test_what_shares_widths_out_is_foreseen():
    """Fisher's forward, the same again and a backward over at most eight windows; the widest block's size after it."""
    options = {"method": "intra_fusion", "layout": "pad", "allocation": "fisher", "fusion": "refit"}
    config, model = make_config(options), tiny_model("llama")
    plan = plan_pruning(model, config, "", tiny_ids(8, 32))
    with torch.device("meta"):
        empty = type(model)(model.config)
    given = (empty, plan, config, make_allocation(config))
    plain, fisher = (estimate_reduction(*given, own, 12, 128, "float32", torch.device("cpu")) for own in (False, True))
    assert fisher.walk_flops - plain.walk_flops == pytest.approx(3 * 8 * 128 * fisher.flops_per_token)
    stored = plan.structure["parameters_before"] - plan.structure["parameters_after"]
    assert fisher.flops_per_token - fisher.nonzero_flops_per_token == pytest.approx(2 * stored)


def test_earning_back_is_counted_in_decoded_tokens():
    report = {
        "structure": {"solver_seconds": 30.0},
        "efficiency": {"dense": {"decode_tokens_per_second": 20}, "pruned": {"decode_tokens_per_second": 25}},
    }
    # 50 ms a token before, 40 ms after.
    assert findings.earned_back(report).endswith("took 30 s, which 3,000 decoded tokens earn back")
    report["efficiency"]["pruned"]["decode_tokens_per_second"] = 19
    assert findings.earned_back(report).endswith("took 30 s")
    assert findings.earned_back({}) == ""


def test_refitting_takes_time_that_is_counted():
    _, result = reduced("llama", fusion="refit", importance="wanda")
    assert result.reduction.solver_seconds > 0


def test_blocks_that_share_weights_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BadInputError, match="shares its weight"):
        prune(model, make_config({"method": "intra_fusion"}))


def test_a_padded_model_is_called_what_it_is(tmp_path, capsys):
    """The widest block has all its neurons: nothing is stored less, and all that goes are zeros."""
    model = tiny_model("llama")
    for block, scale in enumerate((0.7, 1.0, 100.0)):
        model.model.layers[block].mlp.down_proj.weight.data *= scale
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} dogs\n" for number in range(900)))
    recipe = {
        "model_name_or_path": str(tmp_path / "model"), "method": "intra_fusion", "fusion": "none", "sparsity": 0.25,
        "layout": "pad", "allocation": "fisher", "dataset_name": str(text), "num_calibration_samples": 8,
        "seq_length": 32, "eval_dataset_name": str(text), "eval_seq_length": 32, "eval_max_windows": 2,
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    said = {}
    for command in (
        ["plan", "--config", str(tmp_path / "recipe.yaml"), "--save", str(tmp_path / "plan.json")],
        ["prune", "--config", str(tmp_path / "recipe.yaml")],
        ["inspect", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png")],
        ["evaluate", str(tmp_path / "out"), "--eval_efficiency=false"],
    ):
        assert main(command) == 0
        said[command[0]] = " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    widths = report["structure"]["widths"]
    assert sum(widths) == 3 * 28 and max(widths) == 48 and report["structure"]["removed"] == 0
    assert json.loads((tmp_path / "plan.json").read_text())["structure"]["widths"] == widths
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [f"Neurons an MLP, unpadded 48 {min(widths)} to 48 {sum(widths) / 144 - 1:+.1%}".replace("%", " %")]
    zeros = f"{report['structure']['padded']:.1%}".replace("%", " %")
    for place in ("plan", "inspect"):
        assert f"0.0 % of the blocks' parameters are removed by it, {zeros} become zeros" in said[place]
    for told in (said["plan"], said["inspect"], said["evaluate"], " ".join(card.replace("|", " ").split())):
        assert all(row in told for row in rows), told
    assert "decoded tokens earn back" not in card and "there is less to read and multiply" not in card
    assert "zeros are stored like any other weight" in card
    assert "`layout: pad` with `allocation: " in said["plan"] and all(row["passed"] for row in report["verification"])


def test_a_data_free_recipe_runs_without_text_and_a_second_pruning_is_refused(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    recipe = {"model_name_or_path": str(model), "method": "intra_fusion", "sparsity": 0.2, "eval_efficiency": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "output_dir": str(tmp_path / "out")}))
    assert main(["plan", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert "Neurons an MLP" in capsys.readouterr().out
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml")]) == 0
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert all(row["passed"] for row in report["verification"])
    assert report["structure"]["solver"] == ["emd"] and report["calibration"] is None
    capsys.readouterr()
    command = ["inspect", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png")]
    assert main(command) == 0
    inspected = " ".join(capsys.readouterr().out.split())
    assert "Neurons an MLP 48 32" in inspected and "Together: " in inspected
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} dogs\n" for number in range(900)))
    score = [f"--eval_dataset_name={text}", "--eval_seq_length=32", "--eval_max_windows=2", "--eval_efficiency=false"]
    assert main(["evaluate", str(tmp_path / "out"), *score]) == 0
    assert "Neurons an MLP 48 32" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 of 48 neurons an MLP" in card and "zeros" not in card.split("## Citation")[0].lower()
    capsys.readouterr()
    again = [f"--model_name_or_path={tmp_path / 'out'}", f"--output_dir={tmp_path / 'twice'}"]
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml"), *again]) == 2
    assert "has been pruned before" in capsys.readouterr().err
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml"), "--fusion", "refit", again[1]]) == 2
    assert "needs calibration text" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
