"""hf-prune push: upload a finished folder to the Hub."""

from __future__ import annotations

from hf_prune.cli.arguments import console, split_positional, take_flags, take_text
from hf_prune.errors import BadInputError
from hf_prune.fields import coerce


def help_text() -> str:
    return (
        "usage: hf-prune push FOLDER --repo_id USER/NAME [--private] [--commit_message TEXT]\n\n"
        "Creates the repository where it does not exist and uploads the folder; safe to repeat. The token is that of\n"
        "`hf auth login` or HF_TOKEN; it is never written anywhere.\n"
    )


def main(arguments: list[str]) -> None:
    folder, flags = split_positional(arguments, "the folder")
    take_flags(flags, "repo_id", "private", "commit_message")
    repo_id, message = take_text(flags, "repo_id"), take_text(flags, "commit_message")
    if not repo_id:
        raise BadInputError("repo_id: say where to push to, --repo_id user/name.")
    from hf_prune.hub.push import push_folder

    private = coerce("private", flags.get("private", False), bool)
    options = {"commit_message": message} if message else {}
    console().print(f"Pushed to {push_folder(folder, repo_id, private=private, **options)}", markup=False)
