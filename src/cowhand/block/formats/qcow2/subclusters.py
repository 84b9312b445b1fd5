"""Extended L2 entries (QEMU ``docs/interop/qcow2``, "Extended L2 Entries"): each cluster has 32 subclusters, and a bitmap says what they are.

Low half of the bitmap: a bit for each subcluster that holds data; high half: one for each that reads as zeroes; neither: the backing file shows
through, whether the cluster has a place or not. Both at once, or data without a place, is damage.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowhand.block.cache import Table
from cowhand.block.formats.qcow2 import layout as L
from cowhand.block.formats.qcow2.mapping import (
    COMPRESSED_CLUSTER,
    DAMAGED,
    NORMAL,
    ZERO_HOST,
    ZERO_PLAIN,
    Mapping,
    ramp,
)
from cowhand.block.formats.qcow2.options import hands_down
from cowhand.block.node import READ, WRITE_REQUEST
from cowhand.block.reserving import Kind, Reservation
from cowhand.core.errors import CowhandError, NotSupported
from cowhand.core.extents import IN_PLACE, MAX_ROWS, NO_HOST, OFFSET, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.allocation import EntryChange
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.node import BlockNode, Child, Request

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
        return not self.node.external or host == guest

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
                    and not (writing and (not entry >> 63 or place >> bits_ in metadata))
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
        return self.bad_entry(_unpack(table.data, at)[0], table, at)

    def bad_entry(self, entry: int, table: Table, at: int, *, writing: bool = False) -> CowhandError:
        node, index = self.node, at // 16
        if node.data_missing:
            from cowhand.block.formats.qcow2.datafile import missing

            return missing(node)
        if entry & self._bad and not entry & L.ENTRY_COMPRESSED:
            text = f"Cluster allocation offset {entry & L.L2_OFFSET_MASK:#x} unaligned (L2 offset: {table.host:#x}, L2 index: {L.c_hex(index)})"
        else:
            text = f"Invalid cluster entry found{' ' if writing else '  '}(L2 offset: {table.host:#x}, L2 index: {L.c_hex(index)})"
        return node.mark_corrupt(text, offset=table.host + at)

    # -- many entries at once

    def _words(self, table: Table, first: int, last: int) -> array[int]:
        words = array("Q", bytes(table.data[first * 16 : last * 16]))
        words.byteswap()
        return words

    def _run_finder(self, length: int) -> Callable[[array[int], int], list[int]] | None:
        if self.node.external or not self._many_tables(length):
            return None
        return lambda entries, step: []  # no ends are needed: _rows_by_numpy finds them with the rest

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
        self, out: ExtentBatch, entries: array[int], table: Table, first: int, offset: int, stop: int, recurse: int, ends: list[int] | None
    ) -> int:  # fmt: skip
        if ends is not None:
            done = self._rows_by_numpy(out, entries, offset, stop, recurse)
            if done:
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

    def _rows_by_numpy(self, out: ExtentBatch, entries: array[int], offset: int, stop: int, recurse: int) -> int:
        """Add the rows of *entries*; return up to where, 0 when an entry cannot be followed (who comes next tells of it)."""
        from cowhand.block.formats.qcow2 import subclusterruns as runs

        found = runs.runs(entries, self.cluster_size, self._bad)
        if found is None:
            return 0
        starts, kinds, hosts = (column.tolist() for column in found)
        flags = {
            what: COMPRESSED_CLUSTER
            if what == runs.PACKED
            else self._meaning(what & 3, bool(what & runs.PLACED), recurse)
            for what in set(kinds)
        }
        base = offset - (offset & self._within)
        starts.append(stop - base)
        node, end = self.node, offset
        for number, what in enumerate(kinds):
            if len(out) >= MAX_ROWS:
                break
            end = base + starts[number + 1]
            self._row(out, base + starts[number], end, flags[what], hosts[number], node, offset, stop)
        return min(stop, end)

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


# -- allocation


def reserve_data(node: Qcow2Node, table: Table, first: int, count: int, offset: int, length: int) -> Reservation | None:
    """Reserve for data what ``[offset, offset + length)`` touches of *count* clusters from entry *first* of *table* on; None: in place."""
    from cowhand.block.formats.qcow2.allocation import EntryChange

    mapping = node.mapping
    assert isinstance(mapping, ExtendedMapping)
    if node.data_missing:
        raise mapping.bad_entry(0, table, first * 16)
    size, sub = mapping.cluster_size, mapping.sub_bits
    begin = offset - offset % size
    end = min(offset + length, begin + count * size)
    entry, bitmap = mapping.pair(table, first)
    if not mapping.sound(entry, bitmap, begin):
        raise mapping.bad_entry(entry, table, first * 16, writing=True)
    low = (offset - begin) >> sub
    if mapping.placed(entry) and entry & L.COPIED:
        if not node.external:
            node.check_overlap(entry & L.L2_OFFSET_MASK, size)
        high = -(-(min(end, begin + size) - begin) >> sub)
        if bitmap >> low & 1:
            return None
        # Up to the next subcluster that can be written in place.
        taken = bitmap & bits(low, high)
        if taken:
            high = (taken & -taken).bit_length() - 1
        marked = bits(low, high)
        new = PAIR.pack(entry, (bitmap | marked) & ~(marked << 32))
        change = EntryChange(table, first * 2, new, barrier=True, same_places=True)
        return _reservation(
            node, begin, 1, entry & L.L2_OFFSET_MASK, begin + (low << sub), begin + (high << sub), change
        )
    run = 1
    while run < count:
        here, bitmap_here = mapping.pair(table, first + run)
        if not mapping.sound(here, bitmap_here, begin + run * size) or (mapping.placed(here) and here & L.COPIED):
            break
        run += 1
    return _reserve_new(node, mapping, table, first, run, offset, end)


def _reservation(
    node: Qcow2Node, begin: int, clusters: int, host: int, low: int, high: int, change: EntryChange
) -> Reservation:
    made = Reservation(begin, clusters * node.cluster_size, Kind.DATA, node.data_child, host, state=change)
    made.begin, made.end = low, high
    return made


def _reserve_new(
    node: Qcow2Node, mapping: ExtendedMapping, table: Table, first: int, count: int, offset: int, end: int
) -> Reservation:
    """Give *count* clusters from *first* on a new place; what they hold outside of ``[offset, end)`` comes with them."""
    from cowhand.block.formats.qcow2.allocation import EntryChange

    size, sub = mapping.cluster_size, mapping.sub_bits
    begin = offset - offset % size
    taken, fresh = 0, False
    host = begin
    if not node.external:
        taken, count = _place(node, mapping, table, first, count)
        host, fresh = taken * size, node.allocator.fresh
    end = min(end, begin + count * size)
    low, high = (offset - begin) >> sub, -(-(end - begin) >> sub) - (count - 1) * COUNT
    entry, bitmap = mapping.pair(table, first)
    blank = not entry and not bitmap and count == 1 and node.backing is None
    low = min(low, _held(entry, bitmap)[0])
    last_entry, last_bitmap = mapping.pair(table, first + count - 1)
    high = max(high, _held(last_entry, last_bitmap)[1])
    words = array("Q", [ALL_DATA]) * (2 * count)
    words[::2] = array("Q", range(host | L.COPIED, (host | L.COPIED) + count * size, size))
    for position, old in ((0, bitmap), (count - 1, last_bitmap)):
        marked = bits(low if position == 0 else 0, high if position == count - 1 else COUNT)
        words[2 * position + 1] = marked | (old & ALL_ZERO & ~(marked << 32))
    words.byteswap()
    change = EntryChange(
        table, first * 2, words.tobytes(), taken=taken, taken_count=0 if node.external else count, barrier=True
    )
    made = _reservation(
        node, begin, count, host, begin + (low << sub), begin + (count - 1) * size + (high << sub), change
    )
    made.fresh, made.blank = fresh, blank
    return made


def reserve_units(node: Qcow2Node, writes: Sequence[tuple[int, int]]) -> list[Reservation | None]:
    """See :meth:`cowhand.block.reserving.ReservingNode.reserve_units`: a write goes into its cluster's own place, or all others into adjoining ones.

    What has data already where it is written, or data that has to move with it, is left to :func:`reserve_data`.
    """
    from cowhand.block.formats.qcow2.allocation import writable_table

    mapping = node.mapping
    assert isinstance(mapping, ExtendedMapping)
    bits_, shift, mask, sub = mapping.cluster_bits, mapping.table_shift, mapping.entries - 1, mapping.sub_bits
    within, metadata = mapping.cluster_size - 1, node.metadata_clusters
    #: (table, number of the entry, entry, bitmap, data bits of the write); entry 0: to be taken
    places: list[tuple[Table, int, int, int, int] | None] = []
    held: list[Table] = []
    new, before, table = 0, -1, None
    try:
        for offset, length in writes:
            if table is None or before != offset >> shift:
                before = offset >> shift
                table = writable_table(node, before)
                # The tables of the other writes must not push this one out of a small cache.
                table.writing += 1
                held.append(table)
            first = offset >> bits_ & mask
            entry, bitmap = _unpack(table.data, first << 4)
            begin = offset & within
            marked = (1 << (begin + length - 1 >> sub) + 1) - (1 << (begin >> sub))
            host = entry & L.L2_OFFSET_MASK
            if bitmap & (marked | bitmap >> 32) & ALL_DATA or entry & (L.ENTRY_COMPRESSED | mapping._bad):
                places.append(None)
                continue
            if host:
                if not entry & L.COPIED or host >> bits_ in metadata:
                    places.append(None)
                    continue
            elif bitmap & ALL_DATA:
                places.append(None)
                continue
            else:
                entry = 0
                new += 1
            places.append((table, first, entry, bitmap, marked))
        return _reserve_places(node, mapping, writes, places, new)
    finally:
        for table in held:
            table.writing -= 1


def _reserve_places(
    node: Qcow2Node,
    mapping: ExtendedMapping,
    writes: Sequence[tuple[int, int]],
    places: list[tuple[Table, int, int, int, int] | None],
    new: int,
) -> list[Reservation | None]:
    from cowhand.block.formats.qcow2.allocation import EntryChange

    size, sub, child, bare = mapping.cluster_size, mapping.sub_bits, node.data_child, node.backing is None
    cluster = node.allocator.take(new) if new else 0
    fresh = bool(new) and node.allocator.fresh
    reservations: list[Reservation | None] = []
    for (offset, length), place in zip(writes, places, strict=True):
        if place is None:
            reservations.append(None)
            continue
        table, first, entry, bitmap, marked = place
        taken = 0
        if not entry:
            taken, entry = cluster, cluster * size | L.COPIED
            cluster += 1
        pair = PAIR.pack(entry, (bitmap | marked) & ~(marked << 32))
        if taken:
            change = EntryChange(table, first * 2, pair, taken=taken, taken_count=1)
        else:
            change = EntryChange(table, first * 2, pair, barrier=True, same_places=True)
        made = Reservation(offset - offset % size, size, Kind.DATA, child, entry & _HOST, state=change)
        made.begin, made.end = offset >> sub << sub, -(-(offset + length) >> sub) << sub
        if taken:
            made.fresh, made.blank = fresh, bare and not bitmap
        reservations.append(made)
    return reservations


def _held(entry: int, bitmap: int) -> tuple[int, int]:
    """Return the subclusters [first, behind the last) whose data has to move when the cluster moves."""
    if entry & L.ENTRY_COMPRESSED:
        return 0, COUNT
    data = bitmap & ALL_DATA
    return ((data & -data).bit_length() - 1, data.bit_length()) if data else (COUNT, 0)


def _place(node: Qcow2Node, mapping: ExtendedMapping, table: Table, first: int, count: int) -> tuple[int, int]:
    """Take up to *count* clusters; return (the first, how many)."""
    if node.continues and first:
        before, _ = mapping.pair(table, first - 1)
        if mapping.placed(before) and not before & (mapping.cluster_size - 1) & L.L2_OFFSET_MASK:
            following = ((before & L.L2_OFFSET_MASK) >> mapping.cluster_bits) + 1
            have = node.allocator.take_at(following, count)
            if have:
                return following, have
    return node.allocator.take(count), count


def reserve_empty(
    node: Qcow2Node, table: Table, first: int, count: int, offset: int, length: int, kind: Kind
) -> Reservation:
    """Reserve a change that needs no bytes: of whole clusters, or of a part of one for zeroes."""
    from cowhand.block.formats.qcow2.allocation import EntryChange, NothingToDo

    mapping = node.mapping
    assert isinstance(mapping, ExtendedMapping)
    size, sub = mapping.cluster_size, mapping.sub_bits
    begin = offset - offset % size
    old = mapping._words(table, first, first + count)
    part = offset > begin or length < size
    if part:
        count, old = 1, old[:2]
        if old[0] & L.ENTRY_COMPRESSED or not mapping.sound(old[0], old[1], begin):
            raise NotSupported("a part of this cluster cannot be made zero", path=node.filename, offset=offset)
        high = min(COUNT, -(-(offset + length - begin) >> sub))
        marked = bits((offset - begin) >> sub, high)
        new = array("Q", (old[0], (old[1] | marked << 32) & ~marked))
    elif not any(old):
        new = array("Q", emptied(node, 0, 0, kind)) * count
    else:
        new = array("Q")
        for position in range(0, 2 * count, 2):
            new.extend(emptied(node, old[position], old[position + 1], kind))
    state: EntryChange | NothingToDo = NothingToDo()
    if new != old:
        new.byteswap()
        state = EntryChange(table, first * 2, new.tobytes(), discard=hands_down(node.options, kind))
    made = Reservation(begin, count * size, kind, state=state)
    if part:
        made.begin, made.end = offset, min(offset + length, begin + size)
    return made


def emptied(node: Qcow2Node, entry: int, bitmap: int, kind: Kind) -> tuple[int, int]:
    """Return what an entry and its bitmap become under *kind*."""
    if kind == Kind.EMPTY:
        return 0, 0
    used = entry & (L.ENTRY_COMPRESSED | L.L2_OFFSET_MASK | L.COPIED)
    if kind == Kind.DISCARD:
        return (0, ALL_ZERO) if used or node.backing is not None else (entry, bitmap)
    if kind == Kind.ZERO_UNMAP or entry & L.ENTRY_COMPRESSED or not used:
        return 0, ALL_ZERO
    return entry, ALL_ZERO


def spare(node: Qcow2Node, reservation: Reservation, begin: int, end: int) -> bool:
    """See :meth:`cowhand.block.reserving.ReservingNode.spare`: subclusters without data, or with data that stays where it is."""
    from cowhand.block.formats.qcow2.allocation import EntryChange

    change, mapping = reservation.state, node.mapping
    assert isinstance(change, EntryChange)
    assert isinstance(mapping, ExtendedMapping)
    size, sub = mapping.cluster_size, mapping.sub_bits
    if begin & (1 << sub) - 1 or (end & (1 << sub) - 1 and end < node.size):
        return False
    end = min(-(-end >> sub) << sub, reservation.end)
    words = array("Q", change.entries)
    words.byteswap()
    first, last = (begin - reservation.offset) // size, (end - 1 - reservation.offset) // size
    for number in range(first, last + 1):
        here = reservation.offset + number * size
        marked = bits(max(0, begin - here) >> sub, min(size, end - here) >> sub)
        entry, bitmap = mapping.pair(change.table, change.first // 2 + number)
        if entry & L.ENTRY_COMPRESSED or (bitmap & marked and not change.same_places):
            return False
        words[2 * number + 1] = (words[2 * number + 1] & ~marked) | bitmap & (marked | marked << 32)
    words.byteswap()
    change.entries = words.tobytes()
    if end == reservation.end:
        reservation.end = begin
    return True


def without_data(table: Table, change: EntryChange) -> None:
    """Have *change* give clusters their place and nothing else: their subclusters stay what they are (preallocation)."""
    words = array("Q", change.entries)
    old = array("Q", bytes(table.data[change.first * 8 : (change.first + change.count) * 8]))
    if L.U64.unpack_from(old)[0] & L.ENTRY_COMPRESSED:
        old[1] = words[1]  # all that the first one held comes with it
    words[1::2] = old[1::2]
    change.entries = words.tobytes()


def every_second(data: bytes) -> bytes:
    """Return the entries of *data* without their bitmaps."""
    return array("Q", data)[::2].tobytes()
