"""Reserve, link and abandon for qcow2: how guest clusters get, change and lose their host clusters.

``reserve`` runs with the allocation lock held and gives a :class:`Reservation` whose ``state`` knows how to link and to abandon itself.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cowhand.block.format_io.reservations import Kind, Reservation, Unprepared
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.metadata.options import hands_down
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import CowhandError, NotSupported

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_ENTRY_HOST = L.ENTRY_COMPRESSED | L.L2_OFFSET_MASK


class NothingToDo:
    """The units are in the wanted state already."""

    __slots__ = ()

    def link(self, node: Qcow2Node) -> None:
        """Change nothing."""

    def abandon(self, node: Qcow2Node) -> None:
        """Change nothing."""


class EntryChange:
    """New L2 entries for ``count`` guest clusters from entry ``first`` of ``table`` on."""

    __slots__ = ("barrier", "count", "discard", "entries", "first", "same_places", "table", "taken", "taken_count")

    def __init__(
        self,
        table: Table,
        first: int,
        entries: bytes,
        *,
        taken: int = 0,
        taken_count: int = 0,
        discard: bool = False,
        barrier: bool = False,
        same_places: bool = False,
    ) -> None:
        self.table = table
        self.first = first
        self.count = len(entries) // 8
        self.entries = entries
        self.taken = taken
        self.taken_count = taken_count
        self.discard = discard
        self.barrier = barrier or taken_count > 0  #: the entries make bytes visible, which have to be stable first
        self.same_places = same_places  #: the entries name what the old ones do: only bitmaps of subclusters differ
        table.writing += 1  # stays in the cache until the reservation ends

    def link(self, node: Qcow2Node) -> None:
        """Put the entries in place; what the old ones named goes into quarantine."""
        start, end = self.first * 8, (self.first + self.count) * 8
        data = self.table.data
        old = b"" if self.same_places else bytes(data[start:end])
        data[start:end] = self.entries
        node.mapping.cache.touch(self.table, start, end)
        if self.barrier:
            node.write_back.barrier = True
        self.table.writing -= 1
        if old.count(0) != len(old):
            new = self.entries
            if node.extended:
                from cowhand.block.formats.qcow2.cluster.extended_allocation import every_second

                old, new = every_second(old), every_second(new)
            free_entries(node, old, new, discard=self.discard)

    def abandon(self, node: Qcow2Node) -> None:
        """Give back what was taken."""
        self.table.writing -= 1
        if self.taken_count:
            node.allocator.untake(self.taken, self.taken_count)


def free_entries(node: Qcow2Node, old: bytes, new: bytes, *, discard: bool) -> None:
    """Take one reference from every cluster that *old* L2 entries name and *new* ones do not."""
    if node.external:
        return  # nothing of a data file is counted
    bits = node.header.cluster_bits
    allocator = node.allocator
    metadata = node.metadata
    begin = count = 0
    for (was,), (now,) in zip(L.U64.iter_unpack(old), L.U64.iter_unpack(new), strict=True):
        if not was & _ENTRY_HOST:
            continue
        if was & L.ENTRY_COMPRESSED:
            # Always another place than before, if perhaps in the same sector.
            host, nbytes = L.compressed_location(was, bits)
            first, last = host >> bits, (host + nbytes - 1) >> bits
            if metadata.hit(first, last) is not None:
                _keep_metadata(node, host)
            else:
                allocator.free(first, last - first + 1)
            continue
        if (was ^ now) & _ENTRY_HOST == 0:
            continue
        offset = was & L.L2_OFFSET_MASK
        if offset & (node.cluster_size - 1):
            node.mark_corrupt(f"Cannot free unaligned cluster {offset:#x}", offset=offset, fatal=False)
            continue
        cluster = offset >> bits
        if cluster in metadata.clusters and not _counted_apart(node, cluster):
            _keep_metadata(node, offset)
            continue
        if count and cluster == begin + count:
            count += 1
            continue
        if count:
            allocator.free(begin, count, discard=discard)
        begin, count = cluster, 1
    if count:
        allocator.free(begin, count, discard=discard)


def _counted_apart(node: Qcow2Node, cluster: int) -> bool:
    """Tell whether metadata's count includes the guest's reference to it, so that the one can go without the other (after a repair)."""
    try:
        return node.refcounts.get(cluster) > node.allocator.waiting(cluster) + 1
    except CowhandError:
        return False


def _keep_metadata(node: Qcow2Node, offset: int) -> None:
    """Report an entry that called metadata a guest's data: what it named stays counted, and is not handed back to the file system."""
    node.mark_corrupt(f"Cannot free metadata as guest data at {offset:#x}", offset=offset, fatal=False)


