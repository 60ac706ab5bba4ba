"""Tickets made by hand, whose overlap, chance, signs and movement can be counted on paper."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import matrix_of, tiny_ids, tiny_model
from torch import Tensor

from hf_prune.checkpoint.source import WeightFiles
from hf_prune.cli import main
from hf_prune.comparison import compare_tickets
from hf_prune.compose import make_config
from hf_prune.errors import BadInputError
from hf_prune.plan import Plan, ViewPlan
from hf_prune.pruning import prune


def ticket(folder: Path, weights: dict[str, Tensor]) -> str:
    folder.mkdir()
    views = [
        ViewPlan(name, f"{name}.weight", 0, (weight.shape[0], weight.shape[1]), False, 0.5)
        for name, weight in weights.items()
    ]
    Plan("", "Net", 0.5, "unstructured", "uniform", 0.0, views).save(folder / "prune_plan.json")
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    a = {"x": torch.tensor([[1.0, 2.0, 0.0, 0.0]]), "y": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}
    b = {"x": torch.tensor([[-1.0, 2.0, 3.0, 0.0]]), "y": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
    c = {"x": torch.tensor([[0.0, 5.0, 0.0, -1.0]]), "y": torch.tensor([[1.0, -1.0], [0.0, 0.0]])}
    return [ticket(tmp_path / name, weights) for name, weights in zip("abc", (a, b, c), strict=True)]


def test_overlap_chance_and_signs(three: list[str]) -> None:
    found = compare_tickets(three)
    x, y = found["layers"]
    assert (x["kept"], x["shared"], x["weights"]) == ([2, 3, 2], 1, 4)
    assert x["chance"] == pytest.approx(4 * (2 / 4) * (3 / 4) * (2 / 4))
    # a and b share places 0 and 1, a and c place 1, b and c place 1; only place 0 of a and b differs in sign.
    assert (x["pairs"], x["flips"]) == (4, 1)
    # y: a and b share (0, 1), a and c (0, 0) and (0, 1), b and c (0, 1); signs differ at (0, 1) wherever c is.
    assert (y["kept"], y["shared"], y["pairs"], y["flips"]) == ([2, 2, 2], 1, 4, 2)
    whole = found["together"]
    assert whole["shared_of_all"] == pytest.approx(2 / 8) and whole["shared_of_first"] == pytest.approx(2 / 4)
    assert whole["times_chance"] == pytest.approx(2 / (4 * 0.1875 + 4 * 0.125))
    assert whole["flips"] == pytest.approx(3 / 8) and "moved" not in whole


def test_experts_are_compared_by_the_names_that_their_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_model("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    models = []
    for method in ("magnitude", "wanda"):
        model = tiny_model("mixtral")
        plan = prune(model, make_config({"method": method, "sparsity": 0.5}), input_ids=tiny_ids(8, 32)).plan
        model.save_pretrained(tmp_path / method)
        plan.save(tmp_path / method / "prune_plan.json")
        models.append((plan, model.state_dict()))
    read, names = WeightFiles.read, []

    def noted(self: WeightFiles, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        found = read(self, wanted)
        names.extend(found)
        return found

    monkeypatch.setattr(WeightFiles, "read", noted)
    found = compare_tickets([str(tmp_path / "magnitude"), str(tmp_path / "wanda")], str(tmp_path / "dense"))
    # Once for each ticket from its own folder and from the dense one, however many experts a parameter holds.
    assert set(Counter(names).values()) == {4} and any("experts" in name for name in names)
    shared = moved = 0
    for layer, own, other in zip(found["layers"], models[0][0].views, models[1][0].views, strict=True):
        both = (matrix_of(models[0][1], own) != 0) & (matrix_of(models[1][1], other) != 0)
        assert (layer["layer"], layer["shared"]) == (own.name, int(both.sum()))
        shared, moved = shared + int(both.sum()), moved + sum(layer["moved"])
    assert found["together"]["shared_of_all"] == pytest.approx(shared / sum(view.numel for view in models[0][0].views))
    # Nothing of what stays has been changed.
    assert moved == 0


def test_movement_since_the_beginning(three: list[str], tmp_path: Path) -> None:
    initial = tmp_path / "initial.safetensors"
    save_file({"x.weight": torch.tensor([[0.5, -1.0, 9.0, 9.0]]), "y.weight": torch.ones(2, 2)}, initial)
    found = compare_tickets(three[:2], str(initial))
    whole, x = found["together"], found["layers"][0]
    # Kept are 1, 2 of a, which began at 0.5, -1, and -1, 2, 3 of b, which began at 0.5, -1, 9.
    wanted = [((0.5**2 + 3**2) / (0.5**2 + 1)) ** 0.5, ((1.5**2 + 3**2 + 6**2) / (0.5**2 + 1 + 81)) ** 0.5]
    assert x["displaced"] == pytest.approx(wanted) and found["layers"][1]["displaced"] == [0, 0]
    # a moved by 0.5 and 3 in x, by nothing in y; b by 1.5, 3 and 6 in x, by nothing in y.
    assert whole["moved"] == pytest.approx([3.5 / 4, 10.5 / 5]) and whole["flipped"] == pytest.approx([1 / 4, 2 / 5])


def test_a_ticket_keeps_its_initial_weights_beside_it(three: list[str]) -> None:
    for folder in three:
        rounds = Path(f"{folder}.rounds")
        rounds.mkdir()
        save_file({"x.weight": torch.zeros(1, 4), "y.weight": torch.zeros(2, 2)}, rounds / "initial.safetensors")
    assert compare_tickets(three)["together"]["moved"] == pytest.approx([5 / 4, 8 / 5, 8 / 4])


def test_rounds_are_found_from_another_folder(
    three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe's `rounds_folder` is relative to where the training was started."""
    rounds = tmp_path / "shared"
    rounds.mkdir()
    save_file({"x.weight": torch.zeros(1, 4), "y.weight": torch.zeros(2, 2)}, rounds / "initial.safetensors")
    for folder in three:
        recipe = f"output_dir: {Path(folder).name}\nrounds_folder: shared\n"
        (Path(folder) / "hf_prune_recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path.parent)
    own = [str(Path(folder).relative_to(tmp_path.parent)) for folder in three]
    assert compare_tickets(own)["together"]["moved"] == pytest.approx([5 / 4, 8 / 5, 8 / 4])


def test_files_that_do_not_hold_what_the_plan_says(three: list[str]) -> None:
    file = Path(three[1]) / "model.safetensors"
    save_file({"x.weight": torch.ones(1, 4)}, file)
    with pytest.raises(BadInputError, match=r"b: its files hold no y\.weight, which its plan names"):
        compare_tickets(three)
    save_file({"x.weight": torch.ones(1, 4), "y.weight": torch.ones(2, 3)}, file)
    with pytest.raises(BadInputError, match=r"b: y\.weight is \[2, 3\] there and \[2, 2\] in .*a; compare"):
        compare_tickets(three)


def test_deviation_is_over_the_ends_of_all_rounds(tmp_path: Path) -> None:
    """A ticket of two rounds, in a folder that its recipe names."""
    folder = Path(ticket(tmp_path / "a", {"x": torch.tensor([[3.0, 0.0, 4.0]])}))
    (folder / "hf_prune_recipe.yaml").write_text(f"rounds_folder: {tmp_path / 'shared'}\n")
    rounds = [{"number": number, "kind": "ticket"} for number in range(3)]
    rounds.insert(2, {"number": 1, "kind": "random_mask"})
    (folder / "prune_report.json").write_text(json.dumps({"tickets": rounds, "rounds": "l2-0"}))
    for number, values in enumerate(([1.0, 2.0, 4.0], [2.0, 0.0, 4.0], [3.0, 0.0, 4.0])):
        place = tmp_path / "shared" / ("l2-0" if number else "") / f"round-{number:02d}"
        place.mkdir(parents=True)
        save_file({"x.weight": torch.tensor([values])}, place / "model.safetensors")
    whole = compare_tickets([str(folder), str(folder)])["together"]
    # 1, 2, 3 deviate by sqrt(2 / 3), 4, 4, 4 by nothing; the second weight is not kept.
    assert whole["deviation"] == pytest.approx([(2 / 3) ** 0.5 / 2] * 2)


def test_the_command_writes_what_it_prints(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    initial = tmp_path / "initial.safetensors"
    save_file({"x.weight": torch.tensor([[1.0, 1.0, 1.0, 0.0]]), "y.weight": torch.ones(2, 2)}, initial)
    assert main(["compare", *three, "--output_dir", str(tmp_path / "out"), "--initial", str(initial)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # Of x: sqrt(1 / 2), sqrt((4 + 1 + 4) / 3), sqrt((16 + 1) / 1).
    assert "70.7 / 173.2 / 412.3" in printed
    assert "all keep 25.00 % of the weights, 50.0 % of what a keeps, 1.6 times what chance would" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json",
        "comparison.csv",
        "comparison.png",
    }
    assert main(["compare", *three, "--output_dir", str(tmp_path / "out")]) == 2
    assert main(["compare", *three, "--output_dir", str(tmp_path / "out"), "--overwrite_output_dir", "false"]) == 2
    assert main(["compare", *three[:2], "--output_dir", str(tmp_path / "out"), "--overwrite_output_dir"]) == 0
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["tickets"]) == 2


def test_what_cannot_be_compared_is_refused(three: list[str], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="two folders"):
        compare_tickets(three[:1])
    save_file({"x.weight": torch.ones(1, 3), "y.weight": torch.ones(2, 2)}, tmp_path / "initial.safetensors")
    save_file({"x.weight": torch.ones(1, 4)}, tmp_path / "part.safetensors")
    with pytest.raises(BadInputError, match=r"initial: .*part\.safetensors has no y\.weight"):
        compare_tickets(three, str(tmp_path / "part.safetensors"))
    with pytest.raises(BadInputError, match=r"initial: a weight is \[1, 3\] there and \[1, 4\] in the ticket"):
        compare_tickets(three, str(tmp_path / "initial.safetensors"))
    other = ticket(tmp_path / "other", {"x": torch.ones(1, 5)})
    with pytest.raises(BadInputError, match="compare tickets of one model"):
        compare_tickets([three[0], other])
    with pytest.raises(BadInputError, match=r"there is no prune_plan\.json"):
        compare_tickets([three[0], str(tmp_path)])
