"""The main job end to end on a tiny model: what lies in the folder, what the numbers are, and what bad input gets."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, T5Config

from hf_prune import cli
from hf_prune.arguments import SECTIONS, PruneConfig
from hf_prune.cli.arguments import split_launch_flags
from hf_prune.cli.evaluate import _brought_along
from hf_prune.errors import RunError
from hf_prune.fields import field_types
from hf_prune.methods import methods
from hf_prune.pipeline import run
from hf_prune.recipe import dump_yaml, make_recipe, parse_yaml

TEXT = "\n".join(f"Line {number}: the {number * 7919 % 101} quick brown foxes jump over it." for number in range(400))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder, with a card that carries a licence and a base model."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: some/original\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "secret-notes.txt"
    path.write_text(TEXT)
    return path


def recipe(dense: Path, text: Path, output: Path, **changes: object) -> dict:
    return {
        "model_name_or_path": str(dense),
        "method": "sparsegpt",
        "sparsity": 0.5,
        "dataset_name": str(text),
        "num_calibration_samples": 16,
        "seq_length": 64,
        "eval_dataset_name": str(text),
        "eval_seq_length": 64,
        "eval_max_windows": 20,
        "output_dir": str(output),
        **changes,
    }


@pytest.fixture(scope="module")
def finished(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run through the command line."""
    work = tmp_path_factory.mktemp("work")
    values = recipe(dense, text, work / "out", pattern="2:4", sample_prompts=["Line 7: the"])
    (work / "recipe.yaml").write_text("# mine\n" + json.dumps(values))
    assert cli.main(["prune", "--config", str(work / "recipe.yaml")]) == 0
    return work / "out"


def test_the_folder_is_a_stock_model_with_its_papers(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "hf_prune_recipe.yaml", "prune_plan.json", "prune_report.json",
        "plots/sparsity_by_layer.png",
    } <= names  # fmt: skip
    # The text is private, so that no result is published for machines to collect.
    assert not any(name.startswith(".eval_results/") for name in names)
    assert (finished / "hf_prune_recipe.yaml").read_text() == (finished.parent / "recipe.yaml").read_text()
    assert [path.name for path in finished.parent.iterdir() if path.name.startswith(".")] == []
    assert AutoTokenizer.from_pretrained(finished).chat_template


def test_the_report_says_what_the_weights_say(finished: Path) -> None:
    report = json.loads((finished / "prune_report.json").read_text())
    zeros, total = 0, 0
    with safe_open(finished / "model.safetensors", "pt") as tensors:
        for view in report["views"]:
            weight = tensors.get_tensor(f"{view['name']}.weight")
            assert (weight != 0).view(len(weight), -1, 4).sum(-1).max() <= 2
            assert float((weight != 0).float().mean()) == pytest.approx(view["density"])
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        everything = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(zeros / total)
    share = sum(int((weight == 0).sum()) for weight in everything) / sum(weight.numel() for weight in everything)
    assert report["sparsity"]["achieved_all"] == pytest.approx(share)
    assert report["base_model"] == "some/original" and report["base_license"] == "mit"
    assert report["verification"] and all(row["passed"] for row in report["verification"])
    assert report["forward_passes"] == pytest.approx(5 / 3)
    # SparseGPT moves what it keeps.
    assert 0.5 < report["displacement"]["changed"] <= 1 and 0 < report["displacement"]["moved"] < 1
    assert {"moved", "changed"} <= report["views"][0].keys()


