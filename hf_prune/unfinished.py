"""What is kept of a pruning run until it is finished: whose it is, dense scores, plan, and the walk's state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_prune
from hf_prune.checkpoint.files import file_digest, tensor_digest, text_digest
from hf_prune.checkpoint.folder import (
    RECIPE_FILE,
    REPORT_FILE,
    beside,
    check_output_folder,
    clear_leftovers,
)
from hf_prune.checkpoint.offloaded import shards_of
from hf_prune.checkpoint.work import WorkFolder
from hf_prune.engine import distributed
from hf_prune.engine.gradients import FisherFactors
from hf_prune.engine.offload import tensors_of
from hf_prune.engine.stopping import StopRequest
from hf_prune.engine.walk_checkpoint import WalkCheckpoint
from hf_prune.errors import Stopped
from hf_prune.evaluation.quality import Quality
from hf_prune.plan import Plan
from hf_prune.preparation import Preparation
from hf_prune.recipe import Recipe
from hf_prune.structure.importance import is_file, scores_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".pruning"
_FISHER = "fisher_factors.safetensors"
_TRAINED = "trained_weights.safetensors"


def _planned(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The parameters that a plan is about, sharing their memory."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {view.parameter: parameters[view.parameter].detach() for view in plan.views}


def _everywhere(value: object) -> object:
    """What all processes say; where they differ, all that is said."""
    said = sorted({str(own) for own in distributed.gather(value)})
    return value if len(said) == 1 else ", ".join(said)


def work_folder(output_dir: str) -> Path:
    """Where a run that makes `output_dir` keeps what it has done until it is finished."""
    return beside(output_dir, SUFFIX)


def is_finished(recipe: Recipe, drop: bool = False) -> bool:
    """Whether this very run has finished its output folder and died before its working folder went.

    Args:
        drop: that goes now, also for another run that may replace the folder.
    """

    def look() -> bool:
        assert recipe.output.output_dir is not None
        folder = Path(recipe.output.output_dir).expanduser().resolve()
        with WorkFolder.left_behind(work_folder(recipe.output.output_dir), folder / REPORT_FILE) as work:
            if work is None or recipe.run.restart:
                return False
            same = (folder / RECIPE_FILE).read_bytes() == recipe.text.encode()
            if drop and (same or recipe.output.overwrite_output_dir):
                clear_leftovers(folder)
                work.discard()
            return same

    return distributed.all_or_none(lambda: distributed.rank() == 0 and look())[0]


class Unfinished:
    """A run's working folder and its requests to stop; made by `opened`.

    Attributes:
        seconds: that fingerprints and keeping the plan took in this session.
    """

    def __init__(self, work: WorkFolder, stop: StopRequest, every: int) -> None:
        self.work = work
        self.stop = stop
        self.walk = WalkCheckpoint(work, stop, every)
        self.seconds = 0.0

    @contextmanager
    def _counted(self) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds += perf_counter() - start

    @classmethod
    @contextmanager
    def opened(cls, recipe: Recipe) -> Iterator[Unfinished]:
        """The working folder beside the recipe's output folder, locked, with SIGTERM listened for.

        What earlier runs have left half done of the output folder is gone, and what they were replacing is back.

        Raises:
            BadInputError: another process is making the same output folder; what is back must not be replaced.
        """
        output = recipe.output
        assert output.output_dir is not None
        folder = output.output_dir

        def clear() -> None:
            if distributed.rank() == 0:
                clear_leftovers(folder)
                check_output_folder(folder, output.overwrite_output_dir)

        stop = StopRequest(recipe.run.time_limit, recipe.run.deadline)
        with WorkFolder.opened(work_folder(folder), recipe.run.restart) as work, stop.listening():
            distributed.all_or_none(clear)
            yield cls(work, stop, recipe.run.checkpoint_every)

    def claim(self, ready: Preparation, model: PreTrainedModel, texts: dict[str, Tensor | None]) -> None:
        """Say what the run is made of: recipe, model, texts, plan, versions, processes.

        Args:
            model: the dense model, as loaded.
            texts: int64 windows by what they are called.

        Raises:
            BadInputError: what is kept is of another run.
        """
        recipe = ready.recipe
        sections = {**asdict(recipe.data), **asdict(recipe.evaluation), "dtype": recipe.model.dtype}
        # Where learned thresholds are kept says nothing of what is learned; who reads statistics keeps no inputs.
        statistics = sections.pop("statistics_folder")
        if statistics is not None and not ready.config.propagate:
            sections["statistics_folder"] = str(Path(statistics).expanduser().resolve())
        identity: dict[str, Any] = {**sections, **asdict(ready.config)}
        scores = getattr(ready.config, "importance", None)
        if scores is not None and is_file(scores):
            identity["importance"] = file_digest(scores_file(scores))
        identity["base model"] = ready.source.base_model
        # What weights alone do not say: positions, norms, heads.
        config: Any = model.config
        said = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        identity["config"] = text_digest(json.dumps(said, sort_keys=True, default=str))
        identity["processes"] = distributed.world_size()
        # Sums in another order have other last bits.
        cuda = ready.device.type == "cuda"
        if not cuda:
            identity["threads per process (OMP_NUM_THREADS)"] = _everywhere(torch.get_num_threads())
        identity["device"] = _everywhere(torch.cuda.get_device_name(ready.device) if cuda else ready.device.type)
        identity["hf_prune"] = hf_prune.__version__
        identity |= {name: metadata.version(name) for name in ("torch", "transformers")}
        if ready.plan_is_final:
            identity["plan"] = text_digest(json.dumps(ready.plan.to_dict()))
        identity |= {name: tensor_digest(ids) for name, ids in texts.items() if ids is not None}
        # The blocks kept under one of them are of no use to the other.
        identity["offload"] = recipe.model.offload
        with self._counted():
            weights = {name: tensor_digest(tensor) for name, tensor in tensors_of(model)}
            self.work.claim(identity | {f"weight {name}": digest for name, digest in weights.items()})
        if (shards := shards_of(model)) is not None:
            shards.expect(weights)

    def dense(self, measure: Callable[[], Quality]) -> Quality:
        """The dense model's scores: kept ones, or those that `measure` finds, which are kept."""
        kept = self.work.entries.get("dense")
        if kept is None:
            kept = measure().to_dict()
            self.work.save({"dense": kept})
            self._stop_if_asked("the dense model was measured")
        return Quality.from_dict(kept)

    def plan(self, make: Callable[[], Plan], device: Any, trained: nn.Module | None = None) -> tuple[Plan, float]:
        """The plan with what it knows of the dense model, and the seconds it took: a kept one, or what `make` makes.

        Args:
            trained: a model whose planned weights move while the plan is made; they are kept along.
        """
        kept = self.work.entries.get("plan")
        if kept is None:
            start = perf_counter()
            plan = make()
            seconds = perf_counter() - start
            factors = {
                f"{side}.{name}": getattr(own, side).contiguous()
                for name, own in (plan.fisher_factors or {}).items()
                for side in ("inputs", "outputs")
            }
            kept_along = {_FISHER: factors, _TRAINED: _planned(trained, plan) if trained is not None else {}}
            files = {name: partial(save_file, own) for name, own in kept_along.items() if own}
            if distributed.rank():
                files = {}
            with self._counted():
                self.work.save({"plan": plan.to_dict(), "plan_seconds": seconds}, files)
            self._stop_if_asked("the plan was made")
            return plan, seconds
        plan = Plan.from_dict(kept)
        if _FISHER in self.work.files:
            factors = load_file(self.work.file(_FISHER), device=str(device))
            names = [view.name for view in plan.views if f"inputs.{view.name}" in factors]
            found = {name: FisherFactors(factors[f"inputs.{name}"], factors[f"outputs.{name}"]) for name in names}
            plan = replace(plan, fisher_factors=found)
        if trained is not None:
            weights = load_file(self.work.file(_TRAINED))
            for name, parameter in _planned(trained, plan).items():
                parameter.copy_(weights[name])
        return plan, self.work.entries["plan_seconds"]

    def _stop_if_asked(self, done: str) -> None:
        reason = distributed.gather(self.stop.reason())[0]
        if reason:
            raise Stopped(f"stopped by {reason} once {done}; start the same run again to go on.")

    def placing(self, folder: Path) -> None:
        """The output folder is whole and about to take its name; the main process alone calls this and `finished`.

        From here on a death leaves what the next start finishes, and SIGTERM comes too late.
        """
        self.stop.stop_no_more()
        self.work.expect_result(folder / REPORT_FILE)

    def finished(self) -> bool:
        """The output folder has its name: nothing is left to go on with. Whether nobody has asked to stop meanwhile."""
        self.work.discard()
        self.stop.listen_no_more()
        return not self.stop.signalled
