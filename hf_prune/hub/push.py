"""Upload a finished output folder to the Hugging Face Hub: that folder, nothing else, as often as you like."""

import glob
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode

# HTTPError is the HTTP library's own base class (httpx or httpx2, whichever this huggingface_hub speaks through).
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from hf_prune.checkpoint.folder import RECIPE_FILE, RECOVERY_FILE, REPORT_FILE
from hf_prune.errors import BadInputError, HfPruneError, RunError
from hf_prune.report.privacy import last_recipe, public_recipe, public_report, recovery_report

logger = logging.getLogger(__name__)

HOW_TO_LOG_IN = "run `hf auth login` or set HF_TOKEN to a token with write permission"
HIDDEN_BUT_PUBLISHED = ".eval_results"
# A repeated push replaces what the tool wrote before; a stale shard beside a new one would be loaded in its place.
OUR_FILES = [
    "model*.safetensors",
    "model*.safetensors.index.json",
    "plots/*.png",
    ".eval_results/*.yaml",
    RECOVERY_FILE.format("*"),
]
# Weights do not carry pasted tokens and are large; everything smaller than this is searched before it is sent.
SEARCHED_BYTES = 16 * 1024**2


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload a model pruned with hf_prune",
) -> str:
    """Create the model repository where it does not exist, upload `folder` in one go and return the repository's URL.

    Hidden files and caches stay behind (`.eval_results/` goes), a link that leaves the folder is refused, and weights,
    plots and evaluation results of an earlier push that the folder no longer holds are removed from the repository.
    A second push of an unchanged folder makes no commit. `token` defaults to the one huggingface_hub finds.

    Raises BadInputError for an incomplete folder, a malformed `repo_id`, a missing or refused token, a public
    repository where a private one was asked for, an unreachable Hub or HF_HUB_OFFLINE; RunError if the upload breaks.
    """
    folder = Path(folder).expanduser().resolve()
    check_complete(folder)
    paths = files_to_upload(folder)
    token = check_ready_to_push(repo_id, token)
    _check_no_token(folder, paths, token)

    api = HfApi(token=token, library_name="hf_prune")
    with _one_sentence(f"create {repo_id}", token, if_unreachable=BadInputError):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = url.repo_id  # with the namespace, where only a name was given
        before = api.model_info(repo_id)
    if private and not before.private:
        raise BadInputError(
            f"{repo_id} exists and is public, and a private repository was asked for: make it private in its settings "
            "on the Hub, or choose another repo_id."
        )
    with _one_sentence(f"upload {folder.name} to {repo_id}", token, if_unreachable=RunError):
        with public_copy(folder, paths) as public:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=public,
                allow_patterns=[glob.escape(path) for path in paths],
                delete_patterns=OUR_FILES,
                commit_message=commit_message,
            )
    if commit.oid == before.sha:
        logger.info("%s already holds exactly this folder: nothing to upload.", url)
    else:
        logger.info("Pushed %d files to %s", len(paths), url)
    return str(url)


