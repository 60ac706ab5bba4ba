"""Pushing a finished folder and reading it back: the real client, real HTTP, fresh processes."""

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from server import Hub
from transformers import LlamaForCausalLM
from visits import OTHER_TOKEN, TOKEN, TOKEN_IDS, Visit, command_line

from hf_prune.cli import main
from hf_prune.errors import BadInputError, RunError
from hf_prune.hub.push import _one_sentence, check_complete, files_to_upload, push_folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the hidden one that model_folder holds."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop(".env", None)
    return files


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def structured_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with fewer neurons, groups and heads, as `hf-prune prune` leaves it."""
    place = tmp_path_factory.mktemp("structured")
    (place / "dense").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, place / "dense")
    options = {"method": "intra_fusion", "fusion": "none", "units": ["mlp", "attention"], "sparsity": 0.4}
    recipe = {"model_name_or_path": str(place / "dense"), "output_dir": str(place / "out"), **options}
    (place / "recipe.yaml").write_text(json.dumps({**recipe, "eval_efficiency": False}))
    assert main(["prune", "--config", str(place / "recipe.yaml")]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def published(
    visit: Callable[..., Visit], model_folder: Path, resharded_folder: Path, structured_folder: Path
) -> Visit:
    return visit("publish", TOKEN, model_folder, resharded_folder, structured_folder)


@pytest.fixture(scope="module")
def refusals(
    visit: Callable[..., Visit], published: Visit, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list]:
    broken = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("broken") / "model"))
    (broken / "README.md").write_text("---\ntags: [one, two\n---\n")
    leaking = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("leaking") / "model"))
    (leaking / "notes.txt").write_text(f"logged in with {TOKEN}")
    return visit("refusals", model_folder, TOKEN, OTHER_TOKEN, broken, leaking).returned


def test_what_arrives_is_the_folder_and_nothing_else(published: Visit, hub: Hub, model_folder: Path) -> None:
    for repo_id in ("me/model", "me/hidden"):
        assert hub.files(repo_id) == contents(model_folder)
    assert published.returned["siblings"] == sorted(contents(model_folder))
    assert ".eval_results/wikitext.yaml" in hub.files("me/model")
    assert published.returned["urls"] == [f"{hub.url}/me/model"] * 2 + [f"{hub.url}/me/hidden"]


def test_card_metadata_reads_as_pushed(published: Visit) -> None:
    assert published.returned["card"] == {
        "base_model": "me/dense",
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["pruning", "hf_prune"],
    }


def test_repositories_are_private_only_if_asked(published: Visit, hub: Hub) -> None:
    assert published.returned["private"] == [False, True]
    assert not hub.repos["models", "me/model"].private and hub.repos["models", "me/hidden"].private


def test_pushing_again_makes_no_commit_and_says_so(published: Visit, hub: Hub) -> None:
    assert [commit.title for commit in hub.repos["models", "me/model"].commits] == [
        "initial commit",
        "Upload a model pruned with hf_prune",
    ]
    assert f"{hub.url}/me/model already holds exactly this folder: nothing to upload." in published.stderr


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(
    published: Visit, hub: Hub, model_folder: Path, resharded_folder: Path
) -> None:
    files = hub.files("me/twice")
    weights = {path: content for path, content in files.items() if "safetensors" in path}
    assert len(weights) > 2 and "model.safetensors" not in weights
    assert weights == {path: content for path, content in contents(resharded_folder).items() if "safetensors" in path}
    assert files["tokenizer.json"] == (model_folder / "tokenizer.json").read_bytes()


def test_large_files_went_in_parts_and_came_out_whole(published: Visit, hub: Hub, model_folder: Path) -> None:
    weights = (model_folder / "model.safetensors").read_bytes()
    place = f"/lfs/{hashlib.sha256(weights).hexdigest()}"
    sent = {request.path for request in hub.requests if request.method == "PUT" and request.path.startswith(place)}
    assert len(weights) > 4 * hub.chunk_bytes
    assert sent == {f"{place}/{part}" for part in range(1, -(-len(weights) // hub.chunk_bytes) + 1)}
    assert hub.files("me/model")["model.safetensors"] == weights
    assert not hub.parts


def test_a_fresh_machine_loads_the_models_with_identical_logits(
    published: Visit,
    visit: Callable[..., Visit],
    expected_logits: torch.Tensor,
    structured_folder: Path,
    hub: Hub,
    tmp_path: Path,
) -> None:
    seen = visit("read_models", TOKEN, json.dumps(TOKEN_IDS), tmp_path / "logits.safetensors").returned
    logits = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(logits["me/model"], expected_logits) and torch.equal(logits["me/hidden"], expected_logits)
    assert (seen["words"], seen["exists"]) == ("once upon a time there was a model", [True, False])
    # The last one that was loaded is smaller: of 64 neurons, 2 groups and 4 heads (9,280 parameters a block) 40 % went.
    before = LlamaForCausalLM.from_pretrained(structured_folder)
    with torch.no_grad():
        assert torch.equal(logits["me/structured"], before(torch.tensor([TOKEN_IDS])).logits)
    config = json.loads(hub.files("me/structured")["config.json"])
    kept = [config[key] for key in ("intermediate_size", "num_key_value_heads", "num_attention_heads", "head_dim")]
    assert kept == [41, 1, 2, 8] and seen["plain"]
    blocks = 4 * (3 * 32 * 41 + 2 * 32 * 16 + 2 * 32 * 8 + 2 * 32)
    assert seen["parameters"] == blocks + (2 * config["vocab_size"] + 1) * 32
    card = " ".join(hub.files("me/structured")["README.md"].decode().split())
    assert "41 of 64 neurons an MLP, 1 of 2 key-value groups, 2 of 4 query heads" in card
    assert f"| Parameters of the blocks | {4 * 9280:,} | {blocks:,} |" in card
    assert "| Neurons an MLP | 64 | 41 |" in card


def test_a_private_repository_shows_itself_to_its_owner_alone(refusals: dict[str, list]) -> None:
    nobody, another, owner = refusals["reading what is private"]
    assert (nobody, another, owner) == (401, 404, True)


@pytest.mark.parametrize(
    ("what", "exit_code", "words"),
    [
        ("no token", 2, "hf auth login"),
        ("wrong token", 2, "HF_TOKEN"),
        ("token with a line break", 2, "characters"),
        ("not a repository of theirs", 2, "write permission"),
        ("not a namespace of theirs", 2, "write permission"),
        ("private, but it is public", 2, "me/model exists and is public"),
        ("broken card", 2, "README.md"),
        ("token in a file", 2, "notes.txt"),
    ],
)
def test_refused_in_one_sentence(refusals: dict[str, list], what: str, exit_code: int, words: str) -> None:
    code, message = refusals[what]
    assert code == exit_code
    assert words in message and message.endswith(".") and "\n" not in message


def test_a_refused_push_leaves_the_hub_as_it_was(refusals: dict[str, list], hub: Hub, model_folder: Path) -> None:
    assert hub.files("me/model") == contents(model_folder)
    assert not hub.repos["models", "me/model"].private
    assert ("models", "me/new") not in hub.repos and ("models", "me/leaking") not in hub.repos
    assert hub.files("me/broken") == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"HF_ENDPOINT": "http://127.0.0.1:9"}, "not reachable"), ({"HF_HUB_OFFLINE": "1"}, "unset it")],
)
def test_without_a_hub_the_error_is_one_sentence(
    visit: Callable[..., Visit], model_folder: Path, settings: dict[str, str], words: str
) -> None:
    done = visit("push_once", model_folder, TOKEN, **settings)
    code, message = done.returned
    assert code == 2 and words in message and "\n" not in message
    assert done.stderr == ""


def test_the_command_line_pushes(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = command_line("push", model_folder, "--repo_id", "me/by-hand", "--private", HF_TOKEN=TOKEN, **here)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/by-hand" in " ".join(done.stdout.split())
    assert hub.repos["models", "me/by-hand"].private and hub.files("me/by-hand") == contents(model_folder)
    assert TOKEN not in done.stdout + done.stderr


def test_inspect_tells_the_sizes_of_a_model_on_the_hub(hub: Hub, structured_folder: Path, tmp_path: Path) -> None:
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    assert command_line("push", structured_folder, "--repo_id", "me/narrow", **here).returncode == 0
    told = [
        command_line("inspect", place, "--plot", tmp_path / "plot.png", **here).stdout.replace(str(place), "")
        for place in (structured_folder, "me/narrow")
    ]
    before, after = (
        json.loads((structured_folder / "prune_plan.json").read_text())["structure"][key] for key in ("before", "after")
    )
    assert f"Neurons an MLP {before['width']} {after['width']}" in " ".join(told[1].split())
    assert told[0] == told[1]


def test_the_command_line_shows_one_line_and_never_the_token(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    wrong = TOKEN[::-1]
    for extra in ([], ["--debug"]):
        done = command_line(
            "push",
            model_folder,
            "--repo_id",
            "me/model",
            *extra,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path),
            HF_TOKEN=wrong,
        )
        assert ("Traceback" in done.stderr) == bool(extra)
        assert extra or (done.returncode == 2 and len(done.stderr.splitlines()) == 1)
        assert wrong not in done.stdout + done.stderr


def test_an_upload_that_breaks_is_a_failed_run(visit: Callable[..., Visit], model_folder: Path) -> None:
    with Hub({TOKEN: "me"}, faults={"/lfs/.*": 507}) as full:
        code, message = visit("push_once", model_folder, TOKEN, HF_ENDPOINT=full.url).returned
        assert code == 1 and "507" in message and "push again" in message and "\n" not in message
        assert full.files("me/model") == {}


def test_no_error_repeats_the_token() -> None:
    with pytest.raises(BadInputError, match="cannot send <token>") as caught, _one_sentence("push", TOKEN, RunError):
        raise ValueError(f"cannot send {TOKEN}")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_the_token_is_nowhere(
    published: Visit, refusals: dict[str, list], done: list[Visit], homes: Path, hub: Hub, model_folder: Path
) -> None:
    assert any(request.authorized for request in hub.requests)
    login_files = {"token", "stored_tokens"}  # where `hf auth login` keeps it
    logged_in = [path for path in homes.rglob("*") if path.name in login_files]
    assert logged_in and all(TOKEN in path.read_text() for path in logged_in)

    everywhere = [path for path in homes.rglob("*") if path.is_file() and path.name not in login_files]
    everywhere += [path for path in model_folder.rglob("*") if path.is_file()]
    streams = [stream.encode() for visit in done for stream in (visit.stdout, visit.stderr)]
    assert any(b"https" in stream or b"http" in stream for stream in streams)  # debug logging was on
    for content in [*streams, *hub.stored(), *(path.read_bytes() for path in everywhere)]:
        for token in (TOKEN, OTHER_TOKEN, TOKEN[9:]):
            assert token.encode() not in content


@pytest.mark.parametrize(
    "repo_id", ["", "me/", "a/b/c", "me/my model", "me/..", "me/model.git", "https://hf.co/me/model"]
)
def test_malformed_repository_ids(model_folder: Path, repo_id: str) -> None:
    with pytest.raises(BadInputError, match="name/model"):
        push_folder(model_folder, repo_id, token="hf_unused")


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_an_incomplete_folder_is_refused_by_name(folder: Path, name: str) -> None:
    check_complete(folder)
    (folder / name).unlink()
    with pytest.raises(BadInputError, match=name):
        push_folder(folder, "me/model", token="hf_unused")


def test_every_file_of_a_sharded_model_must_be_there(resharded_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resharded_folder, tmp_path / "model"))
    check_complete(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadInputError, match=shard.name):
        check_complete(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(BadInputError, match="cannot be read"):
        check_complete(folder)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="there is no folder"):
        push_folder(tmp_path / "nothing", "me/model", token="hf_unused")


def test_hidden_files_and_caches_stay_behind(folder: Path) -> None:
    before = files_to_upload(folder)
    assert before == sorted(contents(folder)) and ".eval_results/wikitext.yaml" in before
    for name in (".git/config", ".cache/huggingface/x", "__pycache__/a.pyc", "plots/.DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for others")
    assert files_to_upload(folder) == before


@pytest.mark.parametrize("target", ["../secret.txt", "../secrets", ".env", "nothing"])
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, target: str) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    (folder.parent / "secrets").mkdir()
    (folder / "link").symlink_to(target)
    with pytest.raises(BadInputError, match=r"link in .* is a link to something outside"):
        push_folder(folder, "me/model", token="hf_unused")


def test_a_link_inside_the_folder_is_fine(folder: Path) -> None:
    (folder / "COPY.md").symlink_to("README.md")
    assert "COPY.md" in files_to_upload(folder)
