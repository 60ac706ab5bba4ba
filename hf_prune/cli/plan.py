"""hf-prune plan: what a recipe would do and take; weights are loaded only where densities depend on them."""

from __future__ import annotations

from hf_prune.arguments import StructuredConfig
from hf_prune.cli.arguments import console, quiet_libraries, recipe_help, take_text
from hf_prune.errors import BadInputError
from hf_prune.fields import coerce
from hf_prune.progress import is_main_process
from hf_prune.recipe import load_recipe, parse_flags


def help_text() -> str:
    return recipe_help(
        "plan",
        "Show what would be pruned and what it would take; --save PLAN.json writes it, --verbose lists every layer.",
    )


def main(arguments: list[str]) -> None:
    flags = parse_flags(arguments)
    verbose = coerce("verbose", flags.pop("verbose", False), bool)
    save = take_text(flags, "save")
    if save and not save.endswith(".json"):
        raise BadInputError(f"save: {save} must end in .json, so that `allocation: {save}.json` can name it.")
    recipe = load_recipe(take_text(flags, "config"), flags)
    from hf_prune.compose import make_allocation
    from hf_prune.preparation import check_feasible, prepare, with_final_plan
    from hf_prune.report.figures import duration, flops, size
    from hf_prune.report.tables import plan_table

    quiet_libraries()
    ready = prepare(recipe)
    rule = make_allocation(ready.config)
    searches = isinstance(ready.config, StructuredConfig) and ready.config.searches_budget
    learns = searches or (rule is not None and rule.learns)
    if recipe.output.output_dir:
        check_feasible(ready)
    if not ready.plan_is_final and (save or not learns):
        # Densities that depend on the weights: the one case in which a plan loads them.
        ready = with_final_plan(ready)
    out = console()
    out.print(plan_table(ready.plan.to_dict(), verbose=verbose))
    if not ready.plan_is_final and not save:
        structured = isinstance(ready.config, StructuredConfig)
        alike = "widths are alike" if structured else "densities are uniform"
        now = "sizes are the first to be tried" if searches else alike
        out.print(f"These {now}: pruning will find better ones, and --save PLAN.json finds them now.")
    predicted = ready.estimate
    without = "afterwards" if ready.plan.structure else "without multiplications by zero (theoretical)"
    before, after = flops(predicted.flops_per_token), flops(predicted.nonzero_flops_per_token)
    out.print(f"FLOPs a token: {before} dense, {after} {without}.")
    out.print(
        f"Pruning: about {duration(predicted.seconds)} and {size(predicted.memory_bytes)} of memory on {ready.device}, "
        f"{size(predicted.disk_bytes)} of disk; evaluation comes on top."
    )
    if save and is_main_process():
        try:
            ready.plan.save(save)
        except OSError as error:
            raise BadInputError(f"save: {save} cannot be written ({error.strerror}); choose another file.") from None
        structure = ready.plan.structure
        own = f"`layout: pad` with `allocation: {save}`" if structure else f"`allocation: {save}`"
        use = f"; {own} uses it" if not structure or structure["widths"] else ""
        out.print(f"Saved to {save}{use}.", markup=False)
