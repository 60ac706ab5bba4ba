"""How far pruning has moved the weights that it kept: the saved folder against the dense model, a matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_prune.checkpoint.source import WeightFiles
from hf_prune.engine.offload import in_turn
from hf_prune.plan import ViewPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def displacement(folder: Path, dense: PreTrainedModel, views: Sequence[ViewPlan]) -> dict[str, dict[str, float]]:
    """Of each view whose parameter the folder has, {"moved", "changed", "kept", "squared"}.

    Over the weights that are not zero in the folder: `moved` is ||W' - W|| / ||W||, `changed` the share that differs at
    all, in the folder's dtype; `kept` counts them and `squared` is ||W||^2, for sums over views.

    Args:
        dense: the model before pruning, in the folder's dtype, on the CPU.
    """
    pruned = WeightFiles(dense, sorted(folder.glob("*.safetensors")))
    result = {}
    for index in in_turn(dense, sorted({view.block for view in views})):
        own = [view for view in views if view.block == index]
        after = pruned.read({view.parameter for view in own}.__contains__)
        parameters = dict(dense.named_parameters(remove_duplicate=False))
        for view in own:
            if view.parameter not in parameters or view.parameter not in after:
                continue
            new, old = (view.own_part(tensors[view.parameter].detach()) for tensors in (after, parameters))
            kept = new != 0
            squared = float(old[kept].double().square().sum())
            change = float((new[kept].double() - old[kept].double()).square().sum())
            result[view.name] = {
                "moved": (change / squared) ** 0.5 if squared > 0 else 0.0,
                "changed": float((new != old)[kept].double().mean()) if bool(kept.any()) else 0.0,
                "kept": int(kept.sum()),
                "squared": squared,
            }
    return result


def overall(views: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """`moved` and `changed` of all views together; None without any."""
    kept, squared = (sum(view[key] for view in views.values()) for key in ("kept", "squared"))
    if not kept or not squared:
        return None
    change = sum(view["moved"] ** 2 * view["squared"] for view in views.values())
    return {
        "moved": (change / squared) ** 0.5,
        "changed": sum(view["changed"] * view["kept"] for view in views.values()) / kept,
    }
