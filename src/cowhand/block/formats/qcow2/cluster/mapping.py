"""From guest to host offsets: the L1 and L2 tables of qcow2 (QEMU ``docs/interop/qcow2``, "Cluster mapping").

:meth:`Mapping.run` needs no lock when the L2 table is cached: it looks at 8 bytes of a table at once, which the interpreter does not
interrupt. An entry is only changed with the allocation lock held, and what it named before stays untouched until every request that may
have seen it has ended (quarantine).
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from operator import sub
from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Table, TableCache
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import PACKED, PLACED, ZEROES, Meanings
from cowhand.block.node.node import READ, WRITE_REQUEST
from cowhand.core.errors import CowhandError, ImageCorrupt
from cowhand.core.extents import (
    ALLOCATED,
    COMPRESSED,
    DATA,
    ENCODED,
    IN_PLACE,
    MAX_ROWS,
    NO_HOST,
    OFFSET,
    RECURSE,
    ZERO,
    ExtentBatch,
)

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.ondisk.l2_ordered import OrderedTables
    from cowhand.block.node.node import Child, Request

#: For ``Mapping.end`` and ``Mapping.l1_lost``: nothing is missing.
_NO_END = 1 << 63

#: Bytes of L2 tables kept in memory, as QEMU's default: at 64 KiB clusters this covers 256 GiB.
CACHE_LIMIT = 32 << 20

#: L2 tables that are read for one batch: a batch takes its time for them, and tells of less than was asked.
_TABLES_IN_BATCH = 4096
#: L1 entries that are compared at once.
_L1_STRETCH = 1 << 13

_PLACED = DATA | OFFSET
NORMAL = DATA | ALLOCATED | OFFSET
COMPRESSED_CLUSTER = DATA | ALLOCATED | COMPRESSED
#: An entry that cannot be followed: who reads it is told so by ``decode``, and who writes by ``reserve``, in other words.
DAMAGED = DATA | ENCODED | ALLOCATED
ZERO_PLAIN = ZERO | ALLOCATED
ZERO_HOST = ZERO | ALLOCATED | OFFSET

_unpack = L.U64.unpack_from
_HOST = L.L2_OFFSET_MASK
_COMPRESSED = L.ENTRY_COMPRESSED
#: what an extended entry whose every subcluster holds data says of them
_ALL_DATA = L.U64.pack(0xFFFFFFFF)
#: Tables in one batch above which numpy, whose import takes 100 ms, finds the runs; and rows found without it since the image was opened.
_MANY_TABLES = 256
_MANY_ROWS = 1 << 16


class Mapping:
    """The active L1 table and a cache of L2 tables.

    What a table names and the file does not have is damage, except that the file may end inside its last cluster of data: the rest of that one reads
    as zeroes. An entry that the file does not have counts as one that names the last of all possible clusters. ``end`` is the host offset of data up
    to which clusters are known to be there, always a multiple of a cluster; ``l1_lost`` the first L1 entry that the file does not have.
    """

    def __init__(self, node: Qcow2Node, l1: bytearray) -> None:
        self.node = node
        self.cluster_bits = node.header.cluster_bits
        self.cluster_size = 1 << self.cluster_bits
        self.table_bits = self.cluster_bits - 3  #: an L2 table has 2**table_bits entries
        self.table_shift = self.cluster_bits + self.table_bits
        self.entries = 1 << self.table_bits
        self.l1 = Table(l1, node.header.l1_offset)
        self.cache = TableCache(CACHE_LIMIT)
        self.tables = self.cache.tables
        self._in_order: OrderedTables | None = None
        self._looped = 0
        self._comparing = threading.Lock()
        self._within = self.cluster_size - 1
        self._bad = 0  #: bits of an entry that must be clear
        self.learn_version()
        self._nowhere = L.L2_OFFSET_MASK & -self.cluster_size  #: where entries lead that the file does not have
        self.l1_lost = self.end = _NO_END
        if not node.cut_reads_as_zeroes:
            size = node.file.node.size
            self.end = 0
            self.learn_end()
            if self.l1.host + len(l1) > size:
                self.l1_lost = max(0, size - self.l1.host) // L.ENTRY_SIZE

    def learn_version(self) -> None:
        """Learn which bits of an entry must be clear: in version 2 there is no flag for zeroes."""
        self._bad = self._within & L.L2_OFFSET_MASK | (L.ENTRY_ZERO if self.node.header.version < 3 else 0)

    # -- the end of the file

    def learn_end(self) -> None:
        """Ask how long the file of the data is now: what another thread or process wrote behind its former end is there."""
        size = self.node.data_child.node.size
        self.end = max(self.end, -(-size // self.cluster_size) * self.cluster_size)

    def restart_at_end(self) -> None:
        """Learn the end of the data anew: it lies in another file than it seemed."""
        if self.end != _NO_END:
            self.end = 0
            self.learn_end()

    def present(self, host: int, length: int) -> int:
        """Return how many of the *length* bytes of data at *host*, which reach behind ``end``, are there after all."""
        self.learn_end()
        return min(length, max(0, self.end - host))

    @property
    def loses_l1(self) -> bool:
        """Whether the file does not have all of the L1 table."""
        return self.l1_lost != _NO_END

    def first_lost(self) -> int | None:
        """Return the first byte of guest data that tables name behind the end of its file, None where all is there; for a data file. Lock is held."""
        offset, end = min(self.end, self.node.size), self.node.size
        while offset < end:
            index = offset >> self.table_shift
            stop = min(end, (index + 1) << self.table_shift)
            if self.l1_entry(index) & L.L1_OFFSET_MASK:
                self.table(index)  # in the cache it is found without the lock
            else:
                stop = max(stop, self.skip_missing(index, end))
            batch = self.batch(offset, stop - offset, holes=False)
            for row in batch:
                if row.flags == DAMAGED:
                    return row.start
            offset = batch.end
        return None

    # -- L1

    def l1_entry(self, index: int) -> int:
        """Return L1 entry *index*, 0 beyond the table's end."""
        at = index * 8
        entry: int = _unpack(self.l1.data, at)[0] if at + 8 <= len(self.l1.data) else 0
        if index >= self.l1_lost and at < len(self.l1.data):
            return self._nowhere
        return entry

    def l1_entries(self) -> Iterator[int]:
        """Yield all L1 entries."""
        for (entry,) in L.U64.iter_unpack(bytes(self.l1.data[: len(self.l1.data) // 8 * 8])):
            yield entry

    def set_l1(self, index: int, entry: int) -> None:
        """Change an L1 entry in memory; it reaches the file after the table that it names. Lock is held."""
        L.U64.pack_into(self.l1.data, index * 8, entry)
        self.l1.touch(index * 8, index * 8 + 8)

    def l2_offset(self, index: int) -> int:
        """Return the host offset of L2 table *index*, or 0. Raises ImageCorrupt for an impossible one."""
        entry = self.l1_entry(index)
        offset = entry & L.L1_OFFSET_MASK
        if offset & self._within:
            raise self.node.mark_corrupt(
                f"L2 table offset {offset:#x} unaligned (L1 index: {L.c_hex(index)})", offset=self.l1.host + index * 8
            )
        return offset

    # -- L2

    def table(self, index: int) -> Table | None:
        """Return L2 table *index*, read when it is not cached; None when there is none. Lock is held."""
        found = self.tables.get(index)
        if found is not None:
            return found
        offset = self.l2_offset(index)
        if not offset:
            return None
        self.node.fire("l2_load")
        data = bytearray(self.cluster_size)
        present = self.node.file.node.size - offset if self.end != _NO_END else self.cluster_size
        if present > 0:
            self.node.file.read_into(offset, data)
        if present < self.cluster_size:
            self._fill_lost(data, present)
        table = Table(data, offset)
        self.cache.trim()
        self.cache.put(index, table)
        return table

    def _fill_lost(self, data: bytearray, present: int) -> None:
        """Have those entries of an L2 table lead nowhere of which the file has not got all bytes; *present*: what it has of the table."""
        width = self.cluster_size // self.entries
        first = max(0, present) // width * width
        data[first:] = self._lost_entry() * ((len(data) - first) // width)

    def _lost_entry(self) -> bytes:
        return L.U64.pack(self._nowhere)

    def find(self, index: int) -> Table | None:
        """The same without the lock held: takes it only when the table has to be read."""
        found = self.tables.get(index)
        if found is None and self.l1_entry(index) & L.L1_OFFSET_MASK:
            with self.node.lock:
                found = self.table(index)
        return found

    def read_damaged(self, offset: int) -> CowhandError:
        """Return the error for reading guest *offset*, of whose entry :meth:`run` said that it cannot be followed."""
        table = self.find(offset >> self.table_shift)
        at = (offset >> self.cluster_bits & (self.entries - 1)) << 3
        assert table is not None
        entry = _unpack(table.data, at)[0]
        return self.lost(entry, table, at, offset) or self.bad_entry(entry, table, at)

    def lost(self, entry: int, table: Table, at: int, guest: int) -> CowhandError | None:
        """Return the error for reading *guest* where *entry*, at byte *at* of *table*, leads behind the end of the file; None where it does not."""
        host, node = entry & L.L2_OFFSET_MASK, self.node
        if host < self.end or entry & (self._bad | _COMPRESSED):
            return None
        if host != self._nowhere:
            return lost_data(node.data_child, host, guest)
        what, where = f"the L2 table at {table.host:#x}", table.host + at
        if table.host == self._nowhere:
            what, where = (
                f"the L1 table at {self.l1.host:#x}",
                self.l1.host + (guest >> self.table_shift) * L.ENTRY_SIZE,
            )
        return cut_off(node.file, where, f"the entry of {what} for", guest)

    def require(self, entry: int, table: Table, at: int, guest: int) -> None:
        """Raise ImageCorrupt where *entry*, of data that is to be written in place, leads behind the end of the file."""
        if entry & L.L2_OFFSET_MASK >= self.end:
            self.learn_end()
            lost = self.lost(entry, table, at, guest)
            if lost is not None:
                raise lost

    def bad_entry(self, entry: int, table: Table, at: int) -> CowhandError:
        """Return the error for an L2 entry that cannot be followed: its host offset is not that of a cluster, or its version has no such entries."""
        offset = entry & L.L2_OFFSET_MASK
        if entry & self._bad & L.ENTRY_ZERO:
            place = f"(L2 offset: {table.host:#x}, L2 index: {L.c_hex(at // 8)})"
            return self.node.mark_corrupt(f"Zero cluster entry found in pre-v3 image {place}", offset=table.host + at)
        return self.node.mark_corrupt(
            f"Cluster allocation offset {offset:#x} unaligned (L2 offset: {table.host:#x}, L2 index: {L.c_hex(at // 8)})",
            offset=table.host + at,
        )

    def run(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        """Return (length, flags, child, host) of what begins at guest *offset*, at most *length* bytes and one L2 table long."""
        index = offset >> self.table_shift
        found = self.tables.get(index)
        if found is None:
            found = self.find(index)
            if found is None:
                return min(length, ((index + 1) << self.table_shift) - offset), 0, None, NO_HOST
        data = found.data
        at = (offset >> self.cluster_bits & (self.entries - 1)) << 3
        entry = _unpack(data, at)[0]
        within = offset & self._within
        have = self.cluster_size - within
        node = self.node
        if entry & 0x4000000000000001 == 0 and entry:
            host = entry & _HOST
            if entry & self._bad or not host:
                if host:
                    return min(have, length), DAMAGED, node.file, at
                return self._same(data, at, entry, have, length, 0, NO_HOST)
            if host >= self.end and not self.present(host, 1):
                return min(have, length), DAMAGED, node.file, at
            flags = NORMAL
            if entry >> 63 and host >> self.cluster_bits not in node.metadata_clusters:
                flags = NORMAL | IN_PLACE
            if have >= length:
                return length, flags, node.data_child, host + within
            return self._contiguous(data, at, entry, have, length, flags, host + within)
        if have > length:
            have = length
        if not entry:
            return self._same(data, at, entry, have, length, 0, NO_HOST)
        if entry & _COMPRESSED:
            return have, COMPRESSED_CLUSTER, node.file, entry
        if entry & _HOST:
            if entry & self._bad:
                return have, DAMAGED, node.file, at
            return have, ZERO_HOST, node.data_child, (entry & _HOST) + within
        if entry & self._bad:
            return have, DAMAGED, node.file, at
        return self._same(data, at, entry, have, length, ZERO_PLAIN, NO_HOST)

    def places(self, batch: Sequence[Request]) -> tuple[int, list[int]] | None:
        """Return what :meth:`cowhand.block.format_io.format_node.FormatNode.places` does; the same cases as the first of :meth:`run`, in one loop."""
        node = self.node
        lane = node.data_child.lane
        kind = batch[0][0]
        writing = kind != READ
        if lane is None or lane.lane_fd < 0 or kind > WRITE_REQUEST or (writing and not node.may_write_directly):
            return None
        get, unpack, metadata = self.tables.get, _unpack, node.metadata_clusters
        shift, bits, last, within_mask, size = (
            self.table_shift,
            self.cluster_bits,
            self.entries - 1,
            self._within,
            self.cluster_size,
        )
        unfit = _COMPRESSED | L.ENTRY_ZERO | self._bad
        file_end = self.end
        hosts: list[int] = []
        add = hosts.append
        end = -1
        for each, offset, what in batch:
            if each != kind:
                return None
            found = get(offset >> shift)
            host = -1
            if found is not None:
                entry = unpack(found.data, (offset >> bits & last) << 3)[0]
                place = entry & _HOST
                if (
                    not entry & unfit
                    and place
                    and not (writing and (not entry >> 63 or place >= file_end or place >> bits in metadata))
                ):
                    within = offset & within_mask
                    length = len(what)
                    if within + length <= size:
                        host = place + within
                        if host == end:
                            return None  # neighbours are done together
                        end = host + length
                elif not entry and writing and 0 < len(what) <= size - (offset & within_mask):
                    host = -2
            add(host)
        return lane.lane_fd, hosts

    def _contiguous(
        self, data: bytearray, at: int, entry: int, have: int, length: int, flags: int, host: int
    ) -> tuple[int, int, Child | None, int]:
        metadata = self.node.metadata_clusters
        size = self.cluster_size
        end = self.cluster_size
        while have < length:
            at += 8
            entry += size
            if at >= end or _unpack(data, at)[0] != entry:
                break
            if flags & IN_PLACE and (entry & L.L2_OFFSET_MASK) >> self.cluster_bits in metadata:
                break
            have += size
        have = min(have, length)
        if host + have > self.end:
            have = self.present(host, have)
        return have, flags, self.node.data_child, host

    def _same(
        self, data: bytearray, at: int, entry: int, have: int, length: int, flags: int, host: int
    ) -> tuple[int, int, Child | None, int]:
        """Extend a run over entries equal to *entry* (unallocated, or plain zero)."""
        if have < length:
            wanted = -(-(length - have) >> self.cluster_bits)
            piece = data[at + 8 : at + 8 + wanted * 8]
            pattern = L.U64.pack(entry)
            if piece == pattern * (len(piece) // 8):
                have += len(piece) // 8 << self.cluster_bits
            else:
                position = 0
                while piece[position : position + 8] == pattern:
                    position += 8
                have += position // 8 << self.cluster_bits
        return min(have, length), flags, None, host

    # -- many entries at once

    def batch(self, offset: int, length: int, *, holes: bool = True) -> ExtentBatch:
        """Describe this layer from *offset* on as merged rows; *holes*: say where the file may know of them in what is data here."""
        out = ExtentBatch()
        end = offset + length
        node = self.node
        recurse = RECURSE if holes and node.metadata_preallocated else 0
        many = self._many_tables(length)
        tables = 0
        alike: tuple[int, int] | None = (
            None  #: (L1 entry, flags) of a table whose entries are all alike, and name no place
        )
        while offset < end and len(out) < MAX_ROWS and tables < _TABLES_IN_BATCH:
            index = offset >> self.table_shift
            entry = self.l1_entry(index)
            host = entry & L.L1_OFFSET_MASK
            if index not in self.tables and (not host or (host >= node.file.node.size and not host & self._within)):
                # There is no table, or it lies behind the end of the file.
                if host == self._nowhere:
                    stop = min(end, max(index + 1, len(self.l1.data) // 8) << self.table_shift)
                else:
                    stop = self._skip_l1(index, end, entry) if host else self.skip_missing(index, end)
                lost = host and self.end != _NO_END
                out.add(offset, stop - offset, DAMAGED if lost else 0, node=node if lost else None)
                offset = stop
                tables += bool(host)
                continue
            if alike is not None and alike[0] == entry:
                # Millions of L1 entries may name one table: what is all alike is told at once.
                stop = self._skip_l1(index, end, entry)
                out.add(offset, stop - offset, alike[1], node=node if alike[1] else None)
                offset = stop
                continue
            stop = min(end, (index + 1) << self.table_shift)
            table = self.find(index)
            if table is None:
                continue  # it was taken away meanwhile
            tables += 1
            # A copy of the part that is asked for, so that the rows of one table are of one moment.
            first = offset >> self.cluster_bits & (self.entries - 1)
            last = ((stop - 1) >> self.cluster_bits & (self.entries - 1)) + 1
            if last - first == self.entries and not offset & self._within:
                place = self._one_run(table)
                if place:
                    out.add(offset, stop - offset, NORMAL | recurse, place, node.data_child.node)
                    offset = stop
                    continue
            entries = self.words(table, first, last)
            alike = self._alike(entries, entry) if self.l1_entry(index + 1) == entry else None
            known = len(out)
            numpy = many or self._looped >= _MANY_ROWS
            offset = self._rows(out, entries, table, first, offset, stop, recurse, numpy)
            if not numpy:
                self._looped += len(out) - known
            if self._reaches_behind(out, max(0, known - 1)):
                self._split_at_end(out, max(0, known - 1))
                offset = out.end
        return out

    def _reaches_behind(self, out: ExtentBatch, first: int) -> bool:
        """Tell whether rows of *out* from *first* on name data behind the end of the file."""
        # A look at whole columns first, which costs little for each row.
        places = set(out.host[first:])
        places.discard(NO_HOST)
        if self.end == _NO_END or not places or max(places) + max(out.length[first:]) <= self.end:
            return False
        columns = zip(out.host[first:], out.length[first:], out.flags[first:], strict=True)
        furthest = max((host + length for host, length, flags in columns if flags & _PLACED == _PLACED), default=0)
        if furthest <= self.end:
            return False
        self.learn_end()
        return furthest > self.end

    def _split_at_end(self, out: ExtentBatch, first: int) -> None:
        """Call what rows of *out* from *first* on name behind the end of the file damaged; what finds no room is left off."""
        rows = list(
            zip(
                out.start[first:],
                out.length[first:],
                out.flags[first:],
                out.host[first:],
                out.node[first:],
                strict=True,
            )
        )
        out.cut(first)
        for start, length, flags, host, number in rows:
            inside = length if flags & _PLACED != _PLACED else min(length, max(0, self.end - host))
            if inside and not out.full:
                out.add(start, inside, flags, host, out.nodes[number])
            if inside < length and not out.full:
                out.add(start + inside, length - inside, DAMAGED, node=self.node)
            if out.full:
                break

    def _one_run(self, table: Table) -> int:
        """Return where the data of a table lies whose every cluster holds data, one behind the other; 0 where that is not plain to see."""
        data, width = table.data, self.cluster_size // self.entries
        first, last = _unpack(data)[0], _unpack(data, len(data) - width)[0]
        place: int = first & _HOST
        if place + (self.entries << self.cluster_bits) > self.end and self.present(place, 1 << 62) < (
            self.entries << self.cluster_bits
        ):
            return 0
        if not place or last - first != (self.entries - 1) * self.cluster_size or self.node.external:
            return 0
        if first & (_COMPRESSED | L.ENTRY_ZERO | self._bad) or (width > 8 and data[8:width] != _ALL_DATA):
            return 0
        if not self._comparing.acquire(blocking=False):
            return 0  # somebody else compares just now: there are other ways
        try:
            if self._in_order is None:
                from cowhand.block.formats.qcow2.ondisk.l2_ordered import OrderedTables

                self._in_order = OrderedTables(self.cluster_bits, width // 8)
            return place if self._in_order.matches(bytes(data)) else 0
        finally:
            self._comparing.release()

    def words(self, table: Table, first: int, last: int) -> array[int]:
        """Return what *table* says of its entries ``[first, last)``, as native integers."""
        words = array("Q", bytes(table.data[first * 8 : last * 8]))
        words.byteswap()
        return words

    def _many_tables(self, length: int) -> bool:
        """Tell whether *length* bytes of the disk have so many tables that importing numpy pays."""
        return length >> self.table_shift > _MANY_TABLES and self.l1.data.count(0x80) > _MANY_TABLES

    def _alike(self, entries: array[int], l1_entry: int) -> tuple[int, int] | None:
        """Return (*l1_entry*, flags) when the whole table *entries* is unallocated, plain zeroes, or compressed."""
        first = entries[0]
        named = first & (L.L2_OFFSET_MASK | self._bad)
        if len(entries) != self.entries or (named and not first & L.ENTRY_COMPRESSED):
            return None
        if entries.count(first) != len(entries):
            return None
        return l1_entry, COMPRESSED_CLUSTER if first & L.ENTRY_COMPRESSED else ZERO_PLAIN if first & L.ENTRY_ZERO else 0

    def _skip_l1(self, index: int, end: int, entry: int) -> int:
        """Return where the run of L1 entries that equal *entry* ends, or *end*."""
        limit = min(len(self.l1.data) // 8, -(-end >> self.table_shift), self.l1_lost)
        pattern = L.U64.pack(entry)
        step = 1
        while index < limit:
            piece = self.l1.data[index * 8 : (index + step) * 8]
            if piece != pattern * (len(piece) // 8):
                if step == 1:
                    break
                step = 1
                continue
            index += len(piece) // 8
            step = min(step * 4, _L1_STRETCH)
        return min(end, index << self.table_shift)

    def skip_missing(self, index: int, end: int) -> int:
        """Return where the next L2 table begins, or *end*."""
        limit = min(len(self.l1.data) // 8, -(-end >> self.table_shift))
        if self.l1_lost < limit:
            limit, end = self.l1_lost, min(end, self.l1_lost << self.table_shift)
        tables = self.l1.data
        index += 1
        while index < limit and not _unpack(tables, index * 8)[0] & L.L1_OFFSET_MASK:
            piece = tables[index * 8 : (index + _L1_STRETCH) * 8]
            empty = len(piece) - len(piece.lstrip(b"\0"))
            index += max(1, empty // 8)
        return min(end, index << self.table_shift) if index < limit else end

    def _rows(
        self,
        out: ExtentBatch,
        entries: array[int],
        table: Table,
        first: int,
        offset: int,
        stop: int,
        recurse: int,
        numpy: bool,
    ) -> int:
        """Add the rows of *entries*, from entry *first* of *table* on, to *out*, by *numpy* or by a loop; return up to where."""
        if numpy:
            done = self._rows_by_numpy(out, entries, offset, stop, recurse)
            if done is not None:
                return done
        size = self.cluster_size
        mask = L.L2_OFFSET_MASK | L.ENTRY_ZERO | L.ENTRY_COMPRESSED
        heads: list[int] = []
        kinds: list[int] = []
        hosts: list[int] = []
        position, count = 0, len(entries)
        while position < count:
            value = entries[position] & mask
            heads.append(position << self.cluster_bits)
            begin = position
            position += 1
            if value & L.ENTRY_COMPRESSED:
                while position < count and entries[position] & L.ENTRY_COMPRESSED:
                    position += 1
                kinds.append(PACKED)
                hosts.append(0)
            elif value & L.L2_OFFSET_MASK:
                if value & self._bad:
                    raise self.bad_entry(entries[begin], table, (first + begin) * 8)
                if position < count and entries[position] & mask == value + size:
                    position = ramp(entries, begin, size)
                kinds.append(PLACED | value & ZEROES)
                hosts.append(value & L.L2_OFFSET_MASK)
            else:
                if value & self._bad:
                    raise self.bad_entry(entries[begin], table, (first + begin) * 8)
                while position < count and entries[position] & mask == value:
                    position += 1
                kinds.append(value)
                hosts.append(0)
        base = offset - (offset & self._within)
        return add_rows(out, (heads, kinds, hosts), self._meanings(recurse), base, offset, stop)

    def _rows_by_numpy(self, out: ExtentBatch, entries: array[int], offset: int, stop: int, recurse: int) -> int | None:
        """Add the rows of *entries*; return up to where, None when an entry cannot be followed (who comes next tells of it)."""
        # Imported by the first table that is not one run: often there is none.
        from cowhand.block.formats.qcow2.ondisk import l2_entries_numpy

        found = l2_entries_numpy.runs(entries, self.cluster_size, self._bad)
        if found is None:
            return None
        base = offset - (offset & self._within)
        return l2_entries_numpy.add_rows(out, found, self._meanings(recurse), base, offset, stop)

    def _meanings(self, recurse: int) -> Meanings:
        place, node = self.node.data_child.node, self.node
        return {
            0: (0, None),
            ZEROES: (ZERO_PLAIN, node),
            PLACED: (NORMAL | recurse, place),
            PLACED | ZEROES: (ZERO_HOST, place),
            PACKED: (COMPRESSED_CLUSTER, node),
        }


def lost_data(child: Child, host: int, guest: int) -> CowhandError:
    """Return the error for reading *guest*, whose cluster at *host* of *child* the file does not have."""
    return cut_off(child, host, f"the cluster at {host:#x} that holds", guest)


def cut_off(child: Child, place: int, what: str, guest: int) -> CowhandError:
    """Return the error for reading *guest* where a file ends before *place* in *what* is needed for that. The image is not marked as damaged."""
    return ImageCorrupt(
        f"the file was cut off: it ends at {child.node.size:#x}, before {what} the disk's bytes at {guest:#x}", qemu="Input/output error",
        path=child.node.filename, offset=place, hint="Look at it with check; convert --salvage copies what is left.",
    )  # fmt: skip


def add_rows(
    out: ExtentBatch,
    found: tuple[list[int], list[int], list[int]],
    meanings: Meanings,
    base: int,
    offset: int,
    stop: int,
) -> int:
    """Append what *found* tells of ``[offset, stop)``, as far as *out* has room; return up to where.

    *found*: for each of the runs, which adjoin, the first byte counted from guest *base*, its kind and host offset. The last ends at *stop*.
    """
    heads, kinds, hosts = found
    low = bisect_right(heads, offset - base) - 1
    high = min(bisect_left(heads, stop - base), low + MAX_ROWS - len(out))
    if low >= high:
        return offset
    end = stop if high == len(heads) else min(stop, base + heads[high])
    starts = array("Q", [base + head for head in heads[low:high]])
    places = array("Q", hosts[low:high])
    cut = max(0, offset - starts[0])
    starts[0] += cut
    places[0] += cut
    lengths = array("Q", map(sub, starts[1:], starts))
    lengths.append(end - starts[-1])
    flags_of = {what: flags for what, (flags, _) in meanings.items()}
    flags = array("H", [flags_of[what] for what in kinds[low:high]])
    nodes_of = {what: out.index_of(meanings[what][1]) for what in set(kinds[low:high])}
    nodes = array("H", [nodes_of[what] for what in kinds[low:high]])
    if placeless := {what for what in nodes_of if not flags_of[what] & OFFSET}:
        pairs = zip(kinds[low:high], places, strict=True)
        places = array("Q", [NO_HOST if what in placeless else place for what, place in pairs])
    out.extend(starts, lengths, flags, places, nodes)
    return end


def ramp(entries: array[int], begin: int, step: int) -> int:
    """Return the index after the longest run from *begin* in which each entry is the one before it plus *step* (flags equal)."""
    mask = L.L2_OFFSET_MASK | L.ENTRY_ZERO | L.ENTRY_COMPRESSED
    value = entries[begin] & mask
    copied = entries[begin] & L.COPIED
    position, count = begin + 1, len(entries)
    # Compare ever longer stretches at once: a whole table in ten comparisons.
    stretch = 8
    while position < count:
        take = min(stretch, count - position)
        start = value + (position - begin) * step
        if entries[position : position + take] == array(
            "Q", range(start | copied, (start | copied) + take * step, step)
        ):
            position += take
            stretch *= 4
            continue
        while position < count and entries[position] & mask == value + (position - begin) * step:
            position += 1
            if entries[position - 1] & L.COPIED != copied:
                copied ^= L.COPIED
                break
        else:
            break
        stretch = 8
    return position