def reserve(node: Qcow2Node, offset: int, length: int, kind: Kind, nbytes: int) -> Reservation | None:
    """See :meth:`cowhand.block.format_io.format_node.FormatNode.reserve`."""
    if kind == Kind.DATA:
        return _reserve_data(node, offset, length)
    if kind == Kind.COMPRESSED:
        return _reserve_compressed(node, offset, nbytes)
    return _reserve_empty(node, offset, length, kind)


def writable_table(node: Qcow2Node, index: int) -> Table:
    """Return L2 table *index* for changing: made when there is none, copied when a snapshot shares it."""
    mapping = node.mapping
    entry = mapping.l1_entry(index)
    if entry & L.COPIED and entry & L.L1_OFFSET_MASK:
        table = mapping.table(index)
        assert table is not None
        return table
    old = mapping.table(index)
    cluster = node.allocator.take(1, "L2 table")
    host = cluster << mapping.cluster_bits
    node.fire("l2_alloc_write")
    data = bytearray(old.data) if old is not None else bytearray(mapping.cluster_size)
    table = Table(data, host, fresh=True)
    table.uncounted = node.lazy
    table.touch_all()
    if old is not None:
        # Changes of the shared table that are not on disk yet belong to the snapshot too: they stay in the cache's dirty list.
        node.allocator.free(old.host >> mapping.cluster_bits, 1)
        node.metadata.remove(old.host >> mapping.cluster_bits, 1)
    mapping.cache.put(index, table)
    mapping.set_l1(index, host | L.COPIED)
    node.metadata.add(cluster, 1)
    node.write_back.barrier = True
    return table


def prepare_tables(node: Qcow2Node, tables: list[Table]) -> None:
    """Raise Unprepared where the file has to count some of *tables* before they hold data: with lazy reference counts, when they are new.

    A repair then has only data to find.
    """
    waiting = [table for table in tables if table.uncounted]
    if not waiting or node.exclusive_held:
        return

    def count() -> None:
        node.flush_counts()
        for table in waiting:
            table.uncounted = False

    raise Unprepared(count)


def _place(node: Qcow2Node, offset: int, length: int) -> tuple[int, int, int]:
    """Return (L1 index, first L2 entry, number of entries) of the clusters that a request touches inside one table."""
    mapping = node.mapping
    index = offset >> mapping.table_shift
    first = offset >> mapping.cluster_bits & (mapping.entries - 1)
    last = (offset + length - 1) >> mapping.cluster_bits
    return index, first, min(last - (offset >> mapping.cluster_bits) + 1, mapping.entries - first)


def _action(entry: int) -> int:
    """Say what a write does with an entry: 0 in place, 1 into its own preallocated zero cluster, 2 into a new cluster."""
    if entry & L.ENTRY_COMPRESSED or not entry & L.COPIED or not entry & L.L2_OFFSET_MASK:
        return 2
    return 1 if entry & L.ENTRY_ZERO else 0