@contextmanager
def public_copy(folder: Path, paths: list[str]) -> Iterator[Path]:
    """The files of `folder` as they may be seen by anybody: links to them, but for recipe and report.

    These name local text and hold prompts in the user's own folder; a push sends them without, unless the recipe says
    publish_samples.
    """
    recipe, report = (folder / name if name in paths else None for name in (RECIPE_FILE, REPORT_FILE))
    if recipe is None or report is None:
        yield folder
        return
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except ValueError:
        raise BadInputError(f"{report} cannot be read: write the folder again before pushing it.") from None
    with tempfile.TemporaryDirectory(prefix="hf_prune-push-") as place:
        told = {RECIPE_FILE: content}
        for number, recovery in enumerate(content.get("recoveries") or [], start=1):
            told[RECOVERY_FILE.format("" if number == 1 else number)] = recovery_report(content, recovery)
        for path in paths:
            link = Path(place, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            if path not in (*told, REPORT_FILE):
                link.symlink_to(folder / path)
        for name, about in told.items():
            if name in paths:
                own = (folder / name).read_text(encoding="utf-8")
                text, verbatim = public_recipe(about, own)
                Path(place, name).write_text(own if verbatim else text + "\n", encoding="utf-8")
        public = (
            json.dumps(
                public_report(content, last_recipe(folder, content, recipe.read_text(encoding="utf-8"))), indent=1
            )
            + "\n"
        )
        Path(place, REPORT_FILE).write_text(public, encoding="utf-8")
        yield Path(place)


def check_ready_to_push(repo_id: str, token: str | None = None) -> str:
    """Return the token a push to `repo_id` would use; BadInputError for what is wrong without asking the Hub.

    Connects to nothing, so that a long run which ends in a push can find out at its start.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise BadInputError(
            f"{repo_id!r} is not a repository id: write it as name/model, with letters, digits, '-', '_' and '.' only."
        ) from None
    if is_offline_mode():
        raise BadInputError(f"cannot push to {repo_id} while HF_HUB_OFFLINE=1 is set: unset it and push again.")
    token = (token or get_token() or "").strip()
    if not token:
        raise BadInputError(f"pushing needs an access token of the Hugging Face Hub: {HOW_TO_LOG_IN}.")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise BadInputError(f"the access token holds characters that no token has: {HOW_TO_LOG_IN}.")
    return token


def check_complete(folder: Path) -> None:
    """Raise BadInputError unless `folder` holds config.json, README.md and every safetensors file its index names."""
    if not folder.is_dir():
        raise BadInputError(f"there is no folder {folder} to push: give the output_dir of a finished run.")
    wanted = ["config.json", "README.md"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise BadInputError(f"{index} cannot be read: write the folder again before pushing it.") from None
    else:
        wanted += ["model.safetensors"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise BadInputError(
            f"{folder} is not a complete model folder, {' and '.join(missing)} not found: push the output_dir of a "
            "finished `hf-prune prune`."
        )


def files_to_upload(folder: Path) -> list[str]:
    """Paths below `folder` (posix, sorted) that a push sends; raises BadInputError for a link to anything else."""
    files: set[Path] = set()
    links: set[Path] = set()
    for parent, directories, names in os.walk(folder):
        directories[:] = [name for name in directories if _published(name)]
        for name in directories + [name for name in names if _published(name)]:
            path = Path(parent, name)
            if path.is_symlink():
                links.add(path)
            elif path.is_file():
                files.add(path)
    for link in sorted(links):
        if link.resolve() not in files:
            raise BadInputError(
                f"{link.relative_to(folder)} in {folder} is a link to something outside of what is pushed: replace it "
                "by a copy or remove it."
            )
    return sorted(path.relative_to(folder).as_posix() for path in files | links)


def _published(name: str) -> bool:
    return name == HIDDEN_BUT_PUBLISHED or not (name.startswith(".") or name == "__pycache__")


def _check_no_token(folder: Path, paths: list[str], token: str) -> None:
    for path in paths:
        file = folder / path
        if file.stat().st_size <= SEARCHED_BYTES and token.encode() in file.read_bytes():
            raise BadInputError(f"{path} in {folder} contains your access token: remove it there before pushing.")


@contextmanager
def _one_sentence(action: str, token: str, if_unreachable: type[HfPruneError]) -> Iterator[None]:
    """Turn what the client raises into one sentence without the token, and without a chained traceback showing it."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explain(error, action, if_unreachable, token) from None


def _explain(error: BaseException, action: str, if_unreachable: type[HfPruneError], token: str) -> HfPruneError:
    while not isinstance(error, HTTPError | ValueError) and error.__cause__ is not None:
        error = error.__cause__  # uploads run in threads, which wrap what went wrong
    text = " ".join(str(error).replace(token, "<token>").split()).rstrip(".")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return BadInputError(f"the Hub does not accept the access token, cannot {action}: {HOW_TO_LOG_IN}.")
        if status == 403:
            return BadInputError(f"the access token may not {action}: use one with write permission for that name.")
        return RunError(f"the Hub answered {status}, cannot {action}: push again later ({text}).")
    if isinstance(error, ValueError):
        return BadInputError(f"the Hub does not take this folder, cannot {action}: {text}.")
    return if_unreachable(
        f"the Hub is not reachable, cannot {action}: check the network and HF_ENDPOINT and push again ({text})."
    )
