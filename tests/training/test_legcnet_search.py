"""LEGCNet's procedure on a network of 144 weights, its parts taken from elsewhere: a plain loop and statsmodels."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_exponents import plain
from safetensors.torch import load_file
from small_net import Data, Net
from statsmodels.tsa.stattools import grangercausalitytests
from tiny import tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune.dynamics.exponents import FLAT, changes_abruptly
from hf_prune.errors import BadInputError
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.structure.groups import block_shape, find_groups
from hf_prune.training.causes import find_causes
from hf_prune.training.legcnet import LEGCNetSearch
from hf_prune.training.recorder import read_series, read_targets
from hf_prune.training.rounds import Measuring
from hf_prune.training.series import RowSeries, UnitSeries, WeightSeries

NAMES = ["first.weight", "second.weight"]
STEPS = 72
ROWS = torch.utils.data.default_collate(list(Data()))


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(**ROWS)["logits"].argmax(1) != ROWS["labels"]).double().mean())


class Began(TrainerCallback):
    """What each training began with, masked already."""

    def __init__(self, seen: list[dict[str, Any]]) -> None:
        self.seen = seen

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        weights = {name: own.detach().clone() for name, own in kwargs["model"].named_parameters()}
        self.seen.append({"step": state.global_step, **weights})


def search(folder: Path, seen: list | None = None, own: dict[str, Any] | None = None, **more: Any) -> LEGCNetSearch:
    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(output_dir), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=0.03, seed=3,
            use_cpu=True, disable_tqdm=True, logging_steps=50, logging_nan_inf_filter=False, save_steps=20,
            dataloader_pin_memory=False,
        )  # fmt: skip
        everyone = [*callbacks, Began(seen if seen is not None else [])]
        return Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=everyone)

    config = LEGCNetConfig(**{"window": 8, "max_lag": 2, "alpha": 0.2, **(own or {})})
    options: dict[str, Any] = {
        "make_model": Net,
        "series": WeightSeries(Net(), NAMES),
        "make_trainer": make_trainer,
        "target": error,
        "figure": lambda model: 1 - error(model),
        "look_every": 24,
        # Never reached.
        "benchmark": 2.0,
        "measuring": Measuring(lambda model: {"error": error(model)}),
        "steps": STEPS,
    }
    return LEGCNetSearch(**{**options, **more}, config=config, folder=folder)


def expected_keep(recording: Path, window: int, lag: int, alpha: float, twin: Path | None = None) -> list[bool]:
    series, targets = read_series(recording), read_targets(recording)
    series = series if twin is None else series - read_series(twin)
    stride = round(0.9 * window)
    starts = range(0, series.shape[1] - window + 1, stride)
    assert [step for step, _ in targets] == [start + window for start in starts]
    keep = []
    for own in series:
        windows = [own[start : start + window] for start in starts]
        exponents = [
            0.0 if float(part.max() - part.min()) < FLAT or changes_abruptly(part[None])[0] else plain(part.tolist())
            for part in windows
        ]
        table = np.column_stack([[value for _, value in targets], np.float32(exponents)])
        try:
            found = grangercausalitytests(table, lag)
        except Exception:
            keep.append(True)
            continue
        keep.append(min(found[at][0]["ssr_chi2test"][1] for at in found) < alpha)
    return keep


@pytest.mark.filterwarnings("ignore")
def test_what_stays_is_what_causes_errors(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    model, causes, rounds = search(tmp_path, seen).run()
    keep = expected_keep(tmp_path / "recording", 8, 2, 0.2)
    assert causes.keep.tolist() == keep and 10 < sum(keep) < 134
    kept = torch.tensor(keep)
    masks = dict(
        zip(
            NAMES,
            (own.reshape(shape) for own, shape in zip(kept.split([96, 48]), [(16, 6), (3, 16)], strict=True)),
            strict=True,
        )
    )
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert [found.kind for found in rounds] == ["dense", "legcnet", "magnitude", "random"]
    assert [found.kept for found in rounds[1:]] == [sum(keep)] * 3 and rounds[0].kept == 144
    # Everything began with the same weights, at the beginning.
    initial = load_file(tmp_path / "initial.safetensors")
    assert [began["step"] for began in seen] == [0] * 4
    for name, mask in masks.items():
        assert torch.equal(seen[1][name], initial[name] * mask)
    # Magnitude keeps the weights that were largest at the end.
    end = load_file(tmp_path / "dense" / "model.safetensors")
    together = torch.cat([end[name].abs().flatten() for name in NAMES])
    threshold = together.sort(descending=True).values[sum(keep) - 1]
    for name in NAMES:
        assert torch.equal(seen[2][name] != 0, end[name].abs() >= threshold)
    assert rounds[1].metrics["error"] == pytest.approx(error(model))
    # Once more there is nothing to do.
    again: list[dict[str, Any]] = []
    other, _, _ = search(tmp_path, again).run()
    assert not again and all(torch.equal(other.get_parameter(name), model.get_parameter(name)) for name in NAMES)


def test_a_part_of_the_training_is_recorded_and_gone_on_from(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    own = {"variant": "pt", "recorded_share": 0.875, "restart": "continue", "window": 6, "sparsity": 0.5}
    _, causes, rounds = search(tmp_path, seen, own).run()
    assert read_series(tmp_path / "recording").shape[1] == 63 and int(causes.keep.sum()) == 72
    assert [began["step"] for began in seen] == [0, 63, 63, 63] and [found.steps for found in rounds] == [STEPS] * 4
    assert [step for step, _, _ in rounds[0].looks] == [24, 48, 72]
    assert [[step for step, _, _ in found.looks] for found in rounds[1:]] == [[72]] * 3, "dense looks are dense ones"
    there = read_series(tmp_path / "recording")[:, -1]
    assert torch.equal(seen[1]["first.weight"].flatten(), there[:96] * causes.keep[:96])


def test_survivors_of_a_whole_training_go_on_as_they_are(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    model, causes, rounds = search(tmp_path, seen, {"restart": "continue", "sparsity": 0.3}).run()
    end = load_file(tmp_path / "dense" / "model.safetensors")
    assert len(seen) == 1 and rounds[1].steps == 0
    assert rounds[1].looks == [(0, pytest.approx(1 - rounds[1].metrics["error"]), 0.0)]
    assert torch.equal(model.second.weight.flatten(), end["second.weight"].flatten() * causes.keep[96:])


def test_a_training_ends_where_it_is_good_enough(tmp_path: Path) -> None:
    _, _, rounds = search(tmp_path, benchmark=0.1, look_every=5).run()
    assert rounds[0].steps == STEPS and [found.steps for found in rounds[1:]] == [5, 5, 5]
    assert [step for step, _, _ in rounds[0].looks] == list(range(5, STEPS, 5)) and rounds[0].looks[-1][1] > 0.1
    # 99 % of what the dense one ended with, unless given.
    own = search(tmp_path, benchmark=None, look_every=5)
    assert own.benchmark_of(rounds[0]) == pytest.approx(0.99 * rounds[0].looks[-1][1])


class Cut(Exception):
    pass


def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, causes, _ = search(tmp_path / "whole").run()
    looked = []

    def cut_at_the_third(model: nn.Module) -> float:
        looked.append(model)
        if len(looked) == 5:
            raise Cut
        return error(model)

    with pytest.raises(Cut):
        search(tmp_path / "cut", target=cut_at_the_third).run()
    seen: list[dict[str, Any]] = []
    model, found, _ = search(tmp_path / "cut", seen).run()
    assert seen[0]["step"] == 20 and torch.equal(found.p, causes.p)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


class KillBehind(TrainerCallback):
    """Ends a training when a step begins, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            raise Cut