def _reserve_data(node: Qcow2Node, offset: int, length: int) -> Reservation | None:
    mapping = node.mapping
    index, first, count = _place(node, offset, length)
    table = writable_table(node, index)
    if node.lazy:
        prepare_tables(node, [table])
    if node.extended:
        from cowhand.block.formats.qcow2.cluster import extended_allocation

        return extended_allocation.reserve_data(node, table, first, count, offset, length)
    if node.external:
        from cowhand.block.formats.qcow2.cluster.data_file import reserve_data

        return reserve_data(node, table, first, count, (offset >> mapping.cluster_bits) << mapping.cluster_bits)
    data = table.data
    size, bits = mapping.cluster_size, mapping.cluster_bits
    entry = L.U64.unpack_from(data, first * 8)[0]
    action = _action(entry)
    begin = (offset >> bits) << bits
    if node.header.version < 3:
        _refuse_zero_flags(node, table, first, count)
    if count == 1 and not entry:
        return _reserve_new(node, table, first, 1, begin, blank=node.backing is None)
    if action == 2:
        piece = bytes(data[first * 8 : (first + count) * 8])
        if piece.count(0) != len(piece):
            run = 1
            while run < count and _action(L.U64.unpack_from(piece, run * 8)[0]) == 2:
                run += 1
            count = run
        return _reserve_new(node, table, first, count, begin)
    host = entry & L.L2_OFFSET_MASK
    if host & (size - 1):
        kind = "Preallocated zero" if action else "Data"
        text = f"{kind} cluster offset {host:#x} unaligned (guest offset: {L.c_hex(offset)})"
        raise node.mark_corrupt(text, offset=table.host + first * 8)
    run = 1
    while run < count and L.U64.unpack_from(data, (first + run) * 8)[0] == entry + run * size:
        run += 1
    mixed = 0 if offset % size else _mixed_run(data, first, min(count, length >> bits), size)
    if mixed > run:
        run, action = mixed, 1
    node.check_overlap(host, run * size)
    if action == 0:
        mapping.require(entry, table, first * 8, begin)
        return None
    entries = array("Q", range(host | L.COPIED, (host | L.COPIED) + run * size, size))
    entries.byteswap()
    # What lies there is older than the zeroes that are seen now: it must not show again.
    change = EntryChange(table, first, entries.tobytes(), barrier=True)
    return Reservation(begin, run << bits, Kind.DATA, node.data_child, host, state=change)


def _refuse_zero_flags(node: Qcow2Node, table: Table, first: int, count: int) -> None:
    """Raise ImageCorrupt where an entry of a version 2 image has the bit that means zeroes in version 3 only."""
    for at in range(first * 8, (first + count) * 8, 8):
        entry = L.U64.unpack_from(table.data, at)[0]
        if entry & L.ENTRY_ZERO and not entry & L.ENTRY_COMPRESSED:
            raise node.mapping.bad_entry(entry, table, at)


def _mixed_run(data: bytes | bytearray, first: int, count: int, size: int) -> int:
    """Return how many of *count* entries from *first* on lie one behind the other, some holding data and some zeroes; 0 if all are of a kind.

    All of them are written as a whole, so that one write does for what needs no new entry and for what does.
    """
    entry = L.U64.unpack_from(data, first * 8)[0]
    kinds = 0
    run = 0
    while run < count:
        this = L.U64.unpack_from(data, (first + run) * 8)[0]
        if this & ~L.ENTRY_ZERO != (entry & ~L.ENTRY_ZERO) + run * size:
            break
        kinds |= 2 if this & L.ENTRY_ZERO else 1
        run += 1
    return run if kinds == 3 else 0


def _reserve_new(
    node: Qcow2Node, table: Table, first: int, count: int, begin: int, *, blank: bool = False
) -> Reservation:
    size, bits = node.mapping.cluster_size, node.mapping.cluster_bits
    cluster = 0
    if node.continues:
        before = _entry_before(node, table, first, begin)
        if not before & (L.ENTRY_COMPRESSED | (size - 1) & L.L2_OFFSET_MASK) and before & L.L2_OFFSET_MASK:
            following = ((before & L.L2_OFFSET_MASK) >> bits) + 1
            have = node.allocator.take_at(following, count)
            if have:
                cluster, count = following, have
    if not cluster:
        cluster = node.allocator.take(count)
    host = cluster << bits
    fresh = node.allocator.fresh
    entries = array("Q", range(host | L.COPIED, (host | L.COPIED) + count * size, size))
    entries.byteswap()
    change = EntryChange(table, first, entries.tobytes(), taken=cluster, taken_count=count)
    return Reservation(begin, count << bits, Kind.DATA, node.data_child, host, fresh=fresh, blank=blank, state=change)


