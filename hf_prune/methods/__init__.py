"""One file per published method or baseline; each registers itself. Adding a method is adding a file here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from hf_prune.arguments import PruneConfig
from hf_prune.errors import BadInputError
from hf_prune.methods.base import registered


@cache
def methods() -> dict[str, type[PruneConfig]]:
    """Name -> config class of every method in this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(registered.items()))


def find_method(key: str, name: str) -> type[PruneConfig]:
    """The config class of a method; BadInputError naming the recipe key where there is none."""
    able = [known for known, config in methods().items() if key == "method" or not config.structured]
    if name not in able:
        raise BadInputError(f"{key}: {name!r} is unknown; choose one of {', '.join(able)}.")
    return methods()[name]