def cut_search(folder: Path, step: int, own: dict[str, Any], **more: Any) -> LEGCNetSearch:
    """A search whose trainings are killed once a step begins."""
    killed = search(folder, None, own, **more)
    make = killed.make_trainer
    killed.make_trainer = lambda model, place, callbacks: make(model, place, [*callbacks, KillBehind(step)])
    return killed


def test_a_run_killed_behind_the_recorded_part_goes_on(tmp_path: Path) -> None:
    own = {"variant": "pt", "recorded_share": 0.875, "restart": "continue", "window": 6, "sparsity": 0.5}
    whole, _, _ = search(tmp_path / "whole", None, own).run()
    with pytest.raises(Cut):
        cut_search(tmp_path / "cut", 65, own).run()
    seen: list[dict[str, Any]] = []
    model, _, _ = search(tmp_path / "cut", seen, own).run()
    assert seen[0]["step"] == 63
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    # From the beginning and from the recorded part are two decisions on one recording.
    _, _, rounds = search(tmp_path / "cut", seen, {**own, "restart": "init"}).run()
    assert len(rounds) == 4 and seen[-1]["step"] == 0


def test_how_far_layers_move_is_what_lies_between_two_looks(tmp_path: Path) -> None:
    _, _, rounds = search(tmp_path).run()
    series, initial = read_series(tmp_path / "recording"), load_file(tmp_path / "initial.safetensors")
    # What was recorded behind steps 24, 48 and 72, the first layer's 96 weights before the second's.
    at = [torch.cat([initial[name].flatten() for name in NAMES]), *(series[:, step - 1] for step in (24, 48, 72))]
    moved = [[float(part.norm()) for part in (there - here).split([96, 48])] for here, there in pairwise(at)]
    assert [list(own.values()) for own in rounds[0].moved] == [pytest.approx(own) for own in moved]
    assert [list(own) for own in rounds[1].moved] == [NAMES] * 3
    # A training that was cut between two looks has none for the part that it does not know.
    with pytest.raises(Cut):
        cut_search(tmp_path / "cut", 30, {}).run()
    _, _, again = search(tmp_path / "cut").run()
    assert again[0].moved == [{}, *rounds[0].moved[1:]]


