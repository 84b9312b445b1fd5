"""Progress, cancellation and deadlines: what a long operation tells, and how it is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cowhand.core import clock
from cowhand.core.errors import Cancelled


class CancelToken:
    """A request to stop, seen by every worker of an operation. Thread-safe; also safe to set from a signal handler."""

    __slots__ = ("_event", "reason")

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = "cancelled"

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask the operation to stop; it ends with Cancelled at its next safe point."""
        self.reason = reason
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled when the token was set."""
        if self._event.is_set():
            raise Cancelled(self.reason)

    def wait(self, seconds: float) -> bool:
        """Sleep for *seconds* or until the token is set; tell whether it is."""
        return self._event.wait(seconds)


class Progress:
    """Counts the bytes of one operation and tells a listener at most ten times a second. Thread-safe.

    ``done`` and ``total`` are in bytes of work. The listener is called from worker threads and must not block.
    """

    INTERVAL = 0.1

    def __init__(self, total: int = 0, listener: Callable[[Progress], None] | None = None) -> None:
        self.total = total
        self.done = 0
        self.started = clock.monotonic()
        self.ended: float | None = None
        self._listener = listener
        self._told = 0.0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Add *count* bytes of finished work."""
        with self._lock:
            self.done += count
            moment = clock.monotonic()
            tell = self._listener is not None and moment - self._told >= self.INTERVAL
            if tell:
                self._told = moment
        if tell and self._listener is not None:
            self._listener(self)

    def finish(self) -> None:
        """Say that the operation has ended; the listener hears once more."""
        self.ended = clock.monotonic()
        if self._listener is not None:
            self._listener(self)

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 1.0 if self.ended is not None else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning, until now or the end."""
        return (self.ended if self.ended is not None else clock.monotonic()) - self.started

    @property
    def rate(self) -> float:
        """Bytes a second since the beginning."""
        return self.done / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Estimated seconds to the end, or None when nothing is known yet."""
        rate = self.rate
        return (self.total - self.done) / rate if rate > 0 and self.total else None
