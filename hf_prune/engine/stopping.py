"""When to stop: a signal, a length of time, a time of day. A run that can be gone on with is stopped between blocks."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from hf_prune.clock import next_time, parse_duration
from hf_prune.errors import Stopped

SIGNAL = "SIGTERM"
logger = logging.getLogger(__name__)


class StopRequest:
    """SIGTERM, a time limit and a deadline, watched from now on.

    Args:
        time_limit: as in `6h`; none unless given.
        deadline: as in `06:00`, the next one; none unless given.
    """

    def __init__(self, time_limit: str | None = None, deadline: str | None = None) -> None:
        now = datetime.now()
        ends = []
        if time_limit is not None:
            ends.append((now.timestamp() + parse_duration("time_limit", time_limit), f"time_limit {time_limit}"))
        if deadline is not None:
            ends.append((next_time("deadline", deadline, now).timestamp(), f"deadline {deadline}"))
        self.end = min(ends) if ends else None
        self.signalled = False
        self._deferred = False
        self._before: Any = None

    def reason(self, needed: float = 0.0) -> str | None:
        """Why to stop now, None for no reason: a signal has come, or the end comes within `needed` seconds."""
        if self.signalled:
            return SIGNAL
        return self.end[1] if self.end is not None and time.time() + needed >= self.end[0] else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM raises Stopped at once, or is noted where it is deferred; a second one ends the process."""
        if threading.current_thread() is not threading.main_thread():
            # Python hands signals to the main thread alone.
            yield
            return
        self._before = signal.signal(signal.SIGTERM, self._stop)
        try:
            yield
        finally:
            self.listen_no_more()

    def listen_no_more(self) -> None:
        """From now on SIGTERM does what it did before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _stop(self, number: int, frame: Any) -> None:
        self.signalled = True
        if not self._deferred:
            self._raise()
        logger.info("SIGTERM: stopping after this block; another one stops at once.")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _raise(self) -> None:
        raise Stopped(f"stopped by {SIGNAL}; start the same run again to go on.")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for somebody to ask for a reason, at the latest for the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signalled:
            self._raise()
