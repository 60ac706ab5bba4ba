"""What a prune_report.json says of a run: model, method, calibration, sparsity, displacement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import hf_prune
from hf_prune.arguments import PruneConfig, StructuredConfig
from hf_prune.checkpoint.displacement import displacement, overall
from hf_prune.checkpoint.offloaded import open_model
from hf_prune.compose import make_solver, own_options
from hf_prune.engine import distributed
from hf_prune.engine.offload import tensors_of
from hf_prune.methods import find_method
from hf_prune.pruning import PruneResult
from hf_prune.structure.budget import Structure

if TYPE_CHECKING:
    from hf_prune.data.text import TextData
    from hf_prune.preparation import Preparation

VERSIONS = ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub")


def describe(ready: Preparation, model: Any, result: PruneResult, text: TextData | None, total: int) -> dict[str, Any]:
    """The report's entries on model, method, calibration and what was pruned; `total` parameters there were before."""
    recipe = ready.recipe
    return {
        **environment(),
        "base_model": ready.source.base_model,
        "base_revision": ready.source.revision or recipe.model.revision,
        "base_license": ready.source.license,
        "architecture": result.plan.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(ready.device),
        "method": {**describe_method(ready.config), "pattern": result.plan.pattern},
        "calibration": None
        if text is None
        else {
            "dataset": text.name,
            "config": text.config,
            "split": text.split,
            "revision": text.revision,
            "private": text.private,
            "num_samples": ready.num_samples,
            "seq_length": ready.seq_length,
            "seed": recipe.data.seed,
        },
        **(zeros_of(model, result, total) if result.reduction is None else sizes_of(model, result, total)),
        "forward_passes": result.forward_passes,
        "seed": recipe.data.seed,
        "hub_model_id": recipe.output.hub_model_id,
    }


def environment() -> dict[str, Any]:
    """What every report begins with: its format, and what wrote it."""
    return {
        "format": "hf_prune_report",
        "version": 1,
        "versions": {"hf_prune": hf_prune.__version__, **{name: metadata.version(name) for name in VERSIONS}},
        "num_processes": distributed.world_size(),
    }


def zeros_of(model: Any, result: PruneResult, total: int) -> dict[str, Any]:
    """What became of each weight matrix where weights were set to zero."""
    plan = result.plan
    outcome = {view.name: view for view in result.views}
    pruned = sum(view.numel for view in plan.views)
    zeros = sum(int((tensor == 0).sum()) for _, tensor in tensors_of(model) if isinstance(tensor, nn.Parameter))
    return {
        "sparsity": {
            "target": plan.sparsity,
            "achieved_pruned": result.sparsity,
            "achieved_all": zeros / total,
            "zeros_before_pruned": sum(view.zeros_before for view in result.views) / pruned,
            "pruned_parameters": pruned,
            "total_parameters": total,
        },
        "views": [
            {
                "name": view.name,
                "block": view.block,
                "shape": list(view.shape),
                "target_density": view.density,
                "density": outcome[view.name].kept / view.numel,
                "zeros_before": outcome[view.name].zeros_before,
                "pattern": view.pattern,
                "floor": view.floor,
                "error": outcome[view.name].error,
                "scarce": outcome[view.name].scarce,
            }
            for view in plan.views
        ],
        "reconstruction": _reconstruction(result),
    }


def _reconstruction(result: PruneResult) -> list[dict[str, Any]]:
    return [{"block": block, **asdict(outcome)} for block, outcome in result.reconstruction.items()]


def sizes_of(model: Any, result: PruneResult, total: int) -> dict[str, Any]:
    """Shapes before and after, and how the units that stayed were made, where units went."""
    assert result.plan.structure is not None and result.reduction is not None
    left = sum(parameter.numel() for parameter in model.parameters())
    structure = Structure.from_dict(result.plan.structure)
    apart = ("kept", "reconstruction", "forward_passes", "shares", "earlier_seconds", "saving_seconds")
    return {
        "reconstruction": _reconstruction(result),
        "structure": {
            **result.plan.structure,
            "removed": structure.removed,
            "padded": structure.padded,
            "removed_all": 1 - left / total,
            "total_before": total,
            "total_after": left,
            # Which units stayed is long, and follows from the recipe.
            **{key: value for key, value in asdict(result.reduction).items() if key not in apart},
        },
    }


