"""Tables of blocks in two levels: a first table names second ones, which name blocks; second tables are made when they are first needed."""

from __future__ import annotations

import sys
from array import array

from cowhand.block.format_io.block_table import BlockTableFormat

#: Entries of a second table that are read as one.
_PAGE = 8192


class TwoLevelFormat(BlockTableFormat):
    """A table of blocks below a first table of byte offsets. Drivers call :meth:`read_first` when they start."""

    word = "Q"
    #: Tables begin at multiples of it.
    table_alignment: int = 1

    def read_first(self, host: int, table_entries: int) -> None:
        """Read the first table at *host*, as much of it as the disk needs; second tables have *table_entries*. Raises InvalidFormat."""
        unit = self.allocation_unit
        self.entry_count = -(-self.size // unit)
        self.entry_limit = 1 << 63
        self.scale, self.base = 1, 0
        self.stride = unit
        self.per_page = min(table_entries, _PAGE)
        self._table_entries, self._first_host = table_entries, host
        self._pages_of_table = table_entries // self.per_page
        count = -(-self.entry_count // table_entries)
        if host + count * 8 > self.file.node.size:
            raise self.wrong(f"the first table of {count} entries at {host:#x} does not end inside the file", host)
        self.first = array("Q", bytes(count * 8))
        self.file.read_into(host, memoryview(self.first).cast("B"))
        if self.big_endian is (sys.byteorder == "little"):
            self.first.byteswap()
        self._new: list[int] = []  #: entries of the first table that changed

    def page_host(self, index: int) -> int | None:
        number, part = divmod(index, self._pages_of_table)
        host = self.first[number]
        if not host:
            return None
        size = self._table_entries * 8
        if host % self.table_alignment or host < self.data_from or host + size > max(self.file.node.size, self._end):
            raise self.wrong(
                f"entry {number} of the first table names {host:#x}, where no table can be",
                self._first_host + number * 8,
            )
        return int(host) + part * self.per_page * 8

    def new_page(self, index: int) -> int:
        number, part = divmod(index, self._pages_of_table)
        if not self.first[number]:
            # In space that reads as zeroes: its other pages are not written.
            unit = self.allocation_unit
            begin = -(-max(self._end, self._handed_out) // unit) * unit
            self._end = self._handed_out = begin + -(-self._table_entries * 8 // unit) * unit
            self.first[number] = begin
            self._new.append(number)
        return int(self.first[number]) + part * self.per_page * 8

    def upper_changes(self) -> list[tuple[int, bytes]]:
        new, self._new = self._new, []
        order = "big" if self.big_endian else "little"
        return [(self._first_host + number * 8, self.first[number].to_bytes(8, order)) for number in new]  # type: ignore[arg-type]

    def tables(self) -> list[int]:
        """Return where the second tables lie."""
        return [host for host in self.first if host]
