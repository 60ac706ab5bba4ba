"""hf-prune compare: what tickets share, beyond chance."""

from __future__ import annotations

import json

from hf_prune.cli.arguments import console, take_flags, take_text
from hf_prune.fields import coerce
from hf_prune.progress import is_main_process
from hf_prune.recipe import parse_flags

MARK = "comparison.json"


def help_text() -> str:
    return (
        "usage: hf-prune compare FOLDER FOLDER [FOLDER ...] [--initial MODEL] [--output_dir FOLDER]\n\n"
        "Kept weights that the tickets share, against chance; signs that differ; how far weights have moved since\n"
        "--initial (a folder, a .safetensors file or a model's name; tickets of `hf-prune train` keep theirs).\n"
        "--output_dir gets comparison.json, .csv and .png.\n"
    )


def main(arguments: list[str]) -> None:
    count = next((place for place, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    folders, flags = arguments[:count], parse_flags(arguments[count:])
    take_flags(flags, "initial", "output_dir", "overwrite_output_dir")
    overwrite = coerce("overwrite_output_dir", flags.pop("overwrite_output_dir", False), bool)
    initial, output_dir = take_text(flags, "initial"), take_text(flags, "output_dir")
    if not is_main_process():
        # Nothing here is shared out.
        return
    import pandas

    from hf_prune.checkpoint.folder import check_output_folder, output_folder
    from hf_prune.comparison import compare_tickets
    from hf_prune.report.plots import plot_comparison
    from hf_prune.report.tables import comparison_table

    if output_dir:
        check_output_folder(output_dir, overwrite, MARK)
    comparison = compare_tickets(folders, initial)
    console().print(comparison_table(comparison))
    if output_dir:
        with output_folder(output_dir, overwrite, MARK) as folder:
            (folder / MARK).write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
            pandas.DataFrame(comparison["layers"]).to_csv(folder / "comparison.csv", index=False)
            plot_comparison(comparison, folder / "comparison.png")
    else:
        console().print("--output_dir FOLDER writes this with a plot and a CSV.")
