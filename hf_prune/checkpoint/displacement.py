"""How far pruning has moved the weights that it kept: the saved folder against the dense model, a matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from hf_prune.plan import ViewPlan


def displacement(folder: Path, dense: nn.Module, views: Sequence[ViewPlan]) -> dict[str, dict[str, float]]:
    """Of each view whose parameter the folder has, {"moved", "changed", "kept", "squared"}.

    Where files keep experts under names of their own, the folder is loaded whole.

    Over the weights that are not zero in the folder: `moved` is ||W' - W|| / ||W||, `changed` the share that differs at
    all, in the folder's dtype; `kept` counts them and `squared` is ||W||^2, for sums over views.

    Args:
        dense: the model before pruning, in the folder's dtype, on the CPU.
    """
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    result = {}
    with ExitStack() as stack:
        shards: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            shards |= dict.fromkeys(file.keys(), file)
        converted: dict[str, nn.Parameter] = {}
        if any(view.expert is not None and view.parameter not in shards for view in views):
            from transformers import AutoModelForCausalLM

            dtype = next(dense.parameters()).dtype
            converted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).named_parameters())
        for view in views:
            name = view.parameter
            if name not in parameters or (name not in shards and name not in converted):
                continue
            before = parameters[name].detach()
            pruned = shards[name].get_tensor(name) if name in shards else converted[name].detach()
            if view.expert is not None:
                pruned, before = pruned[view.expert], before[view.expert]
            kept = pruned != 0
            squared = float(before[kept].double().square().sum())
            change = float((pruned[kept].double() - before[kept].double()).square().sum())
            result[view.name] = {
                "moved": (change / squared) ** 0.5 if squared > 0 else 0.0,
                "changed": float((pruned != before)[kept].double().mean()) if bool(kept.any()) else 0.0,
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
