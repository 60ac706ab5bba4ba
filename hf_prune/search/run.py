"""A search from its recipe to the chosen model: draw candidates, drop most of them, finish one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from hf_prune.errors import BadInputError, RunError
from hf_prune.preparation import check_output
from hf_prune.search.arguments import SearchRecipe
from hf_prune.search.candidates import Candidates, OneShotCandidates
from hf_prune.search.rounds import Rounds
from hf_prune.search.searching import PAUSE, Search
from hf_prune.search.space import label
from hf_prune.search.stability import check_variations
from hf_prune.search.study import (
    DENSE,
    STORAGE,
    anyone_alive,
    attributes_on_disk,
    check_identity,
    check_storage,
    is_alive,
)
from hf_prune.search.summary import write_tables

# Seconds that a process waits where nobody leads; a launcher starts both within SAME_LAUNCH.
LONGEST_WAIT, SAME_LAUNCH = 3600, 60
# What accelerate and torchrun tell a process of the others.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def make_candidates(recipe: SearchRecipe) -> Candidates:
    """The candidates of the kind that a recipe names, every combination checked."""
    if recipe.search.search == "dynamic_sparse":
        from hf_prune.search.trained import TrainedCandidates

        return TrainedCandidates(recipe)
    return OneShotCandidates(recipe)


def leave_group(device: str) -> int:
    """This process's rank; from here on it stands alone: one that waits for the others would wait for ever, since
    each measures a candidate of its own. Of several GPUs it sees one of its own, unless `device` names one.
    """
    rank = int(os.environ.get("RANK", "0"))
    if "LOCAL_RANK" in os.environ:
        os.environ.update(own_gpu(device, int(os.environ["LOCAL_RANK"])))
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    return rank


def own_gpu(device: str, number: int) -> dict[str, str]:
    """The environment in which the process of this number sees one GPU of several; empty where there are none, or where
    `device` says which. To be set before CUDA is used.
    """
    count = torch.cuda.device_count()
    if device not in ("auto", "cuda") or count < 2:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[number % count]}


def run_search(
    recipe: SearchRecipe,
    candidates: Candidates | None = None,
    *,
    resume: bool = False,
    workers: list[list[str]] | None = None,
) -> dict[str, Any]:
    """Search, finish the chosen candidate, and return the summary that stands in search.json.

    Args:
        candidates: those of the recipe's kind unless given.
        resume: go on with what search_dir holds.
        workers: command lines of processes that help, each of which calls `help_search`.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
        RunError: no candidate could be measured, or finishing failed; what was measured is kept.
    """
    folder = recipe.folder
    check_storage(folder, resume)
    if recipe.output.output_dir is None:
        raise BadInputError("output_dir: the recipe does not say; name the folder of the chosen model.")
    check_output(recipe.output)
    if resume:
        check_identity(folder, recipe.identity)
    candidates = candidates or make_candidates(recipe)
    if recipe.search.stability_candidates and candidates.setting is not None:
        check_variations(candidates)
    search = Search(recipe, candidates)
    search.folder.begin(recipe.identity)
    search.folder.put_back(at_start=True)
    try:
        search.measuring.dense()
    except (BadInputError, RunError):
        # A mistake that another recipe has not: it shall find the folder as this one did.
        if not resume:
            search.folder.discard()
        raise
    with _helped_by(workers or [], recipe.model.device) as helpers:
        search.draw(helpers)
        rounds = Rounds(search)
        finalists = rounds.finals(rounds.eliminate(helpers), helpers)
    search.folder.study.set_user_attr("finalists", [label(own.params) for own in finalists])
    search.folder.study.set_user_attr("finished", True)
    search.measure_stability()
    summary = search.summarise()
    write_tables(folder, summary, search.measuring.dense_spectra, search.candidate_spectra(summary))
    if summary["chosen"] is None:
        raise RunError("search: none of the candidates left at the end gave finite figures; search.md says why.")
    report = candidates.finish(finalists[0].params, {"search": summary})
    return {**summary, "report": report}


def help_search(recipe: SearchRecipe, candidates: Candidates | None = None) -> None:
    """Measure what another process's search wants, until it is finished or gone; arguments as for `run_search`."""
    folder = recipe.folder
    if not _wait_for_leader(folder, recipe.identity):
        return
    search = Search(recipe, candidates or make_candidates(recipe))
    while not search.folder.study.user_attrs.get("finished"):
        if not is_alive(folder, search.folder.study.user_attrs.get("leader")):
            raise RunError("search: the process that leads is gone; start it again with --resume.")
        if not search.step():
            time.sleep(PAUSE)


def show_search(recipe: SearchRecipe, candidates: Candidates | None = None) -> dict[str, Any]:
    """The summary of what a search has found so far; nothing is measured; arguments as for `run_search`.

    Raises:
        BadInputError: there is no such search.
    """
    folder = recipe.folder
    check_storage(folder, resume=True)
    check_identity(folder, recipe.identity)
    search = Search(recipe, candidates or make_candidates(recipe))
    summary = search.summarise()
    write_tables(folder, summary, search.measuring.dense_spectra, search.candidate_spectra(summary))
    return summary


def _wait_for_leader(folder: Path, identity: str) -> bool:
    """Whether there is a search to help with, once the process that leads has measured the dense model.

    Raises:
        BadInputError: the folder's search is another one.
        RunError: no process leads.
    """
    started, began = perf_counter(), time.time()
    while perf_counter() - started < LONGEST_WAIT:
        if anyone_alive(folder):
            # The dense model may train for hours.
            started = perf_counter()
        if (folder / STORAGE).exists() and (folder / DENSE).exists():
            attributes = attributes_on_disk(folder / STORAGE)
            leader = attributes.get("leader")
            if is_alive(folder, leader) and not attributes.get("finished"):
                check_identity(folder, identity)
                return True
            if attributes.get("finished") and attributes["begun"] > began - SAME_LAUNCH:
                # It was quicker than this process could start.
                return False
        time.sleep(PAUSE)
    raise RunError(f"search_dir: no process leads a search in {folder}; start one.")


@contextmanager
def _helped_by(commands: list[list[str]], device: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that help; those that are still there are ended with the search."""
    helpers = [
        subprocess.Popen([sys.executable, "-m", "hf_prune", *command], env={**os.environ, **own_gpu(device, number)})
        for number, command in enumerate(commands, start=1)
    ]
    try:
        yield helpers
    finally:
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.wait()
