"""How an allocation has shared out the zeros: a line for each kind of weight matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from hf_prune.report.figures import number, percent
from hf_prune.report.markdown import code
from hf_prune.report.names import kind_of

# Shares closer than this are one share.
ALIKE = 0.001


def share_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(kind, zeros in all of its matrices, fewest, most, with their blocks); none where all have the same share."""
    views = report.get("views")
    kinds: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for view in views if isinstance(views, list) else []:
        density, block, shape = number(view.get("density")), view.get("block"), view.get("shape")
        if density is not None and block is not None and shape and view.get("name"):
            kinds[kind_of(view)].append((1 - density, block, math.prod(shape)))
    zeros = [share for own in kinds.values() for share, _, _ in own]
    if not zeros or max(zeros) - min(zeros) < ALIKE:
        return []
    rows = []
    for kind, own in kinds.items():
        mean = sum(share * numel for share, _, numel in own) / sum(numel for _, _, numel in own)
        fewest, most = (f"{percent(share)} (block {block})" for share, block, _ in (min(own), max(own)))
        rows.append((code(kind), percent(mean), fewest, most))
    return rows
