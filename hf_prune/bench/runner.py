"""Running a grid: each cell in a process of its own, then every folder scored by the same evaluator.

Everything that is finished stands in one file (`results.json` of the work folder unless another is named, replaced in
one step), so that a run that was cut off goes on where it was, on another machine as well. Weights are deleted once
they are scored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from hf_prune.arguments import RunArguments
from hf_prune.bench.grid import Cell, Grid
from hf_prune.bench.results import Results
from hf_prune.checkpoint.inspect import inspect_checkpoint
from hf_prune.checkpoint.load import free_memory, load_config, load_model, load_tokenizer, pick_device
from hf_prune.checkpoint.lock import held
from hf_prune.data.builtin import resolve_model
from hf_prune.errors import BadInputError, HfPruneError
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.fields import field_types
from hf_prune.pruning import load_calibration
from hf_prune.recipe import dump_yaml, make_recipe

logger = logging.getLogger(__name__)
CALIBRATION_KEYS = (
    "dataset_name", "dataset_config", "dataset_split", "dataset_revision", "text_column", "num_calibration_samples",
    "seq_length", "seed",
)  # fmt: skip


class Bench:
    """One benchmark in one work folder."""

    def __init__(
        self,
        grid: Grid,
        work_folder: Path,
        variables: dict[str, str],
        *,
        results: Path | None = None,
        look: Callable[[Cell, Path], dict[str, Any]] | None = None,
    ) -> None:
        """Read what the work folder holds.

        Args:
            variables: what a peer's command may name in braces.
            results: the file that keeps what is finished; `results.json` of the work folder unless given.
            look: what else is noted of a pruned folder before its weights are deleted.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInputError(
                "num_processes: each run is a process of its own; start this without a launcher, with --at_once N for "
                "runs side by side."
            )
        self.grid = grid
        self.folder = work_folder
        self.variables = variables
        self.look = look
        self._places: list[dict[str, str]] = []
        self._at_once = 1
        # Pruning may run side by side, scoring and the results' file are one at a time.
        self._turn = Lock()
        self._left = 0
        work_folder.mkdir(parents=True, exist_ok=True)
        self.recipe = make_recipe(grid.common)
        assert self.recipe.model.model_name_or_path is not None
        self.source = resolve_model(self.recipe.model.model_name_or_path, self.recipe.model.revision)
        self.model_config = load_config(self.source.path, self.recipe.model, self.source.revision)
        self.tokenizer = load_tokenizer(self.source.path, self.recipe.model, self.source.revision)
        self._evaluation: QualityEvaluation | None = None
        # A folder's place differs from machine to machine, its weights do not.
        place = Path(self.source.path)
        dense = _digest(place) if place.is_dir() else str(place)
        scored = [dense, self.revision, vars(self.recipe.evaluation), vars(self.recipe.model)]
        self.results = Results(results or work_folder / "results.json", _short_digest(scored))

    @property
    def revision(self) -> str | None:
        """Of the dense model."""
        return self.source.revision or self.recipe.model.revision

    def run(
        self,
        rows: Collection[str] = (),
        settings: Collection[str] = (),
        seeds: Collection[int] = (),
        *,
        at_once: int = 1,
        max_minutes: float = math.inf,
    ) -> list[str]:
        """Run whatever is not finished of some rows, settings and seeds (of all where none is named).

        Args:
            at_once: cells that are pruned side by side.
            max_minutes: nothing is begun after that; what is under way goes on to its end.

        Returns:
            a sentence for each cell that failed.

        Raises:
            BadInputError: another process runs in the work folder or writes the file of results.
        """
        with ExitStack() as stack:
            locks = {
                (self.folder / "bench.lock").resolve(): "work_folder",
                self.results.path.resolve().with_suffix(".results.lock"): "results",
            }
            for lock, key in locks.items():
                taken = f"{key}: another run is under way in {lock.parent}; wait for it, or name another."
                stack.enter_context(held(lock, taken))
            # Whoever was here since may have finished something.
            self.results.read()
            return self._run(rows, settings, seeds, at_once, max_minutes)

    def _run(
        self,
        rows: Collection[str],
        settings: Collection[str],
        seeds: Collection[int],
        at_once: int,
        max_minutes: float,
    ) -> list[str]:
        failures = []
        stop = perf_counter() + 60 * max_minutes
        self._left = 0
        self._dense()
        for repeat in range(self.grid.repeats):
            # Who goes first changes from repeat to repeat.
            cells = [
                cell
                for cell in self.grid.cells[:: -1 if repeat % 2 else 1]
                if (not rows or cell.row in rows)
                and (not settings or cell.setting in settings)
                and (not seeds or cell.seed in seeds)
            ]
            waiting = [cell for cell in cells if len(self.results.runs(cell)) <= repeat]
            for cell in waiting:
                # Made here, one after the other: cells that share calibration windows share the file.
                if cell.command is None:
                    self._token_ids(cell)
            self._places = [_place(number, at_once) for number in range(at_once)]
            self._at_once = at_once
            with ThreadPoolExecutor(at_once) as pool:
                for failure in pool.map(lambda cell: self._run_cell(cell, stop), waiting):
                    if failure:
                        failures.append(failure)
                        logger.error("%s", failure)
        if self._left:
            logger.info("%d runs are left for another time: the same command goes on.", self._left)
        return failures

    def _dense(self) -> None:
        if "dense" not in self.results.quality:
            self.results.quality["dense"] = self._score(str(self.source.path), "dense", self.revision)
            self.results.save()

    def _run_cell(self, cell: Cell, stop: float) -> str | None:
        """Prune in a fresh process, then score; None, or what went wrong. Nothing at all later than `stop`."""
        if perf_counter() > stop:
            self._left += 1
            return None
        name = "-".join("".join(c if c.isalnum() else "_" for c in part) for part in (cell.row, cell.setting) if part)
        place = self.folder / f"{name}-{cell.seed}-{cell.key}"
        output, report_file, log = (place.with_suffix(suffix) for suffix in (".model", ".json", ".log"))
        shutil.rmtree(output, ignore_errors=True)
        report_file.unlink(missing_ok=True)
        command = self._command(cell, output, report_file)
        before, start = _processor_seconds(), perf_counter()
        # No more threads than places: there always is one.
        own = self._places.pop()
        try:
            with log.open("w") as stream:
                environment = os.environ | own | {"HF_PRUNE_QUIET": "1"}
                done = subprocess.run(command, stdout=stream, stderr=stream, env=environment)
        finally:
            self._places.append(own)
        wall = perf_counter() - start
        busy = max(0.0, (_processor_seconds() - before) / wall)
        if done.returncode:
            return f"{cell.row}, {cell.setting or 'the only setting'}: exit status {done.returncode}; see {log}"
        try:
            report = json.loads((output / "prune_report.json" if cell.command is None else report_file).read_text())
            with self._turn:
                self._finish(cell, output, report, wall, busy)
        except (HfPruneError, OSError, KeyError, ValueError) as error:
            # A model that cannot be scored or a peer without a report is a row that failed; the others go on.
            return f"{cell.row}, {cell.setting or 'the only setting'}: {type(error).__name__}: {error}; see {log}"
        shutil.rmtree(output, ignore_errors=True)
        return None

    def _finish(self, cell: Cell, output: Path, report: dict[str, Any], wall: float, busy: float) -> None:
        """Score a pruned folder and note the run."""
        digest = _digest(output)
        if digest not in self.results.quality:
            self.results.quality[digest] = self._score(str(output), f"{cell.row} {cell.setting}")
        self.results.add(
            cell,
            {
                "row": cell.row,
                "setting": cell.setting,
                "seed": cell.seed,
                "weights": digest,
                "seconds": report["seconds"]["prune"],
                "allocation_seconds": report.get("allocation_seconds"),
                "peak_memory_bytes": _peak(report["peak_memory_bytes"]),
                "process_seconds": wall,
                "cores_busy_elsewhere": busy,
                "at_once": self._at_once,
                "day": date.today().isoformat(),
                "versions": report.get("versions"),
                "densities": _densities(report),
                **(self.look(cell, output) if self.look else {}),
            },
        )
        quality = self.results.quality[digest]
        logger.info(
            "%s %s seed %d: perplexity %.2f, %.1f s, %.2f cores busy elsewhere",
            cell.row, cell.setting, cell.seed, quality["perplexity"], report["seconds"]["prune"], busy,
        )  # fmt: skip

    def _command(self, cell: Cell, output: Path, report: Path) -> list[str]:
        token_ids = self._token_ids(cell)
        if cell.command is None:
            left_out = {"sample_prompts", "push_to_hub", *CALIBRATION_KEYS, *field_types(RunArguments)}
            values = {k: v for k, v in cell.values.items() if k not in left_out and not k.startswith("eval_")}
            # What is timed is done in one go.
            values |= {"seed": cell.seed, "output_dir": str(output), "eval_efficiency": False, "restart": True}
            if token_ids is not None:
                values["dataset_name"] = str(token_ids)
            if values.get("propagate") is False or self.grid.share_learning:
                values["statistics_folder"] = str(self.folder / "statistics")
            recipe = output.with_suffix(".yaml")
            recipe.write_text(dump_yaml(values))
            return [sys.executable, "-m", "hf_prune", "prune", "--config", str(recipe)]
        # Each word is filled in by itself: a path with a space stays one argument.
        known = {
            **self.variables,
            **{key: str(value) for key, value in cell.values.items()},
            "model": str(self.source.path),
            "token_ids": str(token_ids),
            "output": str(output),
            "report": str(report),
        }
        try:
            return [word.format(**known) for word in shlex.split(cell.command)]
        except KeyError as error:
            raise BadInputError(f"{error.args[0]}: {cell.row} needs it; give --{error.args[0]} VALUE.") from None

    def _token_ids(self, cell: Cell) -> Path | None:
        """The file of the cell's calibration windows, made once for all rows that share them."""
        data = make_recipe({key: cell.values[key] for key in CALIBRATION_KEYS if key in cell.values}).data
        if data.dataset_name is None:
            return None
        path = (
            self.folder / f"token_ids-{_short_digest([str(self.source.path), self.revision, vars(data)])}.safetensors"
        )
        if not path.exists():
            _, input_ids = load_calibration(data, self.tokenizer, self.model_config)
            save_file({"input_ids": input_ids}, path)
        return path

    def _score(self, place: str, label: str, revision: str | None = None) -> dict[str, Any]:
        """Perplexity by window, and the share of zeros, of a saved folder."""
        if self._evaluation is None:
            self._evaluation = QualityEvaluation(self.recipe.evaluation, self.tokenizer, self.model_config)
        device = pick_device(self.recipe.model.device, 0)
        model = load_model(place, self.recipe.model, device, revision)
        with torch.inference_mode():
            measured = self._evaluation.measure(model, label)
        # The next run is another process.
        del model
        free_memory()
        summary = inspect_checkpoint(place, revision).summary
        return {
            "perplexity": float(measured.nll.mean().exp()),
            "nll": [round(value, 6) for value in measured.nll.tolist()],
            "sparsity": summary["block_sparsity"],
            "total_sparsity": summary["total_sparsity"],
            "parameters": summary["total_parameters"],
            "patterns": summary["patterns"],
        }


def _place(number: int, at_once: int) -> dict[str, str]:
    """Environment of one of several runs side by side: a share of the processors, a GPU of its own where there are."""
    if at_once == 1:
        return {}
    place = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1))}
    if torch.cuda.device_count() > 1:
        # What this process was allotted, where somebody did.
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = [name for name in given.split(",") if name] or [str(n) for n in range(torch.cuda.device_count())]
        place["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    return place


def _short_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _densities(report: dict[str, Any]) -> list[float] | None:
    """The planned density of each matrix in the plan's order, where they differ."""
    planned = [round(view["target_density"], 5) for view in report.get("views") or []]
    return planned if len(set(planned)) > 1 else None


def _peak(value: Any) -> int | None:
    """Peers report a mapping by phase."""
    return value.get("prune") if isinstance(value, dict) else value


def _processor_seconds() -> float:
    """Processor time of everything on this machine but this process and its finished children."""
    machine = psutil.cpu_times()
    busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)


def _digest(folder: Path) -> str:
    """Of a folder's weights: equal runs are told from unequal ones, and each is scored once."""
    total = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
