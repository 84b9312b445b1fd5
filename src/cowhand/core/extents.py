"""Extents: what is data, what reads as zeroes, what is allocated where, and where its bytes lie.

One form serves map, measure, compare, convert, NBD block status, bitmaps, pictures and plans. A batch is columns
(``array`` with the buffer protocol, so that numpy is only a view of it), its rows ascending, adjoining and merged.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

#: The bytes are stored (not implied), and must be read to be known.
DATA = 0x01
#: The bytes read as zeroes.
ZERO = 0x02
#: This layer decides the content; without it a backing file or the end of the disk does.
ALLOCATED = 0x04
#: ``host`` is valid: a byte offset in ``node``.
OFFSET = 0x08
#: Stored compressed: no byte of it can be addressed.
COMPRESSED = 0x10
#: Stored encoded (encrypted): the length is the same, the bytes are not.
ENCODED = 0x20
#: May be overwritten where it lies: nobody else refers to it.
IN_PLACE = 0x40
#: The child may know of holes in it (preallocated metadata): ask it.
RECURSE = 0x80
#: The extent ends at the end of the disk.
EOF = 0x100

#: The value of ``host`` where OFFSET is not set.
NO_HOST = (1 << 64) - 1
#: A batch holds at most so many rows.
MAX_ROWS = 65536


class Extent(NamedTuple):
    """One row: bytes ``[start, start + length)`` of the disk."""

    start: int
    length: int
    flags: int
    host: int
    node: Any
    depth: int

    @property
    def end(self) -> int:
        return self.start + self.length


class ExtentBatch:
    """Adjoining extents as columns. Not thread-safe while it is being filled; a filled batch is never changed.

    ``start``, ``length``, ``host``: ``array('Q')`` in bytes; ``flags``, ``depth``: ``array('H')``; ``node``: ``array('H')`` of indexes into
    ``nodes``, the nodes that ``host`` lies in. Depth 0 is the layer that was asked, 1 its backing file, and so on.
    """

    __slots__ = ("depth", "flags", "host", "length", "node", "nodes", "start")

    def __init__(self) -> None:
        self.start = array("Q")
        self.length = array("Q")
        self.host = array("Q")
        self.flags = array("H")
        self.node = array("H")
        self.depth = array("H")
        self.nodes: list[Any] = []

    def __len__(self) -> int:
        return len(self.start)

    @property
    def begin(self) -> int:
        """The first byte that the batch tells of."""
        return self.start[0] if self.start else 0

    @property
    def end(self) -> int:
        """The byte after the last one that the batch tells of."""
        return self.start[-1] + self.length[-1] if self.start else 0

    @property
    def full(self) -> bool:
        """True when no further row may be added."""
        return len(self.start) >= MAX_ROWS

    def index_of(self, node: Any) -> int:
        """Return the column value that stands for *node*, adding it to ``nodes`` when new."""
        for index, known in enumerate(self.nodes):
            if known is node:
                return index
        self.nodes.append(node)
        return len(self.nodes) - 1

    def add(self, start: int, length: int, flags: int, host: int = NO_HOST, node: Any = None, depth: int = 0) -> None:
        """Append an extent, merged into the last row when both say the same and their host bytes adjoin."""
        index = self.index_of(node)
        if (
            self.start
            and self.flags[-1] == flags
            and (not flags & OFFSET or self.host[-1] + self.length[-1] == host)
            and self.depth[-1] == depth
            and self.node[-1] == index
            and self.start[-1] + self.length[-1] == start
        ):
            self.length[-1] += length
            return
        self.start.append(start)
        self.length.append(length)
        self.flags.append(flags)
        self.host.append(host if flags & OFFSET else NO_HOST)
        self.node.append(index)
        self.depth.append(depth)

    def extend(
        self, start: array[int], length: array[int], flags: array[int], host: array[int], node: array[int]
    ) -> None:
        """Append many rows of depth 0, given as columns, adjoining and merged among each other; the first may go on with what is there."""
        if not start:
            return
        self.add(start[0], length[0], flags[0], host[0], self.nodes[node[0]])
        self.start += start[1:]
        self.length += length[1:]
        self.flags += flags[1:]
        self.host += host[1:]
        self.node += node[1:]
        self.depth.frombytes(bytes(2 * len(start) - 2))

    def cut(self, count: int) -> None:
        """Leave the first *count* rows."""
        for name in ("start", "length", "flags", "host", "node", "depth"):
            del getattr(self, name)[count:]

    def __iter__(self) -> Iterator[Extent]:
        nodes = self.nodes
        for start, length, flags, host, node, depth in zip(
            self.start, self.length, self.flags, self.host, self.node, self.depth, strict=True
        ):
            yield Extent(start, length, flags, host, nodes[node], depth)

    def total(self, flag: int) -> int:
        """Return the number of bytes in rows that have all bits of *flag*."""
        return sum(length for length, flags in zip(self.length, self.flags, strict=True) if flags & flag == flag)


def merged(batches: Iterable[ExtentBatch], mask: int = 0xFFFF) -> Iterator[Extent]:
    """Yield the extents of *batches* in order, joined across batches where they say the same under *mask* of flags.

    With OFFSET outside of *mask* the host offsets are not looked at (and are NO_HOST).
    """
    begin = end = place = following = depth = 0
    kind, owner = -1, None
    for batch in batches:
        nodes = batch.nodes
        columns = zip(batch.start, batch.length, batch.flags, batch.host, batch.node, batch.depth, strict=True)
        for start, length, flags, host, node, level in columns:
            flags &= mask
            if flags == kind and start == end and level == depth and nodes[node] is owner:
                if not flags & OFFSET or host == following:
                    end += length
                    following += length
                    continue
            if kind >= 0:
                yield Extent(begin, end - begin, kind, place, owner, depth)
            begin, end, kind, depth, owner = start, start + length, flags, level, nodes[node]
            place = host if flags & OFFSET else NO_HOST
            following = host + length
    if kind >= 0:
        yield Extent(begin, end - begin, kind, place, owner, depth)


def by_content(batches: Iterable[ExtentBatch]) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, length, reads_as_zero), merged: all that a reader of bytes needs to know."""
    start = length = 0
    zero = False
    for batch in batches:
        for row_start, row_length, flags in zip(batch.start, batch.length, batch.flags, strict=True):
            row_zero = bool(flags & ZERO)
            if length and row_zero == zero and start + length == row_start:
                length += row_length
                continue
            if length:
                yield start, length, zero
            start, length, zero = row_start, row_length, row_zero
    if length:
        yield start, length, zero
