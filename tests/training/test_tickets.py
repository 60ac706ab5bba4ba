"""Rounds of iterative pruning of any module: what is rewound, what is kept, what survives a cut, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_net import Data, Net
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune.errors import BadInputError, RunError
from hf_prune.methods.lottery_ticket import LotteryTicketConfig, check_floor, next_masks
from hf_prune.training.checkpoints import alone_in
from hf_prune.training.tickets import TicketSearch

NAMES = ["first.weight", "second.weight"]


class Began(TrainerCallback):
    """Remembers the weights, masked already, that each training began with."""

    def __init__(self, seen: list[dict[str, torch.Tensor]]) -> None:
        self.seen = seen

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        model = kwargs["model"]
        self.seen.append({name: own.detach().clone() for name, own in model.named_parameters()})
        self.seen[-1]["step"] = torch.tensor(state.global_step)


def trainer_of(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **arguments: Any) -> Trainer:
    given = TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True,
            "seed": 3, "logging_steps": 1, "logging_nan_inf_filter": False, "dataloader_pin_memory": False,
            "save_strategy": "no", "max_steps": 12, "learning_rate": 0.02, **arguments,
        }
    )  # fmt: skip
    return Trainer(model=model, args=given, train_dataset=Data(), callbacks=callbacks)


def search(folder: Path, seen: list, own: dict[str, Any] | None = None, **arguments: Any) -> TicketSearch:
    def make_trainer(model: nn.Module, output_dir: Path, callbacks: list[TrainerCallback]) -> Trainer:
        return trainer_of(model, output_dir, [*callbacks, Began(seen)], **arguments)

    def loss(model: nn.Module) -> dict[str, float]:
        model.eval()
        rows = torch.utils.data.default_collate(list(Data()))
        with torch.no_grad():
            return {"loss": float(model(**rows)["loss"])}

    config = LotteryTicketConfig(**{"rounds": 2, "pruning_rate": 0.5, "rewind_step": 4, **(own or {})})
    return TicketSearch(lambda seed: Net(seed or 0), NAMES, make_trainer, loss, config, folder)


def weights_at(step: int, folder: Path) -> dict[str, torch.Tensor]:
    """Those of a plain Trainer's training, which knows of no ticket, behind one of its steps."""
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if state.global_step == step:
                found.update({name: own.detach().clone() for name, own in kwargs["model"].named_parameters()})

    trainer_of(Net(0), folder, [Look()]).train()
    return found


def test_survivors_go_back_to_the_rewind_step(tmp_path: Path) -> None:
    early = weights_at(4, tmp_path / "plain")
    seen: list[dict[str, torch.Tensor]] = []
    model, rounds = search(tmp_path, seen).run()
    assert [found.kept for found in rounds] == [144, 72, 36]
    assert [int(began["step"]) for began in seen] == [0, 4, 4]
    own = next(tmp_path.glob("magnitude-*"))
    masks = {name: torch.ones(early[name].shape, dtype=torch.bool) for name in NAMES}
    trained = load_file(tmp_path / "round-00" / "model.safetensors")
    for number in (1, 2):
        masks, _ = next_masks({name: trained[name] for name in NAMES}, masks, "magnitude", 0.5**number, 0.001)
        for name, value in early.items():
            assert torch.equal(seen[number][name], value * masks[name] if name in masks else value)
        stored = load_file(own / f"round-{number:02d}" / "masks.safetensors")
        trained = load_file(own / f"round-{number:02d}" / "model.safetensors")
        for name, mask in masks.items():
            assert torch.equal(stored[name], mask) and not bool((trained[name] * ~mask).any())
    # The early weights are those of the dense training, neither the first nor the last.
    initial = load_file(tmp_path / "initial.safetensors")
    assert not torch.equal(early[NAMES[0]], initial[NAMES[0]]) and not torch.equal(early[NAMES[0]], trained[NAMES[0]])
    assert torch.equal(model.first.weight, trained["first.weight"])


