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
# One stop may come as several signals: `timeout` signals its child and then the whole group, a batch system every
# process of a job. Only what comes so many seconds later is another one.
_ONE_STOP = 5.0
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
        self._signalled_at: float | None = None
        self._deferred = False
        self._before: Any = None

    @property
    def signalled(self) -> bool:
        """Whether SIGTERM has come."""
        return self._signalled_at is not None

    def reason(self, needed: float = 0.0) -> str | None:
        """Why to stop now, None for no reason: a signal has come, or the end comes within `needed` seconds."""
        if self.signalled:
            return SIGNAL
        return self.end[1] if self.end is not None and time.time() + needed >= self.end[0] else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM raises Stopped at once, or is noted where it is deferred; a later one ends the process.

        One that whoever started this process has had it hold back is taken now.
        """
        if threading.current_thread() is not threading.main_thread():
            # Python hands signals to the main thread alone.
            yield
            return
        self._before = signal.signal(signal.SIGTERM, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            # The rest of the signals that are one stop would end the process on its way out.
            if not self.signalled:
                self.listen_no_more()

    def listen_no_more(self) -> None:
        """From now on SIGTERM does what it did before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def stop_no_more(self) -> None:
        """From now on SIGTERM comes too late: it is noted, and what is left takes no longer than stopping would."""
        self._deferred = True

    def _stop(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            if not self._deferred:
                self._raise()
            logger.info("SIGTERM: stopping once this is done; another one in %.0f seconds stops at once.", _ONE_STOP)
        elif now - self._signalled_at >= _ONE_STOP:
            self.listen_no_more()
            if signal.getsignal(number) in (None, signal.SIG_IGN, self._stop):
                # Set by no Python code, or deaf: this one ends the process all the same.
                signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

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
