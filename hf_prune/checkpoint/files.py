"""Files that are there whole or not at all, also after a power cut, and digests of what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

_CHUNK = 1 << 22


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to; once the body has succeeded it is on the disk and takes the name."""
    # A name of its own: another process may be writing the same file.
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        yield part
        _to_disk(part)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # The name as well: a rename may reach the disk later than what it names.
    _to_disk(file.parent)


def write_whole(file: Path, text: str) -> None:
    """A text file that is there whole or not at all; its folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as part:
        part.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(file: Path) -> str:
    """32 hexadecimal digits of a file's bytes: XXH3, which finds damage at the speed of memory and no malice."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """32 hexadecimal digits of a tensor's dtype, shape and bits."""
    values = tensor.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{values.dtype}{list(values.shape)}".encode())
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """32 hexadecimal digits of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())