def describe_method(config: PruneConfig) -> dict[str, Any]:
    """The report's `method` entry: the method that the parts make, or the parts where no method is made of them."""
    if isinstance(config, StructuredConfig):
        return {
            **asdict(config.describe_run()),
            "reconstruct": config.reconstruct,
            "allocation": Path(config.allocation).name,
            "options": own_options(config),
        }
    solver = make_solver(config)
    own_criterion = find_method("criterion", solver.criterion_name)
    owner = find_method("method", config.method) if config.method else own_criterion
    changed = (solver.criterion_name, solver.update_name) != (owner.criterion_name, owner.update_name)
    owner = own_criterion if changed else owner
    title = owner.info.title if not changed else f"{owner.info.title} criterion, {solver.update_name} update"
    return {
        "name": owner.info.name if not changed else f"{solver.criterion_name}+{solver.update_name}",
        "title": title,
        "criterion": solver.criterion_name,
        "update": solver.update_name,
        "reconstruct": config.reconstruct,
        "allocation": Path(config.allocation).name,
        "output_importance": config.output_importance,
        "channel_permutation": config.channel_permutation or None,
        "options": own_options(config),
        "paper": owner.info.paper,
        "paper_title": owner.info.paper_title,
        "summary": owner.info.summary,
        "citation": owner.info.citation,
    }


def within_plan(result: PruneResult) -> dict[str, Any]:
    """A verification row: no weight matrix keeps more than its plan allows, whole weights a row."""
    if result.plan.structure is not None:
        return _as_planned(result)
    floor = result.plan.min_keep_ratio
    over = [
        view.name
        for view, outcome in zip(result.plan.views, result.views, strict=True)
        if outcome.kept > view.shape[0] * math.ceil(max(view.density, floor) * view.shape[1] - 1e-9)
    ]
    detail = f"{over[0]} keeps more than planned" if over else f"target {result.plan.sparsity:.2%} zeros"
    return {"check": "density within the plan", "passed": not over, "detail": detail}


def _as_planned(result: PruneResult) -> dict[str, Any]:
    """A verification row: every block kept as many units as planned, padding aside."""
    assert result.plan.structure is not None
    structure = Structure.from_dict(result.plan.structure)
    share = structure.after.heads // structure.after.groups
    wrong = []
    # Which units stayed is known where they went; a training behind it changes no shape.
    for block, kept in (result.reduction.kept if result.reduction else {}).items():
        wanted = {
            "mlp": structure.widths[block] if structure.widths else structure.after.width,
            "attention": structure.after.groups,
            "heads": structure.after.groups * share,
        }
        wrong += [f"block {block}: {len(units)} {kind}" for kind, units in kept.items() if len(units) != wanted[kind]]
    stored = sum(view.numel for view in result.plan.views)
    held = sum(view.kept + view.zeros_before for view in result.views)
    if stored != held:
        wrong.append(f"{held:,} weights instead of {stored:,}")
    detail = wrong[0] if wrong else f"{structure.removed:.2%} of the blocks' parameters removed"
    return {"check": "sizes as planned", "passed": not wrong, "detail": detail}


def add_displacement(report: dict[str, Any], ready: Preparation, folder: Path) -> None:
    """How far the kept weights have moved, by view and overall, from the dense model as it was loaded."""
    revision = ready.source.revision or ready.recipe.model.revision
    dense = open_model(ready.source.path, ready.recipe.model, torch.device("cpu"), revision)
    by_view = displacement(folder, dense, ready.plan.views)
    for row in report["views"]:
        row |= {key: by_view[row["name"]][key] for key in ("moved", "changed") if row["name"] in by_view}
    report["displacement"] = overall(by_view)


def described_options(config: Any, unused: Sequence[str] = ()) -> dict[str, Any]:
    """Options of a method that trains as reports and cards show them: what is set and used, and no folder."""
    hidden = ("method", "rounds_folder", *unused)
    return {key: value for key, value in asdict(config).items() if key not in hidden and value not in ([], None)}
