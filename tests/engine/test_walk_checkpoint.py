"""A walk that is stopped behind every block ends as one that is not, whatever it carries from block to block."""

import signal
from datetime import datetime, timedelta
from pathlib import Path
from time import time

import pytest
import torch
from tiny import tiny_ids, tiny_model

from hf_prune.checkpoint.work import WorkFolder
from hf_prune.clock import next_time, parse_duration
from hf_prune.compose import make_config
from hf_prune.engine.stopping import StopRequest
from hf_prune.engine.walk_checkpoint import WalkCheckpoint
from hf_prune.errors import BadInputError, Stopped
from hf_prune.pruning import PruneResult, plan_pruning, prune, with_importance

BLOCK = {"method": "wanda", "reconstruct": "block", "reconstruct_passes": 1}
CASES = {
    "sparsegpt": ("llama", {"method": "sparsegpt"}),
    "blocks that return tuples": ("gpt2", {"method": "sparsegpt"}),
    "experts and importance": ("qwen3_moe", {"method": "sparsegpt", "output_importance": "fisher"}),
    "the head, and blocks left alone": ("qwen3", {"method": "wanda", "targets": ["lm_head", "model.layers.1"]}),
    "dense inputs": ("llama", {"method": "wanda", "propagate": False}),
    "trained blocks": ("opt", BLOCK),
    "the dense model beside": ("gemma3", {**BLOCK, "reconstruct_target": "model"}),
}


def walk(
    family: str, options: dict, work: WorkFolder | None, stop: StopRequest, statistics: Path | None = None
) -> tuple[torch.nn.Module, PruneResult]:
    model = tiny_model(family, torch.bfloat16 if family == "gemma3" else torch.float32)
    config, input_ids = make_config({"sparsity": 0.5, **options}), tiny_ids(36)
    plan = with_importance(model, config, plan_pruning(model, config), input_ids)
    checkpoint = WalkCheckpoint(work, stop, every=1) if work else None
    folder = str(statistics) if statistics else None
    return model, prune(model, config, input_ids=input_ids, plan=plan, checkpoint=checkpoint, statistics_folder=folder)


@pytest.mark.parametrize("case", CASES)
def test_stopping_behind_every_block_changes_no_bit(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    whole, expected = walk(family, options, None, StopRequest())
    sessions = 0
    while True:
        with WorkFolder.opened(tmp_path / "work") as work:
            work.claim({})
            try:
                model, result = walk(family, options, work, StopRequest(time_limit="0.001"), tmp_path / "kept")
                break
            except Stopped:
                sessions += 1
    assert sessions == 1 + max(view.block for view in result.plan.views)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert result.views == expected.views and result.forward_passes == pytest.approx(expected.forward_passes)
    losses = [{index: (own.before, own.after) for index, own in r.reconstruction.items()} for r in (result, expected)]
    assert losses[0] == losses[1] and bool(losses[0]) == ("reconstruct" in options)
    assert result.earlier_seconds > 0


def test_statistics_count_where_every_block_has_kept_them(tmp_path: Path) -> None:
    options, kept = CASES["dense inputs"][1], tmp_path / "kept"
    whole, _ = walk("llama", options, None, StopRequest())

    def session(folder: str, limit: str | None, statistics: Path | None) -> torch.nn.Module:
        with WorkFolder.opened(tmp_path / folder) as work:
            work.claim({})
            return walk("llama", options, work, StopRequest(time_limit=limit), statistics)[0]

    def same(model: torch.nn.Module) -> bool:
        return all(torch.equal(own, whole.state_dict()[name]) for name, own in model.state_dict().items())

    with pytest.raises(Stopped):
        session("work", "0.001", None)
    assert same(session("work", None, kept))
    # The first block's are in no file: they are gathered anew, and read from then on.
    for passes in (1, 0):
        model, result = walk("llama", options, None, StopRequest(), kept)
        assert same(model) and result.forward_passes == pytest.approx(passes)
    # Who reads them keeps no inputs, with which others could do without them.
    with pytest.raises(Stopped):
        session("other", "0.001", kept)
    kept.rename(tmp_path / "away")
    with pytest.raises(BadInputError, match="statistics_folder: the statistics by which this unfinished run"):
        session("other", None, kept)
    (tmp_path / "away").rename(kept)
    assert same(session("other", None, kept))


def test_saving_waits_until_it_is_a_twentieth_of_the_work(tmp_path: Path) -> None:
    """Blocks of these models take a few milliseconds, and a save a part of one."""
    with WorkFolder.opened(tmp_path / "work") as work:
        work.claim({})
        checkpoint = WalkCheckpoint(work, StopRequest())
        with checkpoint:
            checkpoint._last, checkpoint._saved, checkpoint._cost = 30, 100.0, 2.0
            assert [checkpoint._is_due(7, now) for now in (137.9, 138.0)] == [False, True]
            assert checkpoint._is_due(30, 100.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21600), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("45s", 45), ("45", 45)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration("time_limit", text) == seconds


@pytest.mark.parametrize("text", ["", "h", "6d", "-1h", "0", "30m1h", "six hours"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(BadInputError, match=r"time_limit: .* is no length of time"):
        parse_duration("time_limit", text)


def test_a_deadline_is_the_next_one() -> None:
    evening, morning = datetime(2026, 12, 31, 22, 30), datetime(2026, 12, 31, 5, 59)
    assert next_time("deadline", "06:00", evening) == datetime(2027, 1, 1, 6)
    assert next_time("deadline", "06:00", morning) == datetime(2026, 12, 31, 6)
    assert next_time("deadline", "06:00", datetime(2026, 12, 31, 6)) == datetime(2027, 1, 1, 6)
    for text in ("24:00", "6", "6 am"):
        with pytest.raises(BadInputError, match=r"deadline: .* is no time of day"):
            next_time("deadline", text, evening)


def test_signals_that_come_together_are_one_stop_and_a_later_one_another() -> None:
    """`timeout` signals its child and then the group that it is in."""
    later: list[int] = []

    def ended(number: int, frame: object) -> None:
        later.append(number)

    before = signal.signal(signal.SIGTERM, ended)
    try:
        stop = StopRequest()
        # A signal that is held back while the process starts is taken as soon as it is listened for.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM"), stop.listening():
            pytest.fail("it was not taken")
        # Where it was caught, and on the way out.
        signal.raise_signal(signal.SIGTERM)
        assert not later
        signal.signal(signal.SIGTERM, ended)
        stop = StopRequest()
        with pytest.raises(Stopped, match="stopped by SIGTERM"), stop.listening(), stop.deferred():
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert stop.reason() == "SIGTERM" and not later
            assert stop._signalled_at is not None
            stop._signalled_at -= 5
            signal.raise_signal(signal.SIGTERM)
            assert later == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def test_a_block_that_would_end_too_late_is_not_begun() -> None:
    soon = (datetime.now() + timedelta(minutes=2)).strftime("%H:%M")
    stop = StopRequest(time_limit="1h", deadline=soon)
    assert stop.end is not None and 60 <= stop.end[0] - time() <= 120
    assert stop.reason() is None and stop.reason(needed=30) is None
    assert stop.reason(needed=121) == f"deadline {soon}"
