"""hf-prune inspect: sparsity and pattern by layer of any checkpoint."""

from __future__ import annotations

from pathlib import Path

from hf_prune.cli.arguments import console, split_positional, take_flags, take_text
from hf_prune.errors import BadInputError


def help_text() -> str:
    return (
        "usage: hf-prune inspect MODEL [--revision REVISION] [--plot FILE.png] [--verbose]\n\n"
        "MODEL is a folder or a Hub id. Prints sparsity and n:m pattern by layer and draws them as a picture\n"
        "(sparsity_by_layer.png in the current folder unless --plot says otherwise).\n"
    )


def main(arguments: list[str]) -> None:
    model, flags = split_positional(arguments, "the checkpoint's folder or Hub id")
    take_flags(flags, "revision", "plot", "verbose")
    from hf_prune.checkpoint.folder import PLAN_FILE
    from hf_prune.checkpoint.inspect import inspect_checkpoint, local_folder
    from hf_prune.plan import Plan
    from hf_prune.report.plots import plot_sparsity_by_layer
    from hf_prune.report.tables import inspect_table, plan_table

    revision, plot = take_text(flags, "revision"), Path(take_text(flags, "plot") or "sparsity_by_layer.png")
    folder = local_folder(model, revision)
    inspection = inspect_checkpoint(folder)
    out = console()
    plan = folder / PLAN_FILE
    try:
        if plan.is_file() and (made := Plan.load(plan)).structure:
            out.print(plan_table(made.to_dict()))
    except BadInputError as error:
        # What the tensors say stands by itself.
        out.print(f"Sizes before pruning are not known: {error}", markup=False)
    out.print(inspect_table(inspection.rows, inspection.summary, verbose=bool(flags.get("verbose"))))
    drawn = [row for row in inspection.rows if row.get("block") is not None]
    if drawn:
        plot_sparsity_by_layer(drawn, plot)
        out.print(f"Drawn in {plot}.")
