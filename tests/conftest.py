"""Shared fixtures: tiny random models of every supported family, and the optional folder of real assets."""

import os
from pathlib import Path

# Before transformers or huggingface_hub are imported: both read these at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_PRUNE_QUIET", "1")
# And before torch is: the suite runs in one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of real models and texts beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of real assets at {SHARED.name}/ beside the checkout")
    return SHARED
