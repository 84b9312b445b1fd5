"""Extended L2 entries (QEMU ``docs/interop/qcow2``, "Extended L2 Entries"): each cluster has 32 subclusters, and a bitmap says what they are.

Low half of the bitmap: a bit for each subcluster that holds data; high half: one for each that reads as zeroes; neither: the backing file shows
through, whether the cluster has a place or not. Both at once, or data without a place, is damage.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.cluster.mapping import (
    COMPRESSED_CLUSTER,
    DAMAGED,
    NORMAL,
    ZERO_HOST,
    ZERO_PLAIN,
    Mapping,
    ramp,
)
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import Meanings
from cowhand.block.node.node import READ, WRITE_REQUEST
from cowhand.core.errors import CowhandError
from cowhand.core.extents import IN_PLACE, MAX_ROWS, NO_HOST, OFFSET, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.node.node import BlockNode, Child, Request

#: An entry and its bitmap. One call reads or writes both, which the interpreter does not interrupt.
PAIR = struct.Struct(">QQ")
COUNT = 32  #: subclusters of a cluster (specified)
COUNT_BITS = 5
ALL_DATA = 0xFFFFFFFF
ALL_ZERO = 0xFFFFFFFF << 32
_unpack = PAIR.unpack_from
_HOST = L.L2_OFFSET_MASK


def bits(first: int, last: int) -> int:
    """Return the data bits of subclusters ``[first, last)``."""
    return (1 << last) - (1 << first)


class ExtendedMapping(Mapping):
    """The mapping of an image with extended L2 entries, its data inside it or in a data file."""

    def __init__(self, node: Qcow2Node, l1: bytearray) -> None:
        super().__init__(node, l1)
        self.table_bits = self.cluster_bits - 4
        self.table_shift = self.cluster_bits + self.table_bits
        self.entries = 1 << self.table_bits
        self.sub_bits = self.cluster_bits - COUNT_BITS
        #: What :meth:`run` looks at to find data where it can be written; nothing of a data file, whose place may be missing, looks like it.
        self._plain = -1 if node.external else L.COPIED | L.ENTRY_COMPRESSED | self._bad

    def pair(self, table: Table, position: int) -> tuple[int, int]:
        """Return entry *position* of *table* and its bitmap."""
        entry, bitmap = _unpack(table.data, position << 4)
        return entry, bitmap

    def sound(self, entry: int, bitmap: int, guest: int) -> bool:
        """Tell whether an entry, for the cluster at *guest*, can be followed."""
        if entry & L.ENTRY_COMPRESSED:
            return not self.node.external  # a bitmap that says something is for a check to complain about, as in QEMU
        host = entry & L.L2_OFFSET_MASK
        if not host and not (self.node.external and entry & L.COPIED):
            return not bitmap & ALL_DATA
        if (bitmap >> 32) & bitmap or entry & self._bad:
            return False
        return not self.node.external or host in (guest, self._nowhere)

    def placed(self, entry: int) -> bool:
        """Tell whether an entry that can be followed names a place for the cluster as it is."""
        if entry & L.ENTRY_COMPRESSED:
            return False
        return bool(entry & L.L2_OFFSET_MASK) or (self.node.external and bool(entry & L.COPIED))

    def places(self, batch: Sequence[Request]) -> tuple[int, list[int]] | None:
        node = self.node
        lane = node.data_child.lane
        kind = batch[0][0]
        writing = kind != READ
        if node.external or lane is None or lane.lane_fd < 0 or kind > WRITE_REQUEST:
            return None
        if writing and not node.may_write_directly:
            return None
        get, unpack, metadata = self.tables.get, _unpack, node.metadata_clusters
        shift, bits_, sub, last = self.table_shift, self.cluster_bits, self.sub_bits, self.entries - 1
        within_mask, size, unfit = self._within, self.cluster_size, L.ENTRY_COMPRESSED | self._bad
        hosts: list[int] = []
        end, empty = -1, -2 if writing else -1
        file_end = self.end
        for each, offset, what in batch:
            if each != kind:
                return None
            found = get(offset >> shift)
            within, length = offset & within_mask, len(what)
            host = -1
            if found is not None and 0 < length <= size - within:
                entry, bitmap = unpack(found.data, (offset >> bits_ & last) << 4)
                place = entry & _HOST
                if not entry and not bitmap:
                    host = empty
                elif (
                    place
                    and not entry & unfit
                    and not bitmap >> 32 & bitmap
                    and not (writing and (not entry >> 63 or place >= file_end or place >> bits_ in metadata))
                ):
                    wanted = (2 << (within + length - 1 >> sub)) - (1 << (within >> sub))
                    if bitmap & wanted == wanted:
                        host = place + within
                        if host == end:
                            return None  # neighbours are done together
                        end = host + length
                    elif not (bitmap | bitmap >> 32) & wanted:
                        host = empty
            hosts.append(host)
        return lane.lane_fd, hosts

    def run(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        index = offset >> self.table_shift
        found = self.tables.get(index)
        if found is None:
            found = self.find(index)
            if found is None:
                return min(length, ((index + 1) << self.table_shift) - offset), 0, None, NO_HOST
        data, node, size = found.data, self.node, self.cluster_size
        within = offset & self._within
        at = (offset >> self.cluster_bits & (self.entries - 1)) << 4
        entry, bitmap = _unpack(data, at)
        if entry & self._plain == L.COPIED and not (bitmap >> 32) & bitmap and 0 < length <= size - within:
            # A request inside one cluster that is nobody else's, and there all data or nothing: what is asked for most.
            host = (entry & _HOST) + within
            wanted = (2 << (within + length - 1 >> self.sub_bits)) - (1 << (within >> self.sub_bits))
            if host >= size:
                if bitmap & wanted == wanted:
                    if host >= self.end and not self.present(host, 1):
                        return length, DAMAGED, node.file, at
                    if host >> self.cluster_bits in node.metadata_clusters:
                        return length, NORMAL, node.data_child, host
                    return length, NORMAL | IN_PLACE, node.data_child, host
                if not (bitmap | bitmap >> 32) & wanted:
                    return length, 0, None, NO_HOST
        elif not entry and not bitmap and length <= size - within:
            return length, 0, None, NO_HOST
        if not self.sound(entry, bitmap, offset - within):
            return min(size - within, length), DAMAGED, node.file, at
        if entry & L.ENTRY_COMPRESSED:
            return min(size - within, length), COMPRESSED_CLUSTER, node.file, entry
        number = within >> self.sub_bits
        kind = _kind_of(bitmap, number)
        placed = self.placed(entry)
        stretch = _stretch(_kind(bitmap, number), number)
        have = (stretch << self.sub_bits) - (within & ((1 << self.sub_bits) - 1))
        wanted = entry
        while have < length and number + stretch == COUNT:
            at += 16
            if at >= size:
                break
            wanted += size if placed else 0
            entry_here, bitmap_here = _unpack(data, at)
            # The first subcluster's kind counts, also where the bitmap is the same: the run may have begun in the middle of the one before.
            if entry_here != wanted or _kind_of(bitmap_here, 0) != kind:
                break
            if not self.sound(entry_here, bitmap_here, offset + have):
                break
            number, stretch = 0, _stretch(_kind(bitmap_here, 0), 0)
            have += stretch << self.sub_bits
        length = min(have, length)
        if not kind:
            return length, 0, None, NO_HOST
        if kind == 2:
            return (
                (length, ZERO_HOST, node.data_child, (entry & L.L2_OFFSET_MASK) + within)
                if placed
                else (length, ZERO_PLAIN, None, NO_HOST)
            )
        flags = NORMAL
        host = (entry & L.L2_OFFSET_MASK) + within
        if host + length > self.end and not node.data_missing:
            there = self.present(host, length)
            if not there:
                return length, DAMAGED, node.file, at
            length = there
        if node.data_missing:
            flags = DAMAGED
        elif entry >> 63 and (node.external or self._apart(host, length)):
            flags = NORMAL | IN_PLACE
        return length, flags, node.data_child, host

    def _apart(self, host: int, length: int) -> bool:
        metadata, shift = self.node.metadata_clusters, self.cluster_bits
        return all(cluster not in metadata for cluster in range(host >> shift, ((host + length - 1) >> shift) + 1))

    def read_damaged(self, offset: int) -> CowhandError:
        table = self.find(offset >> self.table_shift)
        at = (offset >> self.cluster_bits & (self.entries - 1)) << 4
        assert table is not None
        entry, bitmap = _unpack(table.data, at)
        if not self.node.data_missing and self.sound(entry, bitmap, offset & -self.cluster_size):
            lost = self.lost(entry, table, at, offset)
            if lost is not None:
                return lost
        return self.bad_entry(entry, table, at)

    def _lost_entry(self) -> bytes:
        return PAIR.pack(self._nowhere, ALL_DATA)

    def bad_entry(self, entry: int, table: Table, at: int, *, writing: bool = False) -> CowhandError:
        node, index = self.node, at // 16
        if node.data_missing:
            from cowhand.block.formats.qcow2.cluster.data_file import missing

            return missing(node)
        if entry & self._bad and not entry & L.ENTRY_COMPRESSED:
            text = f"Cluster allocation offset {entry & L.L2_OFFSET_MASK:#x} unaligned (L2 offset: {table.host:#x}, L2 index: {L.c_hex(index)})"
        else:
            text = f"Invalid cluster entry found{' ' if writing else '  '}(L2 offset: {table.host:#x}, L2 index: {L.c_hex(index)})"
        return node.mark_corrupt(text, offset=table.host + at)

    # -- many entries at once

    def words(self, table: Table, first: int, last: int) -> array[int]:
        words = array("Q", bytes(table.data[first * 16 : last * 16]))
        words.byteswap()
        return words

    def _alike(self, entries: array[int], l1_entry: int) -> tuple[int, int] | None:
        entry, bitmap = entries[0], entries[1]
        if (
            entry & (L.L2_OFFSET_MASK | L.COPIED | L.ENTRY_COMPRESSED)
            or bitmap not in (0, ALL_ZERO)
            or len(entries) != 2 * self.entries
        ):
            return None
        if entries != array("Q", (entry, bitmap)) * self.entries:
            return None
        return l1_entry, ZERO_PLAIN if bitmap else 0

    def _rows(
        self, out: ExtentBatch, entries: array[int], table: Table, first: int, offset: int, stop: int, recurse: int, numpy: bool
    ) -> int:  # fmt: skip
        if numpy and not self.node.external:
            done = self._rows_by_numpy(out, entries, offset, stop, recurse)
            if done is not None:
                return done
        places, bitmaps = entries[::2], entries[1::2]
        node, size = self.node, self.cluster_size
        position, count = 0, len(places)
        base = offset - (offset & self._within)
        while position < count and len(out) < MAX_ROWS - COUNT:
            entry, bitmap = places[position], bitmaps[position]
            guest = base + position * size
            if not self.sound(entry, bitmap, guest):
                raise self.bad_entry(entry, table, (first + position) * 16)
            begin = position
            position += 1
            if entry & L.ENTRY_COMPRESSED:
                while position < count and places[position] & L.ENTRY_COMPRESSED:
                    position += 1
                self._row(out, guest, base + position * size, COMPRESSED_CLUSTER, NO_HOST, node, offset, stop)
            elif bitmap in (0, ALL_DATA, ALL_ZERO):
                alike = _equal(bitmaps, begin)
                place = entry & L.L2_OFFSET_MASK
                if self.placed(entry):
                    position = begin + ramp(places[begin:alike], 0, size) if place else begin + 1
                else:
                    position = begin + _equal(places[begin:alike], 0)
                flags = self._flags(entry, 2 if bitmap == ALL_ZERO else bitmap and 1, recurse)
                self._row(out, guest, base + position * size, flags, place, node, offset, stop)
            else:
                number = 0
                while number < COUNT:
                    run = _stretch(_kind(bitmap, number), number)
                    flags = self._flags(entry, _kind_of(bitmap, number), recurse)
                    start = guest + (number << self.sub_bits)
                    host = (entry & L.L2_OFFSET_MASK) + (number << self.sub_bits)
                    self._row(out, start, start + (run << self.sub_bits), flags, host, node, offset, stop)
                    number += run
        return min(stop, base + position * size)

    def _rows_by_numpy(self, out: ExtentBatch, entries: array[int], offset: int, stop: int, recurse: int) -> int | None:
        from cowhand.block.formats.qcow2.ondisk import l2_subclusters_numpy
        from cowhand.block.formats.qcow2.ondisk.l2_entries_numpy import add_rows

        found = l2_subclusters_numpy.runs(entries, self.cluster_size, self._bad)
        if found is None:
            return None
        node = self.node
        meanings: Meanings = {l2_subclusters_numpy.PACKED: (COMPRESSED_CLUSTER, node)}
        for kind in (l2_subclusters_numpy.NOTHING, l2_subclusters_numpy.DATA, l2_subclusters_numpy.ZERO):
            for placed in (0, l2_subclusters_numpy.PLACED):
                flags = self._meaning(kind, bool(placed), recurse)
                meanings[kind | placed] = flags, node.data_child.node if flags & OFFSET else node if flags else None
        return add_rows(out, found, meanings, offset - (offset & self._within), offset, stop)

    def _flags(self, entry: int, kind: int, recurse: int) -> int:
        return self._meaning(kind, self.placed(entry), recurse)

    @staticmethod
    def _meaning(kind: int, placed: bool, recurse: int) -> int:
        if kind == 1:
            return NORMAL | recurse
        if kind == 2:
            return ZERO_HOST if placed else ZERO_PLAIN
        return OFFSET if placed else 0

    def _row(
        self, out: ExtentBatch, begin: int, end: int, flags: int, host: int, node: Qcow2Node, low: int, high: int
    ) -> None:
        cut = max(0, low - begin)
        begin, end = begin + cut, min(end, high)
        if begin < end:
            owner: BlockNode | None = node.data_child.node if flags & OFFSET else node if flags else None
            out.add(begin, end - begin, flags, host + cut if flags & OFFSET else NO_HOST, owner)


def _equal(column: array[int], begin: int) -> int:
    """Return the index after the run of values equal to that at *begin*."""
    value, position, count, stretch = column[begin], begin + 1, len(column), 8
    while position < count:
        take = min(stretch, count - position)
        if column[position : position + take] == array("Q", (value,)) * take:
            position += take
            stretch *= 4
            continue
        while column[position] == value:
            position += 1
        break
    return position


def _kind_of(bitmap: int, number: int) -> int:
    """Return what subcluster *number* is: 1 data, 2 zero, 0 neither."""
    return bitmap >> number & 1 or (bitmap >> number + 32 & 1) << 1


def _kind(bitmap: int, number: int) -> int:
    """Return a bit for each subcluster that is of the same kind as *number*."""
    data, zero = bitmap & ALL_DATA, bitmap >> 32
    kind = _kind_of(bitmap, number)
    return data if kind == 1 else zero & ~data if kind == 2 else ~(data | zero) & ALL_DATA


def _stretch(word: int, number: int) -> int:
    """Return how many bits of *word* are set from *number* on, without a gap."""
    rest = ~(word >> number)
    return min((rest & -rest).bit_length() - 1, COUNT - number)
