"""The Trainer's checkpoints: whose they are, which one to go on from, and what stays where the loss is no number."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.checkpoint.files import write_whole
from hf_prune.checkpoint.folder import explained_disk_errors
from hf_prune.checkpoint.lock import held
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError, RunError

IDENTITY, LOCK = "run.json", ".lock"


def fingerprint(said: Any, tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of what can be written as JSON and of tensors, bit for bit."""
    digest = hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def config_of(model: Any) -> dict[str, Any]:
    """What the config of a model, or of whatever has one, says of how it computes; empty for a module without."""
    own = getattr(model, "config", None)
    left_out = ("transformers_version", "_name_or_path", "dtype", "use_cache")
    return {key: value for key, value in (own.to_dict() if own else {}).items() if key not in left_out}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other run trains in `folder`, made where it is missing: two would remove each other's checkpoints.

    Afterwards the folder is gone if it is empty.

    Raises:
        BadInputError: another run is at it, or writing there is forbidden.
    """
    with ExitStack() as stack:

        def take() -> None:
            if distributed.rank() == 0:
                with explained_disk_errors(folder, folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.callback(_remove_empty, folder)
                    refusal = f"output_dir: another run trains in {folder} already; wait for it, or end it."
                    stack.enter_context(held(folder / LOCK, refusal))

        distributed.all_or_none(take)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def claim(folder: Path, identity: Mapping[str, Any], trained: bool) -> None:
    """Write down what trains in `folder`, or refuse: another training's checkpoints must not be gone on from.

    Args:
        identity: everything that decides how the training goes.
        trained: the folder holds something worth keeping; where it does not, another training may have it.

    Raises:
        BadInputError: another training has left its checkpoints there.
    """
    file = folder / IDENTITY
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    # Nobody writes before everybody has read.
    distributed.barrier()
    text = json.dumps(identity, indent=1) + "\n"
    if before != text and trained:
        raise BadInputError(
            f"output_dir: {folder} holds a training of another model, text or recipe; remove it, or choose another "
            "output_dir, and rounds_folder where the recipe names one."
        )
    if before != text and distributed.rank() == 0:
        write_whole(file, text)
    distributed.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder: a run may have been killed while it wrote one."""
    steps = {step_of(path): path for path in folder.glob("checkpoint-*") if _is_whole(path)}
    return steps[max(steps)] if steps else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step behind which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    # The main process writes its state last; the others write theirs when they get there.
    world = distributed.world_size()
    random = [f"rng_state_{rank}.pth" for rank in range(world)] if world > 1 else ["rng_state.pth"]
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "global_step" in state and all((checkpoint / name).is_file() for name in random)


class Clock(TrainerCallback):
    """The seconds of a training over all its sessions, as far as its checkpoints reach.

    Args:
        checkpoint: that is gone on from, if any.
    """

    FILE = "seconds.json"

    def __init__(self, checkpoint: Path | None) -> None:
        self.earlier = 0.0
        file = checkpoint / self.FILE if checkpoint else None
        if file is not None and file.is_file():
            self.earlier = float(json.loads(file.read_text(encoding="utf-8")))
        self._began = perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.earlier + perf_counter() - self._began

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if distributed.rank() == 0 and checkpoint.is_dir():
            write_whole(checkpoint / self.FILE, json.dumps(self.seconds))


class StopBehind(TrainerCallback):
    """Ends a training behind a step; the schedule stays that of the whole."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


class StopAtNaN(TrainerCallback):
    """Raises RunError at the first logged loss that is not finite, before a checkpoint of such weights, and at the end.

    It comes before what looks at weights in its own way, so that it is heard first, and behind what changes them last.

    Args:
        where: what the message says of the training.
        folder: of the Trainer's checkpoints.
        begun_from: the checkpoint that this training went on from, where it is another one's.
    """

    def __init__(self, where: str, folder: Path, begun_from: Path | None = None) -> None:
        self.where = where
        self.folder = folder
        self.begun_from = begun_from

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise self._error(f"the loss is {float(loss)} at step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self.check(kwargs["model"], f"at step {state.global_step}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self.check(kwargs["model"], f"at step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.check(kwargs["model"], "after the training")

    def check(self, model: nn.Module, when: str) -> None:
        """Raise RunError for the first parameter that holds something else than finite numbers."""
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise self._error(f"{name} is not finite {when}")

    def _error(self, what: str) -> RunError:
        last = last_checkpoint(self.folder) or self.begun_from
        kept = f"; {last.name} before it is kept in {last.parent}" if last else ""
        return RunError(
            f"{self.where}: {what}{kept}; lower learning_rate and choose another output_dir (and rounds_folder, where "
            "the recipe names one)."
        )


def check_rewind(step: int, steps: int) -> None:
    """Raise BadInputError where a training of so many steps does not go on behind the step to rewind to."""
    if step and step >= steps:
        raise BadInputError(
            f"rewind_step: {step} is past the end of the training, which takes {steps} steps; lower it or train longer."
        )


class KeepCheckpoint(TrainerCallback):
    """Copies the Trainer's checkpoint of one step to a folder: weights, optimizer, schedule and random state.

    Raises:
        BadInputError: the training ends at that step or before, which is known when it begins.
    """

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_rewind(self.step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            assert args.output_dir is not None
            self.keep(Path(args.output_dir) / f"checkpoint-{self.step}")

    def keep(self, checkpoint: Path) -> None:
        """Copy, once every process has written its part."""
        distributed.barrier()
        if distributed.rank() == 0 and not self.folder.is_dir():
            part = self.folder.with_name(f"{self.folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(checkpoint, part)
            part.rename(self.folder)
        distributed.barrier()

    def go_on_from(self, checkpoints: Path) -> Path | None:
        """The checkpoint to go on from: none behind the step whose own was lost when the run was killed."""
        last = last_checkpoint(checkpoints)
        if last is None or not self.step or self.folder.is_dir() or step_of(last) < self.step:
            return last
        if step_of(last) == self.step:
            self.keep(last)
            return last
        distributed.barrier()
        if distributed.rank() == 0:
            # The Trainer would take the new, earlier ones for the oldest and remove those.
            shutil.rmtree(checkpoints)
        distributed.barrier()
        return None
