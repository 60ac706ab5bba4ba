"""Shared fixtures: the optional folder of real assets, and a real, small disk."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Before transformers or huggingface_hub are imported: both read these at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_PRUNE_QUIET", "1")
# And before torch is: the suite runs in one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, they would leave the other processes with nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _shared_imports() -> Iterator[None]:
    """Folders that the tests' own processes save are verified by forks of one that has done the imports."""
    from verifier import Verifier

    verifier = Verifier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_prune.checkpoint.verify.in_fresh_process", verifier)
        yield
    verifier.close()


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of real models and texts beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of real assets at {SHARED.name}/ beside the checkout")
    return SHARED


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
