"""hf-prune sensitivity: what each block, kind of layer or matrix costs when it alone is pruned."""

from __future__ import annotations

import json

from hf_prune.cli.arguments import console, quiet_libraries, recipe_help, take_text
from hf_prune.recipe import load_recipe, parse_flags


def help_text() -> str:
    return recipe_help(
        "sensitivity",
        "Prune one part at a time and evaluate; --by block, kind or layer says what a part is. Writes\n"
        "sensitivity.json, .csv and .png into output_dir. Take eval_split: validation, not the test you report.",
    )


def main(arguments: list[str]) -> None:
    flags = parse_flags(arguments)
    by = take_text(flags, "by") or "block"
    recipe = load_recipe(take_text(flags, "config"), flags)
    recipe.require("output_dir", "eval_dataset_name")
    import pandas

    from hf_prune.checkpoint.folder import PLAN_FILE, check_output_folder, output_folder
    from hf_prune.progress import is_main_process
    from hf_prune.report.plots import plot_sensitivity
    from hf_prune.report.tables import sensitivity_table
    from hf_prune.sensitivity import run_sensitivity

    quiet_libraries()
    output_dir, overwrite = str(recipe.output.output_dir), recipe.output.overwrite_output_dir
    check_output_folder(output_dir, overwrite)
    measured, agreement = run_sensitivity(recipe, by)
    if not is_main_process():
        return
    report = {**measured.to_dict(), "agreement": agreement}
    with output_folder(output_dir, overwrite) as folder:
        (folder / "sensitivity.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        pandas.DataFrame(report["parts"]).to_csv(folder / "sensitivity.csv", index=False)
        plot_sensitivity(report, folder / "sensitivity.png")
        measured.plan.save(folder / PLAN_FILE)
    out = console()
    out.print(sensitivity_table(report))
    if report["outstanding"]:
        out.print(f"Worth leaving alone: ignore: [{', '.join(report['outstanding'])}]", markup=False)
    if agreement:
        found = ", ".join(f"{name} {value:+.2f}" for name, value in agreement.items())
        out.print(f"Rank correlation of each allocation's densities with the measured cost: {found}.")
    out.print(
        f"Written to {output_dir}; `allocation: {output_dir}/{PLAN_FILE}` takes densities you edit.", markup=False
    )
