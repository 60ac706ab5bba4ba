"""One file per published method or baseline; each registers itself. Adding a method is adding a file here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from hf_prune.errors import BadInputError
from hf_prune.methods.base import NoUpdate, Solver, registered
from hf_prune.recipe import PruneConfig, coerce, field_types, fill, unknown_key


@cache
def methods() -> dict[str, type[PruneConfig]]:
    """Name -> config class of every method in this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(registered.items()))


def find_method(key: str, name: str) -> type[PruneConfig]:
    """The config class of a method; BadInputError naming the recipe key where there is none."""
    if name not in methods():
        raise BadInputError(f"{key}: {name!r} is unknown; choose one of {', '.join(methods())}.")
    return methods()[name]


def make_config(options: Mapping[str, Any]) -> PruneConfig:
    """Turn the pruning keys of a recipe into the method's config, every key checked.

    Raises:
        BadInputError: no or an unknown method, an unknown key, a value of the wrong type or out of range.
    """
    names = {key: options.get(key) for key in ("method", "criterion", "update")}
    if not names["method"] and not names["criterion"]:
        raise BadInputError(f"method: the recipe does not say; choose one of {', '.join(methods())}.")
    main = find_method("method", names["method"]) if names["method"] else PruneConfig
    parts = [
        find_method(key, name)
        for key, name in names.items()
        if name and key != "method" and (key, name) != ("update", "none")
    ]
    known = {key: kind for part in (*parts, main) for key, kind in field_types(part).items() if key != "options"}
    for key in options:
        if key not in known:
            raise unknown_key(key, known)
    own = {key: value for key, value in options.items() if key in field_types(main)}
    foreign = {key: coerce(key, value, known[key]) for key, value in options.items() if key not in own}
    config = fill(main, own)
    config.options = foreign
    make_solver(config)  # checks the parts' own values as well
    return config


def make_solver(config: PruneConfig) -> Solver:
    """The criterion and the update that a config names.

    Raises:
        BadInputError: an unknown criterion or update, or a method without that part.
    """
    main = find_method("method", config.method) if config.method else None
    criterion = config.criterion or (main.criterion_name if main else None)
    update = config.update or (main.update_name if main else "none")
    if criterion is None:
        raise BadInputError(f"criterion: the config does not say; choose one of {', '.join(methods())}.")

    def part_config(key: str, name: str) -> PruneConfig:
        kind = find_method(key, name)
        if isinstance(config, kind):
            return config
        own = field_types(kind).keys() - field_types(PruneConfig).keys()
        return kind(**{key: value for key, value in config.options.items() if key in own})

    chosen = part_config("criterion", criterion).make_criterion()
    if chosen is None:
        raise BadInputError(f"criterion: {criterion} has none; choose another method's.")
    if update == "none":
        return Solver(criterion, chosen, "none", NoUpdate())
    changed = part_config("update", update).make_update()
    if changed is None:
        raise BadInputError(f"update: {update} does not change weights; choose none or sparsegpt.")
    return Solver(criterion, chosen, update, changed)
