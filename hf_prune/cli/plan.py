"""hf-prune plan: what a recipe would do and take, without loading weights."""

from __future__ import annotations

from hf_prune.cli.arguments import console, quiet_libraries, read_recipe, recipe_help


def help_text() -> str:
    return recipe_help(
        "plan",
        "Show what would be pruned and what it would take; --save PLAN.json writes it, --verbose lists every layer.",
    )


def main(arguments: list[str]) -> None:
    verbose = "--verbose" in arguments
    arguments = [argument for argument in arguments if argument != "--verbose"]
    save = None
    if "--save" in arguments:
        place = arguments.index("--save")
        save = arguments[place + 1] if place + 1 < len(arguments) else None
        del arguments[place : place + 2]
    recipe = read_recipe(arguments)
    from hf_prune.pipeline import prepare
    from hf_prune.report.figures import duration, flops, size
    from hf_prune.report.tables import plan_table

    quiet_libraries()
    ready = prepare(recipe)
    out = console()
    out.print(plan_table(ready.plan.to_dict(), verbose=verbose))
    predicted = ready.estimate
    out.print(
        f"FLOPs a token: {flops(predicted.flops_per_token)} dense, {flops(predicted.nonzero_flops_per_token)} without "
        "multiplications by zero (theoretical)."
    )
    out.print(
        f"Pruning: about {duration(predicted.seconds)} and {size(predicted.memory_bytes)} of memory on {ready.device}, "
        f"{size(predicted.disk_bytes)} of disk; evaluation comes on top."
    )
    if save:
        ready.plan.save(save)
        out.print(f"Saved to {save}; `allocation: {save}` uses it.")