def _entry_before(node: Qcow2Node, table: Table, first: int, begin: int) -> int:
    """Return the L2 entry of the guest cluster before the one at *begin*, which is entry *first* of *table*."""
    at = first * 8 - 8
    if not first:
        before = node.mapping.tables.get((begin >> node.mapping.table_shift) - 1)
        if before is None:
            return 0
        table, at = before, node.cluster_size - 8
    entry: int = L.U64.unpack_from(table.data, at)[0]
    return entry


def _reserve_compressed(node: Qcow2Node, offset: int, nbytes: int) -> Reservation | None:
    if node.external:
        raise NotSupported(
            "a data file holds no compressed clusters",
            qemu="Operation not supported",
            path=node.filename,
            offset=offset,
        )
    mapping = node.mapping
    index, first, _ = _place(node, offset, mapping.cluster_size)
    table = writable_table(node, index)
    first *= 2 if node.extended else 1
    if L.U64.unpack_from(table.data, first * 8)[0] & (L.COPIED | L.ENTRY_COMPRESSED | L.L2_OFFSET_MASK):
        return None  # QEMU overwrites nothing that has a place, be it zero or a snapshot's
    host = node.allocator.take_bytes(nbytes)
    bits = mapping.cluster_bits
    entry = L.compressed_entry(host, nbytes, bits)
    low, high = host >> bits, (host + nbytes - 1) >> bits
    node.allocator.use(low, high - low + 1)
    stored = L.U64.pack(entry) + (bytes(8) if node.extended else b"")
    change = EntryChange(table, first, stored, taken=low, taken_count=high - low + 1)
    return Reservation(offset, mapping.cluster_size, Kind.COMPRESSED, node.file, host, state=change)


def _reserve_empty(node: Qcow2Node, offset: int, length: int, kind: Kind) -> Reservation:
    """Kinds that need no bytes: zeroes, discards, and clusters that are not allocated any more."""
    mapping = node.mapping
    index, first, count = _place(node, offset, length)
    missing = not mapping.l1_entry(index) & L.L1_OFFSET_MASK
    backed = node.backing is not None
    zero_flag = node.header.version >= 3
    if not zero_flag and kind != Kind.EMPTY and node.backing is not None:
        if kind == Kind.DISCARD:
            return Reservation(offset, length, kind, state=NothingToDo())
        raise NotSupported("version 2 of qcow2 cannot say 'zero' over a backing file", path=node.filename)
    if missing and (kind == Kind.EMPTY or (kind == Kind.DISCARD and not backed) or not zero_flag):
        end = mapping.skip_missing(index, offset + length)
        covered = -(-end >> mapping.cluster_bits) << mapping.cluster_bits
        return Reservation(offset, min(length, covered - offset), kind, state=NothingToDo())
    table = writable_table(node, index)
    if node.extended:
        from cowhand.block.formats.qcow2.cluster import extended_allocation

        return extended_allocation.reserve_empty(node, table, first, count, offset, length, kind)
    old = array("Q", bytes(table.data[first * 8 : (first + count) * 8]))
    old.byteswap()
    new = (
        array("Q", [_emptied(entry, kind, zero_flag, backed) for entry in old])
        if any(old)
        else array("Q", [_emptied(0, kind, zero_flag, backed)]) * count
    )
    if new == old:
        return Reservation(offset, count << mapping.cluster_bits, kind, state=NothingToDo())
    new.byteswap()
    change = EntryChange(table, first, new.tobytes(), discard=hands_down(node.options, kind))
    return Reservation(offset, count << mapping.cluster_bits, kind, state=change)


def _emptied(entry: int, kind: Kind, zero_flag: bool, backed: bool) -> int:
    """Return what an L2 entry becomes under *kind*."""
    if kind == Kind.EMPTY:
        return 0
    allocated = entry & (_ENTRY_HOST | L.COPIED)  # at offset 0 of a data file COPIED alone says so
    if kind == Kind.DISCARD:
        # A guest's discard never exposes the backing file; without one, "unallocated" says zero as well.
        if not zero_flag:
            return 0
        return L.ENTRY_ZERO if backed or allocated or entry & L.ENTRY_ZERO else 0
    if not zero_flag:
        return 0
    if kind == Kind.ZERO_UNMAP or entry & L.ENTRY_COMPRESSED or not allocated:
        return L.ENTRY_ZERO
    return entry | L.ENTRY_ZERO