def test_the_perplexities_are_those_of_a_plain_loop(finished: Path, dense: Path) -> None:
    report = json.loads((finished / "prune_report.json").read_text())["evaluation"]
    tokenizer = byte_tokenizer()
    rows = [line + "\n" for line in TEXT.split("\n")]
    rows[-1] = rows[-1].rstrip("\n")
    ids = torch.tensor(tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"][: 20 * 64]).view(20, 64)
    for name, folder in (("dense", dense), ("pruned", finished)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses = [float(model(window[None], labels=window[None]).loss) for window in ids]
        expected = float(torch.tensor(losses, dtype=torch.float64).mean().exp())
        assert report[name]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert report["change"]["ratio"] == pytest.approx(report["pruned"]["perplexity"] / report["dense"]["perplexity"])


def test_private_text_stays_at_home(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.is_file() and path.suffix in (".md", ".json") and path.name != "tokenizer.json":
            content = path.read_text()
            assert "quick brown" not in content, path
            assert "Line 7: the" not in content, path
    assert "secret-notes" not in (finished / "README.md").read_text()


def test_a_push_sends_no_private_text(finished: Path) -> None:
    from hf_prune.hub.push import files_to_upload, public_copy

    paths = files_to_upload(finished)
    with public_copy(finished, paths) as public:
        assert sorted(str(path.relative_to(public)) for path in public.rglob("*") if path.is_file()) == paths
        for path in paths:
            content = (public / path).read_bytes()
            if path == "tokenizer.json":
                continue
            for private in (b"quick brown", b"Line 7: the", b"secret-notes"):
                assert private not in content, path
        assert "pattern: 2:4" in (public / "hf_prune_recipe.yaml").read_text().replace("'", "")
        assert (public / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_samples_are_published_when_the_user_says_so(dense: Path, text: Path, tmp_path: Path) -> None:
    values = recipe(dense, text, tmp_path / "out", method="magnitude", dataset_name=None, eval_efficiency=False)
    report = run(make_recipe({**values, "sample_prompts": ["Line 7: the"], "publish_samples": True}))
    assert report["samples"][0]["prompt"] == "Line 7: the"
    assert report["calibration"] is None and report["forward_passes"] == 0
    assert "Line 7: the" in (tmp_path / "out" / "README.md").read_text()


def test_evaluate_and_inspect_read_the_folder_back(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result, plot = tmp_path / "result.json", tmp_path / "plot.png"
    code = cli.main(["evaluate", str(finished), "--eval_efficiency", "false", "--output_file", str(result)])
    assert code == 0
    before = json.loads((finished / "prune_report.json").read_text())["evaluation"]
    again = json.loads(result.read_text())["evaluation"]
    for name in ("dense", "pruned"):
        assert again[name]["perplexity"] == pytest.approx(before[name]["perplexity"], rel=1e-9)
    shown = capsys.readouterr().out
    assert "Sparsity, pruned weights" in shown
    assert cli.main(["inspect", str(finished), "--plot", str(plot)]) == 0
    assert "2:4" in capsys.readouterr().out and plot.stat().st_size > 1000


def test_a_folder_does_not_decide_that_its_code_may_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "foreign")
    recipe_file = tmp_path / "foreign" / "hf_prune_recipe.yaml"
    own = parse_yaml(recipe_file.read_text(), "")
    recipe_file.write_text(dump_yaml({**own, "trust_remote_code": True}))
    values, *_ = _brought_along(str(tmp_path / "foreign"))
    assert "trust_remote_code" not in values and values["eval_dataset_name"]


def test_an_existing_folder_is_not_overwritten_unless_asked(finished: Path, dense: Path, text: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    values = recipe(dense, text, finished)
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    assert cli.main(["prune", *flags]) == 2
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_failed_verification_fails_the_run_and_leaves_no_model(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_prune import finish

    def damage(model: object, tokenizer: object, folder: Path) -> None:
        saved(model, tokenizer, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    saved = finish.save_model
    monkeypatch.setattr(finish, "save_model", damage)
    with pytest.raises(RunError, match=r"failed its verification.*up_proj"):
        run(make_recipe(recipe(dense, text, tmp_path / "out", method="magnitude", eval_dataset_name=None)))
    # What it took so far is there for the same run, whose disk may be to blame.
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.pruning"]


def made_by(make: Callable[[Path], str | None], folder: Path) -> str:
    """What a maker of bad input says it made, else the folder it filled."""
    return make(folder) or str(folder)


def truncated(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poisoned(folder: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def bert(folder: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    BertForMaskedLM(config).save_pretrained(folder)


def encoder_decoder(folder: Path) -> None:
    folder.mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=32).save_pretrained(folder)


def empty(folder: Path) -> str:
    folder.mkdir()
    (folder / "empty.jsonl").write_text("")
    return str(folder / "empty.jsonl")


def broken(folder: Path) -> str:
    folder.mkdir()
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    return str(folder / "broken.jsonl")


BAD_RUNS = {
    "unknown key": ({"sparsty": 0.5}, "did you mean sparsity?"),
    "unknown method": ({"method": "sparsegbt"}, "method: 'sparsegbt' is unknown"),
    "sparsity outside": ({"sparsity": 1.5}, "sparsity: 1.5 is outside [0, 1)"),
    "sparsity against pattern": ({"sparsity": 0.6, "pattern": "2:4"}, "contradicts pattern 2:4"),
    "indivisible": ({"pattern": "2:5", "sparsity": None}, "do not divide into groups of 5"),
    "no model": ({"model_name_or_path": None}, "model_name_or_path"),
    "no such folder": ({"model_name_or_path": "./nowhere/model"}, "no folder './nowhere/model'"),
    "unknown Hub id": ({"model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
    "truncated weights": ({"model_name_or_path": truncated}, "model.safetensors"),
    "not finite": ({"model_name_or_path": poisoned}, "model.norm.weight holds NaN or Inf"),
    "not causal": ({"model_name_or_path": bert}, "no causal language model"),
    "encoder-decoder": ({"model_name_or_path": encoder_decoder}, "no causal language model"),
    "no data": ({"dataset_name": None}, "dataset_name: sparsegpt needs calibration text"),
    "missing data": ({"dataset_name": "./missing.jsonl"}, "dataset_name"),
    "empty name": ({"dataset_name": ""}, "dataset_name: sparsegpt needs calibration text"),
    "empty data": ({"dataset_name": empty}, "empty.jsonl"),
    "broken data": ({"dataset_name": broken}, "broken.jsonl"),
    "missing evaluation data": ({"eval_dataset_name": "./missing.txt"}, "eval_dataset_name"),
    "too little data": ({"num_calibration_samples": 100000}, "num_calibration_samples"),
    "unknown column": ({"text_column": "body"}, "text_column"),
    "target of nothing": ({"targets": "nothing_proj"}, "matches no linear layer"),
    "bad regex": ({"ignore": "re:("}, "is not a regular expression"),
    "bad dtype": ({"dtype": "int7"}, "dtype: 'int7'"),
    "bad device": ({"device": "toaster"}, "device: 'toaster'"),
    "absent device": ({"device": "cuda:99"}, "device: cuda:99"),
    "output is a file": ({"output_dir": __file__}, "output_dir"),
    "no output": ({"output_dir": None}, "output_dir"),
    "push without a name": ({"push_to_hub": True}, "hub_model_id"),
    "push while offline": ({"push_to_hub": True, "hub_model_id": "me/model"}, "HF_HUB_OFFLINE"),
    "saved plan missing": ({"allocation": "nowhere.json"}, "nowhere.json"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes, message = BAD_RUNS[case]
    made = {key: made_by(value, tmp_path / "bad") if callable(value) else value for key, value in changes.items()}
    values = recipe(dense, text, tmp_path / "out", **made)
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None))
    capsys.readouterr()
    assert cli.main(["prune", "--config", str(path)]) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert "Traceback" not in written.err and len(written.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no recipe"):
        cli.main(["prune", "--config", str(tmp_path / "none.yaml"), "--debug"])


def test_help_and_import_load_nothing_heavy() -> None:
    script = (
        "import sys\nimport hf_prune\nfrom hf_prune import cli\n"
        "assert cli.main(['--help']) == 0\nassert cli.main(['prune', '--help']) == 0\n"
        "assert cli.main(['search', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "--sparsity" in done.stdout and "--hub_model_id" in done.stdout and "--objective" in done.stdout


def test_flags_without_a_value_and_slips_are_refused(finished: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        ["push", str(finished), "--repo_id"],
        ["inspect", str(finished), "--plot"],
        ["evaluate", str(finished), "--output_file"],
        ["evaluate", str(finished), "--eval_max_window", "4"],
        ["plan", "--save", "--config", "x.yaml"],
        ["plan", "--save", "plan.txt"],
        ["prune", "--targets", "[a"],
    ):
        assert cli.main(arguments) == 2, arguments
    assert capsys.readouterr().err.count("\n") == 7


def test_an_untied_head_can_be_pruned_from_a_recipe(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    tiny_model("qwen3").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    changes = {"targets": ["lm_head"], "eval_dataset_name": None, "eval_efficiency": False}
    report = run(make_recipe(recipe(folder, text, tmp_path / "out", **changes)))
    assert [view["name"] for view in report["views"]] == ["lm_head"]
    assert report["views"][0]["density"] == pytest.approx(0.5, abs=0.01)


def test_quantized_models_are_refused(dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    flags = [f"--{key}={value}" for key, value in recipe(folder, text, tmp_path / "out").items()]
    assert cli.main(["prune", *flags]) == 2
    assert "is quantized" in capsys.readouterr().err


def test_several_processes_refuse_bad_input_in_one_sentence(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    values = recipe(dense, text, tmp_path / "out", num_processes=2, pattern="2:5", sparsity=0.6)
    assert cli.main(["prune", *[f"--{key}={value}" for key, value in values.items()]]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_flags_of_the_launcher_are_told_from_ours(capsys: pytest.CaptureFixture) -> None:
    given = [
        "--config",
        "r.yaml",
        "--gpu_ids",
        "2,3",
        "--block-size=64",
        "--main-process-port=29501",
        "--units",
        "mlp",
        "depth",
    ]
    own, launch = split_launch_flags(given)
    assert own == ["--config", "r.yaml", "--block-size=64", "--units", "mlp", "depth"]
    assert launch == ["--gpu_ids", "2,3", "--main-process-port=29501"]
    # No key of a recipe has the name of a launcher's flag, but for the one that is meant by both.
    sections = [*SECTIONS.values(), PruneConfig, *methods().values()]
    keys = {f"--{key}" for section in sections for key in field_types(section)}
    assert split_launch_flags(["--no_such_flag", *sorted(keys)]) == (["--no_such_flag", *sorted(keys)], [])
    assert cli.main(["prune", "--method", "wanda", "--gpu_ids", "1"]) == 2
    assert "gpu_ids: is a flag of accelerate launch; set num_processes to more than 1" in capsys.readouterr().err


def test_unknown_verbs_and_flags(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["shrink"]) == 2
    assert cli.main(["inspect", "somewhere", "--colour", "red"]) == 2
    assert cli.main(["push"]) == 2
    assert cli.main(["methods", "--all"]) == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_plan_says_what_will_happen_and_what_it_takes(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(dense, text, tmp_path / "out")))
    saved = tmp_path / "plan.json"
    assert cli.main(["plan", "--config", str(path), "--save", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "mlp.down_proj" in shown and "FLOPs a token" in shown
    plan = json.loads(saved.read_text())
    assert {view["density"] for view in plan["views"]} == {0.5} and len(plan["views"]) == 21
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_fit_is_refused_before_it_begins(dense: Path, text: Path, tmp_path: Path) -> None:
    from hf_prune.errors import BadInputError
    from hf_prune.preparation import check_feasible, prepare

    huge = tmp_path / "huge"
    huge.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (huge / name).write_bytes((dense / name).read_bytes())
    config = json.loads((huge / "config.json").read_text())
    config |= {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 100}
    (huge / "config.json").write_text(json.dumps(config))
    save_file({"placeholder": torch.zeros(1)}, huge / "model.safetensors")
    with pytest.raises(BadInputError, match="GB are free"):
        check_feasible(prepare(make_recipe(recipe(huge, text, tmp_path / "out"))))


def test_the_saved_recipe_runs_again(finished: Path, tmp_path: Path) -> None:
    values = parse_yaml((finished / "hf_prune_recipe.yaml").read_text(), "recipe")
    changes = {"output_dir": str(tmp_path / "again"), "eval_efficiency": False, "eval_dataset_name": None}
    run(make_recipe({**values, **changes}))
    first, second = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_allocation_that_looks_at_weights_is_planned_saved_and_carried_out(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved = tmp_path / "plan.json"
    common = ["--model_name_or_path", str(dense), "--method", "wanda", "--sparsity", "0.6"]
    common += ["--dataset_name", str(text), "--num_calibration_samples", "16", "--seq_length", "64"]
    assert cli.main(["plan", *common, "--allocation", "owl", "--min_keep_ratio", "0.1", "--save", str(saved)]) == 0
    assert "60.0 %" in capsys.readouterr().out
    planned = {view["name"]: view["density"] for view in json.loads(saved.read_text())["views"]}
    assert len(set(planned.values())) == 3  # one density a block
    reports = []
    for name, allocation in (("owl", "owl"), ("saved", str(saved))):
        command = ["prune", *common, "--allocation", allocation, "--output_dir", str(tmp_path / name)]
        assert cli.main([*command, "--min_keep_ratio", "0.1", "--eval_efficiency", "false"]) == 0
        reports.append(json.loads((tmp_path / name / "prune_report.json").read_text()))
        assert {view["name"]: view["target_density"] for view in reports[-1]["views"]} == planned
        assert all(row["passed"] for row in reports[-1]["verification"])
    assert [report["method"]["allocation"] for report in reports] == ["owl", "plan.json"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("owl", "saved")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_best_preset_runs_from_a_recipe_and_says_what_it_did(dense: Path, text: Path, tmp_path: Path) -> None:
    values = recipe(dense, text, tmp_path / "out", method="best", sparsity=0.6, eval_efficiency=False)
    report = run(make_recipe({**values, "reconstruct_passes": 2}))
    assert report["method"]["name"] == "best" and report["method"]["reconstruct"] == "block"
    assert [entry["block"] for entry in report["reconstruction"]] == [0, 1, 2]
    assert all(entry["after"] <= entry["before"] and entry["passes"] == 2 for entry in report["reconstruction"])
    assert report["sparsity"]["achieved_pruned"] == pytest.approx(0.6, abs=1e-3)
    assert all(row["passed"] for row in report["verification"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`reconstruct: block`" in card and "2406.07831" in card


def test_sensitivity_writes_a_table_a_picture_and_a_plan_to_edit(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    values = recipe(dense, text, tmp_path / "parts", method="wanda", sparsity=0.8)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    command = ["sensitivity", "--config", str(tmp_path / "recipe.yaml"), "--by", "kind"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "parts" / "sensitivity.json").read_text())
    assert [part["part"] for part in report["parts"]][-1] == "mlp.down_proj" and len(report["parts"]) == 7
    assert "all together" in out and "Rank correlation" in out
    # OWL gives a density to a block: it cannot tell kinds of layer apart.
    assert set(report["agreement"]) == {"erk", "fisher", "global", "layerwise_l1", "layerwise_l2"}
    assert (tmp_path / "parts" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "parts" / "sensitivity.csv").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "parts" / "prune_plan.json").read_text())["sparsity"] == pytest.approx(0.8)
    # A second run loses nothing of the first.
    assert cli.main(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
