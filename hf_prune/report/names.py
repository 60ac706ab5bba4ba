"""Short names for many weights: what kind each is, and which blocks hold it."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from hf_prune.report.markdown import one_line


def kind_of(row: dict[str, Any]) -> str:
    """The name of a weight within its block, experts and the like numbered as *: self_attn.q_proj, mlp.experts.*.w1."""
    name, block = one_line(row["name"]), row.get("block")
    inside = re.search(rf"(?:^|\.){block}\.(.+)$", name) if block is not None else None
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", inside[1]) if inside else name


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as 0-3, 7, 9-11; more than three of one larger stride as 1-47 by 2."""
    ordered = sorted(set(numbers))
    strides = {later - earlier for earlier, later in pairwise(ordered)}
    if len(ordered) > 3 and len(strides) == 1 and strides != {1}:
        return f"{ordered[0]}-{ordered[-1]} by {strides.pop()}"
    runs: list[list[int]] = []
    for item in ordered:
        if runs and item == runs[-1][1] + 1:
            runs[-1][1] = item
        else:
            runs.append([item, item])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them begin with, the last part aside: layers.0.q_proj -> 0.q_proj."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(own) > shared + 1 and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    return [".".join(own[shared:]) for own in parts]
