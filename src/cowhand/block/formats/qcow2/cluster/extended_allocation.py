"""Reserving space for subclusters of qcow2 images (QEMU ``docs/interop/qcow2``, "Extended L2 Entries"): what entries and bitmaps become.

The functions are called with the node's lock held, as those of :mod:`cowhand.block.formats.qcow2.cluster.allocation`, which calls them.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cowhand.block.format_io.reservations import Kind, Reservation
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.cluster.extended_mapping import ALL_DATA, ALL_ZERO, COUNT, PAIR, ExtendedMapping, bits
from cowhand.block.formats.qcow2.metadata.options import hands_down
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import NotSupported

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def reserve_data(node: Qcow2Node, table: Table, first: int, count: int, offset: int, length: int) -> Reservation | None:
    """Reserve for data what ``[offset, offset + length)`` touches of *count* clusters from entry *first* of *table* on; None: in place."""
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange

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
            mapping.require(begin if node.external else entry, table, first * 16, begin)
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
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange

    size, sub = mapping.cluster_size, mapping.sub_bits
    begin = offset - offset % size
    taken, fresh = 0, False
    host = begin
    if node.external:
        from cowhand.block.formats.qcow2.cluster.data_file import is_hole

        fresh = is_hole(node.data_child, begin, begin + count * size)
    else:
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
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange, NothingToDo

    mapping = node.mapping
    assert isinstance(mapping, ExtendedMapping)
    size, sub = mapping.cluster_size, mapping.sub_bits
    begin = offset - offset % size
    old = mapping.words(table, first, first + count)
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
    """See :meth:`cowhand.block.format_io.reservations.ReservingNode.spare`: subclusters without data, or with data that stays where it is."""
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange

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
