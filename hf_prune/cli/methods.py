"""hf-prune methods: what there is, one line each, with the paper."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

from hf_prune.arguments import PruneConfig
from hf_prune.cli.arguments import console, take_flags
from hf_prune.recipe import parse_flags


def help_text() -> str:
    return "usage: hf-prune methods\n\nLists methods, allocations and reconstructions with their papers and own keys.\n"


def main(arguments: list[str]) -> None:
    take_flags(parse_flags(arguments))
    from hf_prune.allocation import ALLOCATIONS
    from hf_prune.methods import methods
    from hf_prune.methods.dynamic_sparse import DynamicSparseConfig
    from hf_prune.methods.legcnet import LEGCNetConfig
    from hf_prune.methods.lottery_ticket import LotteryTicketConfig
    from hf_prune.reconstruction import RECONSTRUCTIONS
    from hf_prune.report.tables import methods_table

    out = console()
    trained: list[Any] = [LotteryTicketConfig, DynamicSparseConfig, LEGCNetConfig]
    out.print(methods_table([asdict(config.info) for config in methods().values()]))
    out.print(methods_table([asdict(config.info) for config in trained], "Methods of hf-prune train"))
    for title, parts in (("Allocations", ALLOCATIONS), ("Reconstructions", RECONSTRUCTIONS)):
        rows = [{"name": name, "summary": part.summary, "paper": part.paper} for name, part in parts.items()]
        out.print(methods_table(rows, title))
    common = {item.name for item in fields(PruneConfig)}
    everything = {**methods(), **{config.info.name: config for config in trained}, **ALLOCATIONS, **RECONSTRUCTIONS}
    for name, config in everything.items():
        own = [
            f"{item.name} [{[] if item.default is MISSING else item.default}]"
            for item in fields(config)
            if item.name not in common
        ]
        if own:
            out.print(f"{name}: own keys {', '.join(own)}", markup=False)
    out.print(
        "Any criterion goes with any update, allocation, pattern and reconstruction: `criterion: wanda`, "
        "`update: sparsegpt`, `allocation: owl`, `reconstruct: block`."
    )
