"""Draining disks: how a quiesce holds requests back, and knows when those in flight have ended (QEMU: ``bdrv_drained_begin``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        self._drains: list[Drain] = []
        self.closed = False  #: read without a lock by every request
        self.drained: threading.Event | None = None

    def shut(self, drain: Drain, last: float, deadline: float) -> None:
        """Hold new requests back, for *drain*. A thread may shut it again; others wait until it has opened it as often.

        Raises DeadlineExceeded, with the gate as it was, when the thread that holds it stays until *last*.
        """
        mine = threading.get_ident()
        with self._condition:
            if not self._condition.wait_for(lambda: self._holder in (None, mine), max(0.0, last - clock.monotonic())):
                raise DeadlineExceeded(
                    f"disk '{self._disk.name}' is being changed by another thread for more than {deadline:g} s"
                )
            self._holder = mine
            self._drains = [*self._drains, drain]
            self.drained = self.drained or threading.Event()
            self.closed = True

    def open(self, drain: Drain) -> None:
        """Take back the :meth:`shut` of *drain*."""
        with self._condition:
            self._drains = [known for known in self._drains if known is not drain]
            if not self._drains:
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

        It may when the thread holds the gate itself, or when it is nested in a request or lease, of any disk that is
        drained together with this one, that the holder is waiting for.
        """
        mine = threading.get_ident()
        if self._holder == mine:
            return True
        return any(
            entry[3] == mine
            for drain in self._drains
            for disk in drain.disks
            for known, entry in list(disk.in_flight.items())
            if known != number
        )


class Drain:
    """One draining of several *disks* together. All gates are shut first, then all requests are waited for."""

    def __init__(self, disks: Sequence[GraphUser]) -> None:
        self.disks = tuple(disks)

    @contextmanager
    def held(self, deadline: float) -> Iterator[None]:
        """Hold the disks drained while the ``with`` block runs.

        Raises DeadlineExceeded, with all gates as they were, when requests of other threads stay longer than
        *deadline* seconds.
        """
        last = clock.monotonic() + deadline
        shut: list[GraphUser] = []
        try:
            for disk in self.disks:
                disk.gate.shut(self, last, deadline)
                shut.append(disk)
            self._wait(last, deadline)
            yield
        finally:
            for disk in reversed(shut):
                disk.gate.open(self)

    def _wait(self, last: float, deadline: float) -> None:
        """Wait until no request of another thread is in flight in any of the disks."""
        mine = threading.get_ident()
        while True:
            busy = None
            for disk in self.disks:
                others = [entry for entry in list(disk.in_flight.values()) if entry[3] != mine]
                if others:
                    busy = disk, others
                    break
            if busy is None:
                return
            disk, others = busy
            drained = disk.gate.drained
            assert drained is not None  # the gate is shut
            # An event that was set between the test and the wait is seen at once; one that is lost costs 50 ms.
            drained.wait(0.05)
            drained.clear()
            if clock.monotonic() > last:
                names = ", ".join(f"{entry[0]} at {entry[1]:#x}+{entry[2]:#x}" for entry in others[:5])
                raise DeadlineExceeded(
                    f"requests of disk '{disk.name}' did not end in {deadline:g} s: {names}",
                    hint="A device below does not answer, or a request is suspended.",
                )
