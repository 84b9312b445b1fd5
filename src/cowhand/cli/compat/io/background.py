"""Requests in the background: each on a thread of its own, its result shown by the main thread when that waits for something.

QEMU lets such a request run until it first waits before it takes the next command. So starting one here waits until it has ended, is suspended by a
breakpoint, or, when it is held up by another one, for a short time: then the order of requests is that of the commands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from cowhand.core import clock

#: Seconds that a request may hold back the next command.
_SETTLE = 0.05
#: Seconds between two looks at a condition that nobody tells of.
_POLL = 0.02


class Background:
    """The requests that were started and not yet waited for. All but the work itself happens in the main thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._stops = 0  #: requests that ended or were suspended, ever
        self._ended: list[Callable[[], None]] = []

    @property
    def busy(self) -> bool:
        """Whether a request is under way, or its result was not shown yet."""
        return bool(self._running or self._ended)

    def start(self, work: Callable[[], Callable[[], None]]) -> None:
        """Let *work* run on a thread; what it returns is called in the main thread and shows the result."""

        def run() -> None:
            show = work()
            with self._changed:
                self._ended.append(show)
                self._running -= 1
                self._stops += 1
                self._changed.notify_all()

        with self._changed:
            self._running += 1
            stops = self._stops
        threading.Thread(target=run, name="cowhand-io request", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._stops != stops, _SETTLE)

    def suspended(self) -> None:
        """Learn, from its own thread, that a request was suspended."""
        with self._changed:
            self._stops += 1
            self._changed.notify_all()

    def show(self) -> None:
        """Show the results that have come."""
        while True:
            with self._changed:
                if not self._ended:
                    return
                result = self._ended.pop(0)
            result()

    def wait(self, seconds: float | None = None, *, until: Callable[[], bool] | None = None) -> None:
        """Show results as they come: for *seconds*, or until *until* says so, or until there is nothing to wait for."""
        last = None if seconds is None else clock.monotonic() + seconds
        while True:
            self.show()
            if until is not None and until():
                return
            with self._changed:
                left = None if last is None else last - clock.monotonic()
                if self._ended:
                    continue
                if until is None and (not self._running if left is None else left <= 0):
                    return
                self._changed.wait(_POLL if until is not None else left)
