"""Local files of text: which kinds can be read, and which of a folder's files make up a split."""

import re
from pathlib import Path
from typing import Any

from hf_prune.data.problems import RecipeKeys
from hf_prune.errors import BadInputError

# File suffix (without a trailing .gz) -> the `datasets` reader and its options.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".txt": ("text", {"keep_linebreaks": True}),
    ".raw": ("text", {"keep_linebreaks": True}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
}
# The words in a file's or subfolder's name that tell its split, as `datasets` reads them.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def suffix(path: Path) -> str:
    """`.json` for both `a.json` and `a.json.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or suffix(Path(name)) in READERS


def local_files(path: Path, split: str | None, keys: RecipeKeys) -> tuple[list[Path], str]:
    """The data files behind an existing path, all of one kind and none of them empty, and the split that they are."""
    known = ", ".join(READERS)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if suffix(file) in READERS]
    if not files:
        raise BadInputError(f"{keys.name}: {path} is no file of text that can be read, nor holds one; give {known}.")
    by_split = _files_by_split(path, files) if path.is_dir() else {"train": files}
    chosen = choose_split(path.resolve().name, list(by_split), split, keys)
    files = by_split[chosen]
    kinds = sorted({READERS[suffix(file)][0] for file in files})
    if len(kinds) > 1:
        raise BadInputError(f"{keys.name}: {path} mixes {' and '.join(kinds)} files; keep one kind or name one file.")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise BadInputError(f"{keys.name}: {path} is empty; give a file that holds text.")
    return files, chosen


def choose_split(source: str, available: list[str], split: str | None, keys: RecipeKeys) -> str:
    """The split asked for, else the only one, else the usual one for this use of the text."""
    if split is not None:
        if split in available:
            return split
        raise BadInputError(f"{keys.split}: {source} has no split {split!r}; choose one of {', '.join(available)}.")
    usual = available if len(available) == 1 else [name for name in keys.default_splits if name in available]
    if not usual:
        raise BadInputError(f"{keys.split}: {source} has several splits; choose one of {', '.join(available)}.")
    return usual[0]


def _files_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that a name tells (train-0.parquet, test/a.jsonl), or all as train where none does."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = set(re.split(r"[\W_\d]+", str(file.relative_to(folder)).lower()))
        for name in (name for name, spellings in SPLIT_WORDS.items() if words & spellings):
            by_split.setdefault(name, []).append(file)
    return by_split or {"train": files}