def test_another_benchmark_trains_anew(tmp_path: Path) -> None:
    _, _, early = search(tmp_path, benchmark=0.1, look_every=5).run()
    _, _, late = search(tmp_path, benchmark=2.0, look_every=5).run()
    assert [found.steps for found in early[1:]] == [5] * 3 and [found.steps for found in late[1:]] == [STEPS] * 3


def test_what_has_reached_the_benchmark_is_not_trained_on(tmp_path: Path) -> None:
    """Killed behind the checkpoint of the look that ended it, before the round was kept."""
    options: dict[str, Any] = {"benchmark": 0.1, "look_every": 20}
    _, _, whole = search(tmp_path / "whole", **options).run()
    measured = []

    def cut_at_the_second(model: nn.Module) -> dict[str, float]:
        measured.append(model)
        if len(measured) == 2:
            raise Cut
        return {"error": error(model)}

    with pytest.raises(Cut):
        search(tmp_path / "cut", **options, measuring=Measuring(cut_at_the_second)).run()
    _, _, rounds = search(tmp_path / "cut", **options).run()
    assert [found.steps for found in rounds] == [found.steps for found in whole] == [STEPS, 20, 20, 20]
    assert [found.metrics for found in rounds] == [found.metrics for found in whole]


def test_differences_to_a_perturbed_training_are_the_series_where_asked(tmp_path: Path) -> None:
    own = {"perturbation": 0.01, "alpha": 0.4}
    seen: list[dict[str, Any]] = []
    _, causes, rounds = search(tmp_path, seen, own).run()
    twin = tmp_path / "twin-0.01" / "recording"
    # It began a hundredth of each parameter's deviation away, and then went the same way.
    for name in NAMES:
        apart = (seen[1][name] - seen[0][name]) / seen[0][name].std(correction=0)
        assert 0.005 < float(apart.std()) < 0.02
    difference = read_series(twin) - read_series(tmp_path / "recording")
    assert 0 < float(difference.norm()) < 0.5 * float(read_series(twin).norm())
    assert causes.keep.tolist() == expected_keep(tmp_path / "recording", 8, 2, 0.4, twin)
    assert causes.keep.tolist() != search(tmp_path, own={"alpha": 0.4}).run()[1].keep.tolist()
    assert [found.kind for found in rounds] == ["dense", "legcnet", "magnitude", "random"]
    series, means = read_series(twin), causes.exponents
    assert series.shape[1] == STEPS
    # Some of the series alone are decided on as they were among all.
    config = LEGCNetConfig(window=8, max_lag=2, alpha=0.4)
    chosen = torch.tensor([3, 50, 143])
    some = find_causes(tmp_path / "recording", config, STEPS, twin, chosen)
    assert torch.equal(some.exponents, means[chosen]) and torch.equal(some.keep, causes.keep[chosen])
    # A second run finds the twin where it is.
    again: list[dict[str, Any]] = []
    search(tmp_path, again, {**own, "alpha": 0.3}).run()
    assert len(again) == 3


