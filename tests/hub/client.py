"""What a user of the Hub does, one function a visit, each run in a fresh process by the `visit` fixture.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so none of this can run inside
pytest. A function takes strings and returns what JSON can hold; it is printed as the last line of standard output.
"""

import json
import logging
import sys
from pathlib import Path

from hf_prune.errors import HfPruneError


def refused(action: object, *arguments: object, **options: object) -> list:
    """Exit code and message of the error that an action must end in."""
    try:
        action(*arguments, **options)
    except HfPruneError as error:
        return [error.exit_code, str(error)]
    raise AssertionError(f"{action} with {arguments} was not refused")


def sees(repo_id: str, token: str | None = None) -> bool | int:
    """Whether a repository is private, or the status with which the Hub denies that there is one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi(token=token).model_info(repo_id).private
    except RepositoryNotFoundError as error:
        return error.response.status_code


def publish(token: str, model: str, resharded: str, structured: str) -> dict:
    """Log in, push a model twice, once privately, once in two shapes, and a smaller one; say what the Hub shows."""
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    from huggingface_hub import HfApi, login

    from hf_prune.hub.push import push_folder

    login(token)
    urls = [push_folder(model, "me/model") for _ in range(2)]
    urls.append(push_folder(model, "hidden", private=True))  # without a namespace: the user's own
    push_folder(model, "me/twice")
    push_folder(resharded, "me/twice")
    push_folder(structured, "me/structured")
    info = HfApi().model_info("me/model")
    return {
        "urls": urls,
        "card": info.card_data.to_dict(),
        "private": [info.private, HfApi().model_info("me/hidden").private],
        "siblings": [sibling.rfilename for sibling in info.siblings],
    }


def refusals(model: str, token: str, other_token: str, broken_card: str, leaking: str) -> dict:
    """Everything the Hub says no to; nobody is logged in."""
    from hf_prune.hub.push import push_folder

    return {
        "reading what is private": [sees("me/hidden"), sees("me/hidden", other_token), sees("me/hidden", token)],
        "no token": refused(push_folder, model, "me/model"),
        "wrong token": refused(push_folder, model, "me/model", token="hf_wrong"),
        "token with a line break": refused(push_folder, model, "me/model", token=f"{token[:9]}\n{token[9:]}"),
        "not a repository of theirs": refused(push_folder, model, "me/model", token=other_token),
        "not a namespace of theirs": refused(push_folder, model, "me/new", token=other_token),
        "private, but it is public": refused(push_folder, model, "me/model", token=token, private=True),
        "broken card": refused(push_folder, broken_card, "me/broken", token=token),
        "token in a file": refused(push_folder, leaking, "me/leaking", token=token),
    }


def push_once(model: str, token: str) -> list:
    """For a Hub that cannot be reached, for one reason or another."""
    from hf_prune.hub.push import push_folder

    return refused(push_folder, model, "me/model", token=token)


def read_models(token: str, token_ids: str, logits_file: str) -> dict:
    """Load the public models and the private one as anybody would, without being logged in, and keep their logits."""
    import torch
    from huggingface_hub import file_exists
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = torch.tensor([json.loads(token_ids)])
    logits = {}
    for repo_id, credentials in (("me/model", None), ("me/hidden", token), ("me/structured", None)):
        model = AutoModelForCausalLM.from_pretrained(repo_id, token=credentials)
        with torch.no_grad():
            logits[repo_id] = model(asked).logits
    save_file(logits, logits_file)
    return {
        "parameters": model.num_parameters(),
        "plain": "hf_prune" not in type(model).__module__ and not hasattr(model.config, "quantization_config"),
        "words": AutoTokenizer.from_pretrained("me/model").decode(asked[0]),
        "exists": [file_exists("me/model", "config.json"), file_exists("me/model", "model.bin")],
    }


def publish_text(folder: str) -> None:
    """Upload a folder of folders, each a dataset repository of its own."""
    from huggingface_hub import HfApi

    for dataset in sorted(Path(folder).iterdir()):
        HfApi().create_repo(f"me/{dataset.name}", repo_type="dataset")
        HfApi().upload_folder(repo_id=f"me/{dataset.name}", repo_type="dataset", folder_path=dataset)


def read_text(*names: str) -> dict:
    """The rows of each dataset repository through `datasets`, and its documents through the library."""
    from datasets import load_dataset

    from hf_prune.data.text import load_text

    return {
        name: {
            "rows": load_dataset(f"me/{name}", split="train")["text"][:],
            "documents": list(load_text(f"me/{name}", split="train").documents),
        }
        for name in names
    }


def manage() -> dict:
    """The calls that pushing and loading do not make, on a repository of their own."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    api = HfApi()
    api.create_repo("me/scratch")
    first = api.create_commit(
        "me/scratch",
        [CommitOperationAdd("a/b/one.txt", b"0123456789"), CommitOperationAdd("two.bin", b"\0" * 9)],
        commit_message="two files",
    )
    api.create_commit("me/scratch", [CommitOperationDelete("two.bin")], commit_message="one again")
    seen = {
        "user": api.whoami()["name"],
        "tree": [entry.path for entry in api.list_repo_tree("me/scratch", revision=first.oid)],
        "deep tree": [entry.path for entry in api.list_repo_tree("me/scratch", recursive=True)],
        "paths": [entry.path for entry in api.get_paths_info("me/scratch", ["a/b", "a/b/one.txt", "two.bin"])],
        "commits": [commit.title for commit in api.list_repo_commits("me/scratch")],
        "head": api.list_repo_refs("me/scratch").branches[0].target_commit == api.model_info("me/scratch").sha,
        "range": HfFileSystem().read_block("me/scratch/a/b/one.txt", offset=3, length=4).decode(),
    }
    try:
        api.model_info("me/scratch", revision="nothing-of-this-name")
    except RevisionNotFoundError as error:
        seen["no revision"] = error.response.status_code
    try:
        api.create_commit(
            "me/scratch", [CommitOperationAdd("c", b"c")], commit_message="too late", parent_commit=first.oid
        )
    except HfHubHTTPError as error:
        seen["stale parent"] = error.response.status_code
    api.update_repo_settings("me/scratch", private=True)
    seen["private"] = api.model_info("me/scratch").private
    api.delete_repo("me/scratch")
    seen["exists"] = api.repo_exists("me/scratch")
    return seen


def offline_work(text_file: str, model: str) -> dict:
    """What works from local files alone, and what has to say that it needs the Hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_prune.data.builtin import resolve_model
    from hf_prune.data.text import load_text
    from hf_prune.hub.push import push_folder

    source = resolve_model(model)
    return {
        "documents": list(load_text(text_file).documents),
        "parameters": AutoModelForCausalLM.from_pretrained(source.path).num_parameters(),
        "words": AutoTokenizer.from_pretrained(source.path).decode([1, 2]),
        "push": refused(push_folder, model, "me/model", token="hf_unused"),
        "text on the Hub": refused(load_text, "me/text", split="train"),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
