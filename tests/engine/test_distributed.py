"""Two real processes against one: the masks and the perplexity are the same but for float64 rounding."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import list_mixture
import pytest
import torch
from cut_runs import CONTEXT
from safetensors.torch import load_file
from tiny import byte_tokenizer, matrix_of, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from hf_prune.engine.walk import _assign
from hf_prune.plan import Plan


def prune(folder: Path, recipe: dict, processes: int, relaunched: bool = False) -> dict:
    """Run the command line in `processes` processes, which accelerate or it itself starts, and return its report."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**recipe, "output_dir": str(folder / "out")}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "hf_prune", "prune", "--config", str(path)]
    if relaunched:
        command = [sys.executable, "-m", "hf_prune", "prune", "--config", str(path), "--num_processes", str(processes)]
        command += ["--tee", "3", "--log_dir", str(folder / "logs")]
    # The same threads a process whatever their number: float32 sums depend on it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "out" / "prune_report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("phi3", {"method": "balanced", "reconstruct": "block", "reconstruct_passes": 2}),
        ("mixtral", {"method": "fcpts", "fcpts_score": "wanda", "fcpts_steps": 4, "fcpts_batch_size": 2}),
    ],
)
def test_two_processes_prune_like_one(family: str, own: dict, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(family).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (tmp_path / "text.txt").write_text("".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(3000)))
    recipe = {
        "model_name_or_path": str(model), **own, "sparsity": 0.5, "dataset_name": str(tmp_path / "text.txt"),
        "num_calibration_samples": 165, "seq_length": 64, "eval_dataset_name": str(tmp_path / "text.txt"),
        "eval_seq_length": 64, "eval_max_windows": 21, "eval_efficiency": False,
    }  # fmt: skip
    relaunches = family == "phi3"
    one, two = (prune(tmp_path / str(number), recipe, number, relaunches and number > 1) for number in (1, 2))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    # What is accelerate's among the flags got there: a log of each process.
    assert len(list((tmp_path / "2" / "logs").rglob("stderr.log"))) == (2 if relaunches else 0)
    outputs = [tmp_path / str(number) / "out" for number in (1, 2)]
    weights = [AutoModelForCausalLM.from_pretrained(output).state_dict() for output in outputs]
    same = total = 0
    for view in Plan.load(outputs[0] / "prune_plan.json").views:
        masks = [matrix_of(tensors, view) != 0 for tensors in weights]
        same, total = same + int((masks[0] == masks[1]).sum()), total + masks[0].numel()
    assert same / total >= 0.999
    for name in ("dense", "pruned"):
        assert two["evaluation"][name]["perplexity"] == pytest.approx(one["evaluation"][name]["perplexity"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_remove_the_units_that_one_does(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (tmp_path / "text.txt").write_text("".join(f"{n}: {n * n} foxes, {n % 7} dogs\n" for n in range(3000)))
    recipe = {
        "model_name_or_path": str(model), "method": "intra_fusion", "fusion": "ot+refit", "importance": "output",
        "sparsity": 0.4, "units": ["mlp", "attention", "depth"], "dataset_name": str(tmp_path / "text.txt"),
        "num_calibration_samples": 165, "seq_length": 64, "eval_efficiency": False,
    }  # fmt: skip
    for processes in (1, 2):
        prune(tmp_path / str(processes), recipe, processes)
    one, two = (load_file(tmp_path / str(processes) / "out" / "model.safetensors") for processes in (1, 2))
    for name, weight in one.items():
        # The same units, and weights that differ by the order of float64 sums.
        assert torch.allclose(weight, two[name], rtol=1e-3, atol=1e-5), name


def pruned_by_two(ids: torch.Tensor, folder: Path) -> tuple[list[int | None], list[str]]:
    """Exit codes and errors of two processes that prune the list mixture, whose weights the first one saves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=list_mixture.prune_share, args=(ids, rank, port, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    return [process.exitcode for process in started], [file.read_text() for file in sorted(folder.glob("error-*"))]


@pytest.mark.slow
def test_experts_in_a_list_are_added_up_each_with_itself_wherever_it_is_called_first(tmp_path: Path) -> None:
    model, ids = list_mixture.model(), tiny_ids(64, 64)
    orders = [list_mixture.order_of_use(model, own) for own in ids.split(16)[:2]]
    assert orders[0] == orders[1][::-1], "or this test compares nothing"
    routers = {name: own.clone() for name, own in model.state_dict().items() if "router" in name}
    list_mixture.prune_it(model, ids)
    assert len(routers) == 3 and all(torch.equal(model.state_dict()[name], own) for name, own in routers.items())
    codes, _ = pruned_by_two(ids, tmp_path)
    assert codes == [0, 0]
    pruned = load_file(tmp_path / "pruned.safetensors")
    # What is tied to the embeddings is left out.
    assert pruned.keys() == {name for name in model.state_dict() if "lm_head" not in name}
    for name, two in pruned.items():
        one = model.state_dict()[name]
        assert float(((one != 0) == (two != 0)).float().mean()) >= 0.99, name
        assert float((one - two).norm() / one.norm()) < 0.02, name
    # One process's windows are of one token, and reach one expert alone.
    ids[16:32] = ids[48:] = 5
    codes, errors = pruned_by_two(ids, tmp_path)
    assert codes == [1, 1] and len(set(errors)) == 1 and len(errors) == 2, errors
    assert re.match(r"model\.layers\.0\.mlp\.experts\.\d\.up saw no calibration token on one of the", errors[0])


def test_work_is_spread_dearest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_prune.engine.distributed.world_size", lambda: 2)
    assert _assign([1.0, 8.0, 3.0, 4.0]) == [0, 0, 1, 1] or _assign([1.0, 8.0, 3.0, 4.0]) == [1, 0, 1, 1]
    loads = [
        sum(c for c, o in zip([1.0, 8.0, 3.0, 4.0], _assign([1.0, 8.0, 3.0, 4.0]), strict=True) if o == r)
        for r in (0, 1)
    ]
    assert sorted(loads) == [8.0, 8.0]


def test_statistics_do_not_depend_on_who_gathers_them() -> None:
    from hf_prune.engine.statistics import Statistics

    chunks = torch.randn(6, 40, 24).unbind(0)
    whole = Statistics({"gram", "sum_of_squares"}, 24, torch.device("cpu"))
    halves = [Statistics({"gram", "sum_of_squares"}, 24, torch.device("cpu")) for _ in range(2)]
    for place, chunk in enumerate(chunks):
        whole.add(chunk)
        halves[place % 2].add(chunk)
    whole.finish(lambda tensor: None)
    others = iter([torch.tensor([halves[1].count]), *halves[1]._totals.values()])
    halves[0].finish(lambda tensor: tensor.add_(next(others)))
    assert halves[0].count == whole.count
    torch.testing.assert_close(halves[0].gram, whole.gram, rtol=1e-14, atol=1e-11)
