"""Tiny random models and a real, small disk."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """family -> a fresh random causal language model without a single zero, in eval mode."""

    def build(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        model = tiny.tiny_model(family, dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # biases start at zero
                parameter.add_(torch.where(parameter == 0, 0.01, 0.0).to(dtype))
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> object:
    """A byte-level tokenizer with a chat template."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable]:
    """(size, options) -> context manager with the folder of a fresh tmpfs; skips where mounting is not allowed."""

    @contextmanager
    def mounted(size: str, options: str = "rw") -> Iterator[Path]:
        folder = tmp_path / f"disk-{size}-{options}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(folder)]
        try:
            mount = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if mount.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {mount.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    return mounted
