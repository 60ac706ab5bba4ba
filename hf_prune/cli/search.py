"""hf-prune search: many ways to prune, judged early, the best one finished."""

from __future__ import annotations

from hf_prune.cli.arguments import console, quiet_libraries, take_text
from hf_prune.errors import BadInputError
from hf_prune.fields import coerce, field_lines
from hf_prune.recipe import parse_flags, read_recipe

TEXT = """usage: hf-prune search --config RECIPE.yaml [--resume | --report] [--num_processes N] [--key value ...]

Searches the combinations of the pruning keys that hold a list, as in criterion: [magnitude, wanda], for the one that
is best by --objective: the error of the blocks' output, the loss on held-out text, or how near its Lyapunov spectrum is
to the dense model's.
What is finished is kept in --search_dir; --resume goes on after a cut, --report only shows what is there. The chosen
candidate is pruned with the whole calibration text, verified, evaluated and described in --output_dir, the account of
the search in its card.

--num_processes N searches with N processes; `accelerate launch -m hf_prune search ...` does the same. With one process
the same search_seed gives the same search, cut or not.

The other keys are those of `hf-prune prune`, and with `search: dynamic_sparse` those of `hf-prune train`. search:
"""


def help_text() -> str:
    from hf_prune.search.arguments import SearchArguments

    return TEXT + "\n".join(field_lines(SearchArguments)) + "\n"


def without_flag(arguments: list[str], name: str) -> list[str]:
    """A command line without one of its flags, whether `--name`, `--name VALUE` or `--name=VALUE`."""
    kept, skipping = [], False
    for word in arguments:
        if word.startswith("--"):
            skipping = word == f"--{name}" or word.startswith(f"--{name}=")
        if not skipping:
            kept.append(word)
    return kept


def main(arguments: list[str]) -> None:
    flags = parse_flags(arguments)
    resume, report, worker = (coerce(key, flags.pop(key, False), bool) for key in ("resume", "report", "worker"))
    if resume and report:
        raise BadInputError("report: only shows what there is; leave --resume out.")
    values, text = read_recipe(take_text(flags, "config"), flags)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise BadInputError("search: Optuna is missing; `pip install hf-prune[search]` brings it.") from None
    from hf_prune.report.search_report import search_markdown
    from hf_prune.search.arguments import make_search_recipe
    from hf_prune.search.run import help_search, leave_group, run_search, show_search

    recipe = make_search_recipe(values, text)
    quiet_libraries()
    out = console()
    rank = leave_group(recipe.model.device)
    if report:
        if rank == 0:
            out.print(search_markdown(show_search(recipe)), markup=False, soft_wrap=True)
        return
    if rank > 0 or worker:
        help_search(recipe)
        return
    helpers = [["search", *without_flag(arguments, "resume"), "--worker", "true"]]
    summary = run_search(recipe, resume=resume, workers=helpers * (recipe.model.num_processes - 1))
    out.print(search_markdown(summary), markup=False, soft_wrap=True)
    out.print(
        f"The chosen model is in {recipe.output.output_dir}, the search in {recipe.search.search_dir}.", markup=False
    )
