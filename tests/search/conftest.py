"""Searches of candidates that cost nothing: what is left of their time is the disk's."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("optuna")

from sqlalchemy import event
from sqlalchemy.engine import Engine


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """A killed process loses nothing by this, only a machine without power would."""

    def relax(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)
