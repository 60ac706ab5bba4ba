"""A transformers Trainer made and run, and the model it leaves behind: new weights, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_prune.checkpoint.folder import explained_disk_errors
from hf_prune.errors import BadInputError, RunError
from hf_prune.training.checkpoints import Clock
from hf_prune.training.masks import MaskCallback

_LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"
# What mixed precision leaves on a model, under which an evaluation would measure something else.
WRAPPINGS = ("forward", "_original_forward", "_is_accelerate_prepared")
# How transformers turns parameters into the names and shapes of the family's files.
CONVERSIONS = "_weight_conversions"


def make_trainer(kind: type[Trainer], logs: Path, **arguments: Any) -> Trainer:
    """A Trainer that prints nothing where hf_prune is told to be quiet.

    Args:
        logs: TensorBoard's folder, unless its environment variable names one; checkpoints are gone in the end, and what
            is written beside them.
    """
    named = os.environ.get(_LOGGING_DIR)
    os.environ[_LOGGING_DIR] = named or str(logs)
    try:
        trainer = kind(**arguments)
    finally:
        del os.environ[_LOGGING_DIR]
        if named is not None:
            os.environ[_LOGGING_DIR] = named
    if os.environ.get("HF_PRUNE_QUIET"):
        trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: Trainer, checkpoint: Path | None) -> float:
    """Train from the beginning or from a checkpoint; one of the last step is loaded and not trained on.

    Returns:
        The seconds that it took, those of sessions before a cut included. A checkpoint of another folder, to which a
        training was rewound, is no session of this one.

    Raises:
        BadInputError: there is not one step to take.
        RunError: the disk is full, or the checkpoint lacks a parameter.
    """
    assert trainer.args.output_dir is not None
    folder = Path(trainer.args.output_dir)
    own = checkpoint is not None and checkpoint.parent.resolve() == folder.resolve()
    clock = Clock(checkpoint if own else None)
    trainer.add_callback(_AtTheEnd())
    trainer.add_callback(clock)
    if checkpoint is not None:
        _check_names(trainer.model, checkpoint)
    try:
        with explained_disk_errors(folder, folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except FinishedBefore:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    finally:
        # Whatever ended it: nothing is held in a model that may be trained again.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, MaskCallback):
                callback.detach()
    if trainer.state.global_step < 1:
        if trainer.is_world_process_zero():
            # An epoch without a batch is saved all the same.
            shutil.rmtree(folder / "checkpoint-0", ignore_errors=True)
        raise BadInputError(
            "training: there is not one step to take; use more text or smaller batches where dataloader_drop_last is "
            "set, and num_train_epochs above 0."
        )
    return clock.seconds


def _check_names(model: nn.Module | None, checkpoint: Path) -> None:
    """Raise RunError where a parameter would not be read: the Trainer says nothing and goes on with what it had."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files:
        return
    there: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as content:
            there |= set(content.keys())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for own in names.values():
        if not there.intersection(own):
            raise RunError(f"{checkpoint}: it holds no {own[0]}; remove the folder, and the training begins anew.")


class FinishedBefore(Exception):
    """Raised when a training begins by a callback that knows that nothing of it is left."""


class _AtTheEnd(TrainerCallback):
    # The Trainer looks at the number of steps only behind a step: it would train one too many.
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise FinishedBefore


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters are float32 inside, so that small steps are not rounded away, and have their own dtypes behind it."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    # Parameters only: a cast of the whole model would take buffers along that are float32 in any dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def only_weights_change(model: nn.Module) -> Iterator[None]:
    """Behind it the model's mode, its config, its gradients and its `forward` are what they were before.

    Inside, a checkpoint has the parameters' own names and shapes. A Trainer writes those of the family's files, experts
    apart and some names others, and reads only what has its own.
    """
    config, training = getattr(model, "config", None), model.training
    conversions = vars(model).get(CONVERSIONS, ())
    setattr(model, CONVERSIONS, [])
    cache = getattr(config, "use_cache", None)
    before = {key: value for key, value in vars(model).items() if key in WRAPPINGS}
    try:
        yield
    finally:
        for key in WRAPPINGS:
            vars(model).pop(key, None)
        vars(model).update(before)
        vars(model).pop(CONVERSIONS)
        if conversions != ():
            setattr(model, CONVERSIONS, conversions)
        if config is not None:
            config.use_cache = cache
        model.zero_grad(set_to_none=True)
        model.train(training)
