"""A complete prune_report.json, fresh for every test."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "example_report.json").read_text(encoding="utf-8"))
