"""hf-prune methods: what there is, one line each, with the paper."""

from __future__ import annotations

from dataclasses import asdict, fields

from hf_prune.cli.arguments import console, take_flags
from hf_prune.recipe import PruneConfig, parse_flags


def help_text() -> str:
    return "usage: hf-prune methods\n\nLists the methods with their papers and their own recipe keys.\n"


def main(arguments: list[str]) -> None:
    take_flags(parse_flags(arguments))
    from hf_prune.methods import methods
    from hf_prune.report.tables import methods_table

    common = {item.name for item in fields(PruneConfig)}
    out = console()
    out.print(methods_table([asdict(config.info) for config in methods().values()]))
    for name, config in methods().items():
        own = [f"{item.name} [{item.default}]" for item in fields(config) if item.name not in common]
        if own:
            out.print(f"{name}: own keys {', '.join(own)}")
    out.print(
        "Any criterion goes with any update, allocation and pattern: `criterion: wanda` with `update: sparsegpt`."
    )