def test_without_a_rewind_step_survivors_go_back_to_the_beginning(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    search(tmp_path, seen, {"rewind_step": 0, "rounds": 1}).run()
    initial = load_file(tmp_path / "initial.safetensors")
    mask = seen[1]["first.weight"] != 0
    assert int(seen[1]["step"]) == 0 and torch.equal(seen[1]["first.weight"], initial["first.weight"] * mask)


def test_controls_begin_where_they_should(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    _, rounds = search(tmp_path, seen, {"controls": ["fresh_initialization", "random_mask"], "rounds": 1}).run()
    assert [found.kind for found in rounds] == ["ticket", "ticket", "fresh_initialization", "random_mask"]
    _, ticket, fresh, chance = seen
    assert [int(began["step"]) for began in seen] == [0, 4, 0, 4]
    early = load_file(tmp_path / "rewind" / "model.safetensors")["first.weight"]
    assert torch.equal(fresh["first.weight"] != 0, ticket["first.weight"] != 0)
    assert not torch.equal(fresh["first.weight"], ticket["first.weight"])
    mask = chance["first.weight"] != 0
    assert torch.equal(chance["first.weight"], early * mask) and not torch.equal(mask, ticket["first.weight"] != 0)
    assert rounds[1].layers == rounds[2].layers == rounds[3].layers


def test_same_seed_same_ticket_and_measures_share_the_dense_round(tmp_path: Path) -> None:
    weights = []
    for place in ("one", "two"):
        model, _ = search(tmp_path / place, []).run()
        weights.append({name: own.detach().clone() for name, own in model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    seen: list[dict[str, torch.Tensor]] = []
    search(tmp_path / "one", seen, {"importance": "l2"}).run()
    assert len(seen) == 2, "the dense training was there already"
    again: list[dict[str, torch.Tensor]] = []
    model, _ = search(tmp_path / "one", again).run()
    assert not again and torch.equal(model.first.weight, weights[0]["first.weight"])


def test_a_collapsed_layer_stops_or_is_noted(tmp_path: Path) -> None:
    # Softmax scores of a small layer are larger than any of a large one.
    own = {"importance": "softmax", "pruning_rate": 0.8, "rounds": 1, "min_keep_ratio": 0.0}
    with pytest.raises(RunError, match=r"round 1: no path .* through what is left of first\.weight at 80\.6% sparsity"):
        search(tmp_path / "stops", [], {**own, "pruning_rate": 0.806}).run()
    _, rounds = search(tmp_path / "noted", [], {**own, "pruning_rate": 0.806, "on_collapse": "record"}).run()
    assert rounds[1].collapsed == ["first.weight"]
    _, rounds = search(tmp_path / "held", [], {**own, "pruning_rate": 0.806, "min_keep_ratio": 0.05}).run()
    assert rounds[1].held == ["first.weight"] and rounds[1].layers["first.weight"] == 5 and not rounds[1].collapsed


class Chain(nn.Module):
    """The net as a sequence, where paths are known: weights into eight hidden units, and out of the eight others."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        with torch.no_grad():
            net.first.weight.fill_(0.01)[:8] = 1.0
            net.second.weight.fill_(0.01)[:, 8:] = 1.0
        self.layers = nn.Sequential(net.first, nn.Tanh(), net.second)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(inputs), labels)}


def test_weights_without_a_path_are_a_collapse(tmp_path: Path) -> None:
    own = {"rounds": 1, "rewind_step": 0, "min_keep_ratio": 0.0}
    stops, noted = (search(tmp_path, [], {**own, "on_collapse": how}, learning_rate=0.0) for how in ("stop", "record"))
    stops.make_model = noted.make_model = lambda seed: Chain()
    stops.names = noted.names = names = ["layers.0.weight", "layers.2.weight"]
    with pytest.raises(RunError, match=r"no path .* through what is left of layers\.0\.weight at 50\.0% sparsity"):
        stops.run()
    _, rounds = noted.run()
    assert rounds[1].collapsed == names and rounds[1].layers == dict(zip(names, (48, 24), strict=True))


def test_what_cannot_go_on_says_where(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="rewind_step: 40 is past the end of the training, which takes 12 steps"):
        search(tmp_path / "late", [], {"rewind_step": 40}).run()
    assert not (tmp_path / "late").exists()
    # The first steps go as far as numbers do, the third beyond.
    with pytest.raises(RunError, match=r"round 0: the loss is nan at step 3; lower learning_rate and choose another"):
        search(tmp_path / "nan", [], learning_rate=3.3e37).run()
    first = search(tmp_path / "claimed", [])
    first.run()
    other = search(tmp_path / "claimed", [])
    other.fingerprint = "another training"
    changed = search(tmp_path / "claimed", [])
    changed.make_model = lambda seed: Net(7)
    for foreign in (changed, search(tmp_path / "claimed", [], {"rewind_step": 3})):
        with pytest.raises(BadInputError, match="holds a training of another model, text or recipe"):
            foreign.run()
    with pytest.raises(BadInputError, match="holds a training of another model, text or recipe"):
        other.run()


def test_collapse_is_known_before_the_training(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    own = {"importance": "softmax", "pruning_rate": 0.806, "rounds": 1, "min_keep_ratio": 0.0}
    with pytest.raises(RunError, match="no path from input to output"):
        search(tmp_path, seen, own).run()
    assert len(seen) == 1


def test_rounds_are_measured_again_where_the_evaluation_changes(tmp_path: Path) -> None:
    search(tmp_path, []).run()
    seen: list[dict[str, torch.Tensor]] = []
    other = search(tmp_path, seen)
    other.evaluation = "another text"
    other.evaluate = lambda model: {"norm": float(model.get_parameter("first.weight").detach().norm())}
    model, rounds = other.run()
    assert not seen and rounds[-1].metrics == {"norm": float(model.get_parameter("first.weight").detach().norm())}
    assert len({found.metrics["norm"] for found in rounds}) == 3
    again = search(tmp_path, seen)
    again.evaluation = "another text"
    assert [found.metrics for found in again.run()[1]] == [found.metrics for found in rounds]


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends a training behind the checkpoint of a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("rewind", [4, 0])
@pytest.mark.parametrize("step", [4, 12])
def test_a_run_that_was_cut_behind_a_checkpoint_trains_no_step_twice(step: int, rewind: int, tmp_path: Path) -> None:
    """At the rewind step before its checkpoint was copied, and behind the last step before the round was kept."""
    own, arguments = {"rounds": 1, "rewind_step": rewind}, {"save_strategy": "steps", "save_steps": 4}
    whole, _ = search(tmp_path / "whole", [], own, **arguments).run()
    cut = search(tmp_path / "cut", [], own, **arguments)
    make = cut.make_trainer
    # Before the callback that copies.
    cut.make_trainer = lambda model, folder, callbacks: make(model, folder, [KillAt(step), *callbacks])
    with pytest.raises(Killed):
        cut.run()
    seen: list[dict[str, torch.Tensor]] = []
    model, _ = search(tmp_path / "cut", seen, own, **arguments).run()
    assert int(seen[0]["step"]) == step
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_a_checkpoint_behind_a_lost_rewind_step_is_no_start(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = search(tmp_path / "whole", [], **arguments).run()
    cut = search(tmp_path / "cut", [], **arguments)
    make = cut.make_trainer
    cut.make_trainer = lambda model, folder, callbacks: make(model, folder, [*callbacks, KillAt(8)])
    with pytest.raises(Killed):
        cut.run()
    shutil.rmtree(tmp_path / "cut" / "rewind")
    seen: list[dict[str, torch.Tensor]] = []
    model, _ = search(tmp_path / "cut", seen, **arguments).run()
    assert int(seen[0]["step"]) == 0 and torch.equal(model.first.weight, whole.first.weight)


def test_seconds_add_up_over_sessions(tmp_path: Path) -> None:
    class KillBehindCheckpoint(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if state.global_step == 9:
                raise Killed

    own, arguments = {"rounds": 1}, {"save_strategy": "steps", "save_steps": 4}
    cut = search(tmp_path, [], own, **arguments)
    make = cut.make_trainer
    cut.make_trainer = lambda model, folder, callbacks: make(model, folder, [*callbacks, KillBehindCheckpoint()])
    with pytest.raises(Killed):
        cut.run()
    clock = tmp_path / "round-00.unfinished" / "checkpoints" / "checkpoint-8" / "seconds.json"
    assert 0 < float(clock.read_text()) < 100
    # As if the first session had taken longer than any test; what a ticket is rewound to is no session of its own.
    clock.write_text("1000")
    (tmp_path / "rewind" / "seconds.json").write_text("5000")
    _, rounds = search(tmp_path, [], own, **arguments).run()
    assert 1000 < rounds[0].seconds < 1100 and 0 < rounds[1].seconds < 100


@pytest.mark.parametrize("strategy", ["no", "epoch", "steps"])
def test_a_later_round_that_ends_in_no_numbers_says_so(strategy: str, tmp_path: Path) -> None:
    """The dense round is there; a value that grows without bound comes into the second one's training."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if state.global_step == 8:
                kwargs["model"].first.weight.data.fill_(float("nan"))

    rare = {"save_strategy": strategy, "save_steps": 5, "logging_steps": 100}
    search(tmp_path, [], **rare).run()
    shutil.rmtree(next(tmp_path.glob("magnitude-*")))
    spoilt = search(tmp_path, [], **rare)
    plain = spoilt.make_trainer
    spoilt.make_trainer = lambda model, folder, callbacks: plain(model, folder, [Spoil(), *callbacks])
    # Without checkpoints of its own there is still the one that it was rewound to.
    before = "rewind" if strategy == "no" else r"(rewind|checkpoint-\d+)"
    said = rf"round 1: first\.weight is not finite .*; {before} before it is kept in .*; lower learning_rate"
    with pytest.raises(RunError, match=said):
        spoilt.run()
    kept = list(tmp_path.glob("magnitude-*/round-01.unfinished/checkpoints/checkpoint-*/model.safetensors"))
    assert all(bool(torch.isfinite(weight).all()) for file in kept for weight in load_file(file).values())


def test_a_floor_without_room_is_refused(tmp_path: Path) -> None:
    own = {"rounds": 9, "pruning_rate": 0.5, "min_keep_ratio": 0.0019}
    with pytest.raises(BadInputError, match=r"min_keep_ratio: a share of 0.0019, or one weight"):
        check_floor([10, 10, 10, 970], LotteryTicketConfig(**own))
    check_floor([10, 10, 10, 9970], LotteryTicketConfig(**{**own, "min_keep_ratio": 0.0015}))


@pytest.mark.parametrize("gone", ["rewind", "initial.safetensors"])
def test_rounds_whose_beginning_was_removed_are_refused(gone: str, tmp_path: Path) -> None:
    search(tmp_path, []).run()
    lost = tmp_path / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(BadInputError, match=rf"rounds_folder: .*{gone} is gone, which round 1 begins from; remove"):
        search(tmp_path, [], {"importance": "l2"}).run()


def test_random_masks_follow_the_seed(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        own = search(tmp_path / str(seed), [], {"rounds": 1, "controls": ["random_mask"]})
        own.seed = seed
        own.run()
        found.append(load_file(next(own.ticket_folder.glob("round-01-random_mask")) / "masks.safetensors"))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in NAMES)


def test_a_round_under_another_mask_is_not_taken_over(tmp_path: Path) -> None:
    own: dict[str, Any] = {"rounds": 1, "controls": ["random_mask"]}
    search(tmp_path, [], own).run()
    other = search(tmp_path, [], own)
    other.seed = 1
    with pytest.raises(BadInputError, match=r"round-01-random_mask was trained under another mask"):
        other.run()


def test_a_checkpoint_under_another_mask_is_not_gone_on_from(tmp_path: Path) -> None:
    own: dict[str, Any] = {"rounds": 1, "controls": ["random_mask"]}
    arguments = {"save_strategy": "steps", "save_steps": 4}
    cut = search(tmp_path, [], own, **arguments)
    make = cut.make_trainer

    def killed_in_the_control(model: nn.Module, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
        more = [KillAt(8)] if "random_mask" in str(folder) else []
        return make(model, folder, [*callbacks, *more])

    cut.make_trainer = killed_in_the_control
    with pytest.raises(Killed):
        cut.run()
    other = search(tmp_path, [], own, **arguments)
    other.seed = 1
    with pytest.raises(BadInputError, match=r"random_mask\.unfinished/checkpoints holds a training of another"):
        other.run()
    seen: list[dict[str, torch.Tensor]] = []
    search(tmp_path, seen, own, **arguments).run()
    assert [int(began["step"]) for began in seen] == [8]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with alone_in(tmp_path / "rounds"), pytest.raises(BadInputError, match=r"another run trains in .*rounds already"):
        search(tmp_path / "rounds", []).run()
    assert not list(tmp_path.iterdir())


def test_what_an_evaluation_says_may_be_a_tensor(tmp_path: Path) -> None:
    own = search(tmp_path, [])
    own.evaluate = lambda model: {"norm": model.get_parameter("first.weight").detach().norm()}
    model, _ = own.run()
    _, again = search(tmp_path, []).run()
    assert again[-1].metrics == {"norm": pytest.approx(float(model.get_parameter("first.weight").norm()))}


def test_no_checkpoint_holds_what_is_no_number(tmp_path: Path) -> None:
    """The loss is looked at when it is logged, which may be later."""
    with pytest.raises(
        RunError, match=r"round 0: first\.weight is not finite at step 3; checkpoint-2 before it is kept"
    ):
        search(tmp_path, [], learning_rate=3.3e37, save_strategy="steps", save_steps=1, logging_steps=100).run()
    kept = list(tmp_path.glob("round-00.unfinished/checkpoints/checkpoint-*/model.safetensors"))
    assert len(kept) == 2
    assert all(bool(torch.isfinite(weight).all()) for file in kept for weight in load_file(file).values())
