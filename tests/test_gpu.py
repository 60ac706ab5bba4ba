"""A GPU gives what the CPU gives: the same masks up to rounding, the same budget, the same folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, MIXTURES, MORE_FAMILIES, byte_tokenizer, tiny_ids, tiny_model
from torch import Tensor

from hf_prune import cli
from hf_prune.allocation import ALLOCATIONS
from hf_prune.compose import make_config
from hf_prune.engine.offload import HostMemory, Offload
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.pruning import plan_pruning, prune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
GPU = torch.device("cuda")
EVERY = [*FAMILIES, *MORE_FAMILIES, *MIXTURES]
TEXT = "\n".join(f"Line {number}: the {number * 7919 % 101} quick brown foxes jump over it." for number in range(400))


def pruned(family: str, device: torch.device, dtype: torch.dtype = torch.float32, **options):
    model = tiny_model(family, dtype)
    # The same weights whatever the dtype, which a fresh model draws in its own.
    model.load_state_dict(tiny_model(family).state_dict())
    model.to(device)
    result = prune(model, make_config({"sparsity": 0.6, **options}), input_ids=tiny_ids(8, 32))
    return model, result


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "sparsegpt", "propagate": False},
        {"method": "ria"},
        {"method": "balanced"},
        {"method": "balanced", "sparsity": None, "pattern": "2:4"},
        {"method": "best", "reconstruct_passes": 1},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_masks_and_outputs_are_those_of_the_cpu(family: str, options: dict) -> None:
    dense = tiny_model(family)
    here, result = pruned(family, torch.device("cpu"), **options)
    there, other = pruned(family, GPU, **options)
    assert next(there.parameters()).is_cuda
    assert [view.density for view in other.plan.views] == pytest.approx(
        [view.density for view in result.plan.views], abs=2e-3
    )
    own, its = weights(here), weights(there)
    for view in result.plan.views:
        differ = (own[view.parameter] != 0) != (its[view.parameter] != 0)
        # Rounding swaps a few weights that matter equally little.
        assert float(differ.float().mean()) < 0.05, view.name
    ids = tiny_ids(4, 32, seed=9)
    with torch.no_grad():
        moved, apart = here(ids).logits - dense(ids).logits, there(ids.to(GPU)).logits.cpu() - here(ids).logits
    # Hundreds of steps and then a training let rounding grow.
    assert float(apart.norm()) < (0.4 if options["method"] == "best" else 0.2) * float(moved.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["sparsegpt", "balanced", "best"])
def test_half_precision_weights_with_statistics_in_float32(method: str, dtype: torch.dtype) -> None:
    options = {"method": method, **({"reconstruct_passes": 1} if method == "best" else {})}
    model, result = pruned("llama", GPU, dtype, **options)
    full, _ = pruned("llama", GPU, **options)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    own, its = weights(model), weights(full)
    same = [float(((own[v.parameter] != 0) == (its[v.parameter] != 0)).float().mean()) for v in result.plan.views]
    assert sum(same) / len(same) > 0.9


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_densities_are_those_of_the_cpu(allocation: str) -> None:
    options = {"method": "wanda", "allocation": allocation, "sparsity": 0.6}
    options |= {"fcpts_steps": 3} if allocation == "fcpts" else {}
    found = []
    for device in ("cpu", "cuda"):
        plan = plan_pruning(tiny_model("llama").to(device), make_config(options), input_ids=tiny_ids(8, 32))
        found.append([view.density for view in plan.views])
    assert found[1] == pytest.approx(found[0], abs=5e-3)


@pytest.mark.parametrize("train_weights", [False, True])
def test_thresholds_are_learned(train_weights: bool) -> None:
    _, result = pruned("llama", GPU, method="fcpts", train_weights=train_weights, fcpts_steps=4)
    assert result.sparsity == pytest.approx(0.6, abs=5e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "ot"},
        {"fusion": "ot+refit", "importance": "wanda", "fusion_cost": "activations"},
        {"fusion": "refit", "importance": "taylor"},
    ],
    ids=lambda options: options["fusion"],
)
def test_whole_units_go_as_on_the_cpu(family: str, options: dict) -> None:
    found = []
    dense = tiny_model(family)
    ids = tiny_ids(4, 32, seed=9)
    for device in ("cpu", "cuda"):
        model = tiny_model(family).to(device)
        prune(model, make_config({"method": "intra_fusion", "sparsity": 0.25, **options}), input_ids=tiny_ids(8, 32))
        with torch.no_grad():
            found.append(model(ids.to(device)).logits.cpu())
    with torch.no_grad():
        moved = found[0] - dense(ids).logits
    assert float((found[1] - found[0]).norm()) < 0.2 * float(moved.norm())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny_model("llama").save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    return folder


def recipe(place: Path, output: str, **changes: object) -> list[str]:
    values = {
        "model_name_or_path": place / "dense", "dataset_name": place / "text.txt", "output_dir": place / output,
        "num_calibration_samples": 16, "seq_length": 64, "eval_dataset_name": place / "text.txt", "eval_seq_length": 64,
        "eval_max_windows": 8, **changes,
    }  # fmt: skip
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_the_main_job_writes_the_folder_that_the_cpu_writes(place: Path) -> None:
    for device in ("cpu", "auto"):
        assert cli.main(["prune", *recipe(place, device, method="wanda", sparsity=0.5, device=device)]) == 0
    reports = [json.loads((place / device / "prune_report.json").read_text()) for device in ("cpu", "auto")]
    for kind in ("dense", "pruned"):
        figures = [report["evaluation"][kind]["perplexity"] for report in reports]
        assert figures[1] == pytest.approx(figures[0], rel=2e-3)
    assert all(row["passed"] for row in reports[1]["verification"])
    assert torch.cuda.get_device_name(0) in json.dumps(reports[1]["efficiency"])
    own, its = (load_file(place / device / "model.safetensors") for device in ("cpu", "auto"))
    assert own.keys() == its.keys()


def test_a_cut_run_goes_on_to_the_same_bits(place: Path) -> None:
    options = {"method": "balanced", "sparsity": 0.5, "eval_efficiency": False}
    assert cli.main(["prune", *recipe(place, "whole", **options)]) == 0
    assert cli.main(["prune", *recipe(place, "cut", **options, time_limit="0.001s")]) == 75
    assert cli.main(["prune", *recipe(place, "cut", **options)]) == 0
    assert (place / "whole/model.safetensors").read_bytes() == (place / "cut/model.safetensors").read_bytes()


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_blocks_that_come_and_go_become_the_same(family: str, offload: str, place: Path, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    options = {"method": "sparsegpt", "sparsity": 0.5, "allocation": "fisher", "output_importance": "fisher",
               "eval_efficiency": False, "model_name_or_path": tmp_path / "dense"}  # fmt: skip
    stored = []
    for kind in ("none", offload):
        output = tmp_path / kind
        assert cli.main(["prune", *recipe(place, "", **options | {"offload": kind, "output_dir": output})]) == 0
        stored.append({name: own for file in output.glob("*.safetensors") for name, own in load_file(file).items()})
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_the_next_block_is_read_ahead_into_pinned_memory() -> None:
    model = tiny_model("llama")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offload = Offload(model, HostMemory(model), GPU)
    for index in range(offload.count):
        with offload.at_work(index):
            ahead = offload._ahead.get(index + 1)
            assert (ahead is None) == (index == offload.count - 1)
            assert ahead is None or all(tensor.is_pinned() for tensor in ahead.result().values())
            for name, ((module, leaf), *_) in offload.units[index].items():
                assert getattr(module, leaf).is_cuda and torch.equal(getattr(module, leaf).cpu(), whole[name])


@pytest.mark.parametrize(("kind", "loss"), [("full", "language_modeling"), ("lora", "distillation")])
def test_recovery_keeps_the_zeros(place: Path, kind: str, loss: str) -> None:
    sparse = place / "sparse"
    if not sparse.exists():
        options = recipe(place, "sparse", method="wanda", sparsity=0.7, eval_efficiency=False)
        assert cli.main(["prune", *options]) == 0
    flags = [
        *("--recovery", kind, "--loss", loss, "--max_steps", "30", "--learning_rate", "3e-3"),
        *("--dataset_name", str(place / "text.txt"), "--seq_length", "64", "--eval_dataset_name"),
        *(str(place / "text.txt"), "--eval_seq_length", "64", "--eval_max_windows", "8"),
        *("--output_dir", str(place / f"recovered-{kind}")),
    ]
    assert cli.main(["recover", str(sparse), *flags]) == 0
    before, after = load_file(sparse / "model.safetensors"), load_file(place / f"recovered-{kind}/model.safetensors")
    for name, weight in before.items():
        if weight.ndim == 2 and "layers" in name:
            assert not bool(after[name][weight == 0].any()), name


def test_perplexity_is_that_of_the_cpu() -> None:
    model, ids = tiny_model("gemma3"), tiny_ids(4, 64)
    here = window_nll(model, ids)
    assert window_nll(model.to(GPU), ids).tolist() == pytest.approx(here.tolist(), rel=1e-4)
