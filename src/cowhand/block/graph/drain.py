"""The gate of a disk: how a quiesce holds requests back, and knows when those in flight have ended."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cowhand.core import clock
from cowhand.core.errors import DeadlineExceeded

if TYPE_CHECKING:
    from cowhand.block.graph.users import GraphUser


class Gate:
    """Lets requests in, or holds them back while one thread holds it shut. One for each disk."""

    def __init__(self, disk: GraphUser) -> None:
        self._disk = disk
        self._condition = threading.Condition()
        self._holder: int | None = None
        self._depth = 0
        self.closed = False  #: read without a lock by every request
        self.drained: threading.Event | None = None

    def shut(self, deadline: float) -> None:
        """Hold new requests back and wait for those in flight. A thread may shut it again; others wait until it has opened it as often.

        Raises DeadlineExceeded, with the gate as it was, when some requests, or the thread that holds it, stay longer than *deadline* seconds.
        """
        mine = threading.get_ident()
        last = clock.monotonic() + deadline
        with self._condition:
            if not self._condition.wait_for(lambda: self._holder in (None, mine), deadline):
                raise DeadlineExceeded(
                    f"disk '{self._disk.name}' is being changed by another thread for more than {deadline:g} s"
                )
            self._holder = mine
            self._depth += 1
            drained = self.drained = self.drained or threading.Event()
            self.closed = True
        try:
            self._wait_drained(drained, mine, last, deadline)
        except BaseException:
            self.open()
            raise

    def _wait_drained(self, drained: threading.Event, mine: int, last: float, deadline: float) -> None:
        """Wait until no request of another thread than *mine* is in flight; raises DeadlineExceeded after *last*."""
        while True:
            # An event that was set between the test and the wait is seen at once; one that is lost costs 50 ms.
            others = [entry for entry in list(self._disk.in_flight.values()) if entry[3] != mine]
            if not others:
                return
            drained.wait(0.05)
            drained.clear()
            if clock.monotonic() > last:
                names = ", ".join(f"{entry[0]} at {entry[1]:#x}+{entry[2]:#x}" for entry in others[:5])
                raise DeadlineExceeded(
                    f"requests of disk '{self._disk.name}' did not end in {deadline:g} s: {names}",
                    hint="A device below does not answer, or a request is suspended.",
                )

    def open(self) -> None:
        """Take back one :meth:`shut`."""
        with self._condition:
            self._depth -= 1
            if self._depth == 0:
                self._holder = None
                self.closed = False
                self.drained = None
                self._condition.notify_all()

    def wait_open(self) -> None:
        """Wait until the gate is open."""
        with self._condition:
            self._condition.wait_for(lambda: not self.closed)

    def passes(self, number: int) -> bool:
        """Tell whether request *number* of the calling thread may enter a shut gate.

        It may when the thread holds the gate itself, or when it is nested in a request or lease that the holder is waiting for.
        """
        mine = threading.get_ident()
        if self._holder == mine:
            return True
        return any(entry[3] == mine for known, entry in list(self._disk.in_flight.items()) if known != number)
