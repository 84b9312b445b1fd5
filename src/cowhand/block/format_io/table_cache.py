"""Metadata tables in memory, and the order in which their changes reach the file.

A cache holds tables (big-endian bytes, as on disk) by a key. Changes are remembered by pages. Nothing is written by an eviction: only clean
tables leave the cache, and :class:`cowhand.block.format_io.table_cache.WriteBack` writes the dirty ones in stages, with a barrier between two stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cowhand.core.buffers import Buffer

PAGE_BITS = 12
PAGE = 1 << PAGE_BITS


class Table:
    """One table: ``data`` as on disk, ``host`` its byte offset there, ``dirty`` a bit for each page, ``fresh`` if nothing on disk refers to it."""

    __slots__ = ("data", "dirty", "fresh", "host", "uncounted", "writing")

    def __init__(self, data: bytearray, host: int, *, fresh: bool = False) -> None:
        self.data = data
        self.host = host
        self.dirty = 0
        self.fresh = fresh
        self.uncounted = False  #: its own cluster's reference count may not be in the file yet (lazy reference counts)
        self.writing = 0  #: write-backs under way that hold copies of its pages

    def touch(self, start: int, end: int) -> None:
        """Remember that bytes ``[start, end)`` changed."""
        first, last = start // PAGE, (end - 1) // PAGE
        self.dirty |= ((1 << (last - first + 1)) - 1) << first

    def touch_all(self) -> None:
        self.touch(0, len(self.data))


class Piece(NamedTuple):
    """A copy of a table's dirty pages ``mask``, on its way to the file."""

    table: Table
    mask: int
    fresh: bool
    writes: list[tuple[int, Buffer]]  #: (host offset, bytes)


def _pages(table: Table) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in bytes of the runs of dirty pages."""
    mask, position, size = table.dirty, 0, len(table.data)
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        position += skip
        count = (~mask & (mask + 1)).bit_length() - 1
        yield position * PAGE, min((position + count) * PAGE, size)
        mask >>= count
        position += count


class TableCache:
    """Tables by key (an index into the table above). All methods but plain look-ups in ``tables`` need the node's allocation lock.

    ``tables`` may be read without a lock: a look-up gives a table that was right when the look-up happened. ``limit`` is in bytes and is
    kept by dropping clean tables, oldest first; dirty ones stay until they are written.
    """

    def __init__(self, limit: int) -> None:
        self.tables: dict[int, Table] = {}
        self.limit = limit
        self.held = 0
        self.dirty: dict[int, Table] = {}  #: by id: tables with dirty pages, also such as were dropped from ``tables``

    def put(self, key: int, table: Table) -> None:
        """Add or replace a table."""
        old = self.tables.get(key)
        if old is not None:
            self.held -= len(old.data)
        self.tables[key] = table
        self.held += len(table.data)
        if table.dirty:
            self.dirty[id(table)] = table

    def drop(self, key: int) -> None:
        """Forget a table, changes included (it was freed, or is stale)."""
        table = self.tables.pop(key, None)
        if table is not None:
            self.held -= len(table.data)
            self.dirty.pop(id(table), None)

    def touch(self, table: Table, start: int, end: int) -> None:
        """Remember a change of ``table.data[start:end]``."""
        table.touch(start, end)
        self.dirty[id(table)] = table

    def clear(self) -> None:
        """Forget everything. Only when nothing is dirty, or on purpose."""
        self.tables.clear()
        self.dirty.clear()
        self.held = 0

    def trim(self) -> bool:
        """Drop clean tables until the limit is kept; tell whether dirty ones stand in the way."""
        if self.held <= self.limit:
            return False
        for key, table in list(self.tables.items()):
            if not table.dirty and not table.writing:
                del self.tables[key]
                self.held -= len(table.data)
                if self.held <= self.limit:
                    return False
        return True

    def collect(self, *, held: bool = False) -> list[Piece]:
        """Copy all dirty pages and call them clean; :meth:`restore` takes that back, :meth:`written` ends it.

        *held*: the caller keeps the lock until they are written, so that nothing changes and no copy is needed.
        """
        out = []
        for table in self.dirty.values():
            view = memoryview(table.data)
            pages = [(table.host + start, view[start:end]) for start, end in _pages(table)]
            writes: list[tuple[int, Buffer]] = [*pages] if held else [(host, bytes(data)) for host, data in pages]
            out.append(Piece(table, table.dirty, table.fresh, writes))
            table.dirty = 0
            table.writing += 1
        self.dirty.clear()
        return out

    def restore(self, pieces: list[Piece]) -> None:
        """The write-back of *pieces* failed: their pages are dirty again."""
        for piece in pieces:
            piece.table.writing -= 1
            piece.table.dirty |= piece.mask
            self.dirty[id(piece.table)] = piece.table

    def written(self, pieces: list[Piece]) -> None:
        """The write-back of *pieces* has ended."""
        for piece in pieces:
            piece.table.writing -= 1
            if piece.fresh:
                piece.table.fresh = False
