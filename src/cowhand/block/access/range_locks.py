"""Locks on ranges of bytes, for filters that must do several things to a range as if they were one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RangeLocks:
    """Ranges that are held; whoever wants one that overlaps waits. Held over I/O to nodes below, never over that to nodes above."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: list[tuple[int, int]] = []

    @contextmanager
    def hold(self, offset: int, length: int) -> Iterator[None]:
        """Hold ``[offset, offset + length)`` for the length of the ``with`` block. One thread holds one range at a time."""
        mine = (offset, offset + length)
        with self._changed:
            self._changed.wait_for(lambda: not any(begin < mine[1] and mine[0] < end for begin, end in self._held))
            self._held.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                self._changed.notify_all()