def test_a_twin_ends_where_the_recorded_part_does(tmp_path: Path) -> None:
    own = {"perturbation": 0.01, "variant": "pt", "recorded_share": 0.8, "sparsity": 0.2, "window": 6}
    search(tmp_path, own=own).run()
    recorded = round(0.8 * STEPS)
    assert json.loads((tmp_path / "twin-0.01" / "dense" / "round.json").read_text())["steps"] == recorded < STEPS
    assert read_series(tmp_path / "twin-0.01" / "recording").shape[1] == recorded


def test_rows_go_as_a_whole(tmp_path: Path) -> None:
    rows = RowSeries(Net(), ["first.weight"])
    model, causes, _ = search(tmp_path, None, {"sparsity": 0.25}, series=rows).run()
    assert int((~causes.keep).sum()) == 4
    assert torch.equal(model.first.weight.abs().sum(1) == 0, ~causes.keep) and bool((model.second.weight != 0).all())
    assert rows.label(3) == "first.weight, output 3"


def test_a_sample_leaves_the_others(tmp_path: Path) -> None:
    sample = WeightSeries(Net(), NAMES, samples=10, seed=1)
    model, causes, _ = search(tmp_path, None, {"sparsity": 0.5}, series=sample).run()
    assert len(causes.keep) == 20 and sum(int((model.get_parameter(name) == 0).sum()) for name in NAMES) == 10
    values = sample.observe(model)
    assert torch.equal(values != 0, causes.keep)
    for place in (0, 9, 10, 19):
        name, _, index = sample.label(place)[:-1].partition("[")
        row, column = (int(own) for own in index.split(", "))
        assert float(model.get_parameter(name)[row, column]) == float(values[place])


def constant(model: nn.Module) -> float:
    return 0.5


def test_what_cannot_be_decided_says_why(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="max_lag: 14 lags need 44 windows, and 72 recorded steps make 10; lower"):
        search(tmp_path / "few", None, {"max_lag": 14}).run()
    assert not (tmp_path / "few").exists()
    with pytest.raises(BadInputError, match=r"the target is 0\.5 in every window, so that nothing can cause it"):
        search(tmp_path / "still", target=constant).run()
    search(tmp_path / "other").run()
    others = ({"window": 7}, {}), ({}, {"series": RowSeries(Net(), NAMES)})
    for own, more in others:
        with pytest.raises(BadInputError, match="holds a training of another model, text or recipe"):
            search(tmp_path / "other", None, own, **more).run()


def test_rows_of_transposed_layers_are_columns() -> None:
    net = nn.Module()
    net.register_parameter("weight", nn.Parameter(torch.tensor([[3.0, 0.0], [4.0, 1.0]])))
    rows = RowSeries(net, ["weight"], transposed=frozenset({"weight"}))
    assert rows.observe(net).tolist() == [5.0, 1.0]
    masks: dict[str, Tensor] = rows.masks(torch.tensor([False, True]))
    assert masks["weight"].tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(("kind", "number"), [("mlp", 7), ("attention", 1), ("heads", 3)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_units_are_watched_by_the_norm_of_all_their_weights(family: str, kind: str, number: int) -> None:
    model = tiny_model(family)
    series = UnitSeries(model, ["mlp", kind] if kind != "mlp" else ["mlp", "attention"])
    before = series.observe(model)
    places = [series.label(place) for place in range(len(before))]
    place = places.index(f"{kind} 1, unit {number}")
    # One unit made twice as large is one number twice as large.
    groups = find_groups(model, 1, kind, block_shape(model))
    group, own = next(
        (group, number - first)
        for group, first in zip(groups, range(0, 1000, groups[0].units), strict=False)
        if number < first + group.units
    )
    with torch.no_grad():
        for stretch in (*group.producers, group.consumer):
            weight = stretch.view.read()
            side = weight if stretch.rows else weight.T
            side[stretch.offset + own * stretch.size : stretch.offset + (own + 1) * stretch.size] *= 2
            stretch.view.write(weight)
    ratio = series.observe(model) / before
    assert ratio[place] == pytest.approx(2) and torch.equal(ratio != 1, torch.arange(len(before)) == place)
    scores = series.scores(before)
    assert torch.equal(torch.cat(list(scores.values())), before)
    assert len(scores[f"{kind}.1"]) == sum(group.units for group in groups)
    assert float(scores[f"{kind}.1"][number]) == float(before[place])
