"""What a salvaging copy could not read: collected as ranges, since one bad cluster, or a disk that is gone, is thousands of sectors."""

from __future__ import annotations

import threading

from cowhand.copy.engine.source import SECTOR
from cowhand.core.errors import CowhandError

#: A range of bytes: offset and length.
Range = tuple[int, int]


class Unreadable:
    """Collects sectors, each counted once however often it was tried. Thread-safe; ``reason`` is the first error."""

    def __init__(self) -> None:
        self.reason: CowhandError | None = None
        self._begins: dict[int, int] = {}  # of ranges, by their ends: each worker lengthens its own
        self._lock = threading.Lock()

    def add(self, offset: int, error: CowhandError) -> None:
        """Note that the sector at *offset*, or its rest, could not be read."""
        begin = offset // SECTOR * SECTOR
        with self._lock:
            if self.reason is None:
                self.reason = error
            self._begins[begin + SECTOR] = min(
                begin, self._begins.pop(begin, begin), self._begins.get(begin + SECTOR, begin)
            )

    def ranges(self, size: int) -> tuple[Range, ...]:
        """Return the ranges in order, apart from one another, cut at the *size* of the disk."""
        merged: list[list[int]] = []
        with self._lock:
            found = sorted((begin, end) for end, begin in self._begins.items())
        for begin, end in found:
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        return tuple((begin, min(end, size) - begin) for begin, end in merged if begin < size)
