"""Writes that need space, many at once: in columns, with the reservation for them.

A *row* is what is written as one: bytes inside one allocation unit whose copy units no other row touches. Requests for one copy unit share a row, in
their order, whether they adjoin or not; where a unit has parts (subclusters), several rows may lie in one unit.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from cowhand.core.buffers import Buffer

if TYPE_CHECKING:
    from cowhand.block.node.node import Child

#: in ``hosts``: this row is not reserved, or not any more
SINGLY = -1


class UnitWrites:
    """The rows, one of each column: guest ``offsets`` and ``lengths`` in bytes, and ``buffers``.

    ``numbers`` says of an allocation unit (guest offset by ``unit``) which row of it is the newest, ``shared`` of a row which one of its unit came
    before it. ``mixed`` has the requests, (offset, bytes), of a row that are not one behind the other.

    A driver's ``reserve_writes`` sets ``child``, ``hosts`` (where a row's first byte goes, or SINGLY), ``bare`` (whether nothing has to be put around
    a row, since old and new read as zeroes there) and ``state``, its own. ``busy`` are units that somebody else owns.
    """

    __slots__ = (
        "bare", "buffers", "busy", "child", "hosts", "lengths", "mixed", "numbers", "offsets", "part", "shared", "state", "unit", "waiters",
    )  # fmt: skip

    child: Child
    state: Any

    def __init__(self, unit: int, part: int) -> None:
        self.unit = unit
        self.part = part  #: bytes of a copy unit
        self.numbers: dict[int, int] = {}
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.buffers: list[list[Buffer]] = []
        self.shared: dict[int, int] = {}
        self.mixed: dict[int, list[tuple[int, Buffer]]] = {}
        self.busy: AbstractSet[int] = frozenset()
        self.hosts: list[int] = []
        self.bare: list[bool] = []
        self.waiters: list[Any] = []

    def add(self, number: int, offset: int, what: Buffer) -> None:
        """Add a row for *what*, which lies in unit *number*."""
        self.numbers[number] = len(self.offsets)
        self.offsets.append(offset)
        self.lengths.append(len(what))
        self.buffers.append([what])

    def join(self, number: int, offset: int, what: Buffer) -> bool:
        """Add *what* to a row of unit *number*, which has some, or beside them; False when it would make one of two rows."""
        row = self.numbers[number]
        if not self.shared and self.offsets[row] + self.lengths[row] == offset and row not in self.mixed:
            # Behind the only row of its unit: what is asked for most.
            self.buffers[row].append(what)
            self.lengths[row] += len(what)
            return True
        part, end = self.part, offset + len(what)
        first, last = offset // part, (end - 1) // part
        met = -1
        newest = row
        while row >= 0:
            begin, stop = self.offsets[row], self.offsets[row] + self.lengths[row]
            if stop == offset or (begin // part <= last and first <= (stop - 1) // part):
                if met >= 0:
                    return False
                met = row
            row = self.shared.get(row, -1)
        if met < 0:
            self.shared[len(self.offsets)] = newest
            self.add(number, offset, what)
            return True
        begin = self.offsets[met]
        stop = begin + self.lengths[met]
        if stop == offset and met not in self.mixed:
            self.buffers[met].append(what)
            self.lengths[met] += len(what)
            return True
        self.mixed.setdefault(met, self.requests(met)).append((offset, what))
        self.offsets[met] = min(begin, offset)
        self.lengths[met] = max(stop, end) - self.offsets[met]
        return True

    def drop(self, row: int) -> None:
        """Have *row* not be linked."""
        self.hosts[row] = SINGLY

    def requests(self, row: int) -> list[tuple[int, Buffer]]:
        """Return (offset, bytes) of the requests that *row* is made of, in their order."""
        mixed = self.mixed.get(row)
        if mixed is not None:
            return mixed
        out = []
        at = self.offsets[row]
        for buffer in self.buffers[row]:
            out.append((at, buffer))
            at += len(buffer)
        return out

    def span(self, row: int) -> tuple[int, int]:
        """Return [begin, end) of the copy units that *row* touches."""
        part, offset = self.part, self.offsets[row]
        return offset - offset % part, -(-(offset + self.lengths[row]) // part) * part

    def touches(self, offset: int, end: int) -> bool:
        """Tell whether ``[offset, end)`` lies, even in part, in a copy unit of some row."""
        units = range(offset // self.unit, (end - 1) // self.unit + 1)
        for number in units if len(units) < len(self.numbers) else self.numbers:
            row = self.numbers.get(number, -1)
            while row >= 0:
                begin, stop = self.span(row)
                if begin < end and offset < stop:
                    return True
                row = self.shared.get(row, -1)
        return False

    def owned(self, begin: int, end: int) -> int | None:
        """Return where the first unit begins that belongs to these writes, of those in ``[begin, end)``; None where none does."""
        unit = self.unit
        if end - begin == unit:
            return begin if begin // unit in self.numbers else None
        found = [number for number in self.numbers if begin <= number * unit < end]
        return min(found) * unit if found else None
