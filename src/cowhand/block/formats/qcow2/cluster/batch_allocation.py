"""The first writes of a batch in a qcow2 image (QEMU ``docs/interop/qcow2``, "Cluster mapping"): reserved in one pass, and linked in one.

A write goes into its cluster's own place, where subclusters of it hold nothing yet, or else into a new cluster; all new ones adjoin, in the
order of the writes. With a data file each lies at its own offset. All other cases are left to
:mod:`cowhand.block.formats.qcow2.cluster.allocation`.

The functions are called with the node's lock held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.format_io.batch_rows import SINGLY, UnitWrites
from cowhand.block.format_io.table_cache import PAGE_BITS, Table
from cowhand.block.formats.qcow2.cluster.allocation import prepare_tables, writable_table
from cowhand.block.formats.qcow2.cluster.data_file import is_hole, missing
from cowhand.block.formats.qcow2.cluster.extended_mapping import ALL_DATA, PAIR, ExtendedMapping
from cowhand.block.formats.qcow2.ondisk import layout as L

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


class Places:
    """Where the writes of one batch are put in the tables."""

    __slots__ = ("held", "marks", "new", "runs", "tables")

    def __init__(self) -> None:
        self.held: dict[int, Table] = {}  #: by L1 index: they stay in the cache until the reservation ends
        self.tables: list[tuple[Table, int]] = []  #: a row's table, and where its entry is in it, in bytes
        self.marks: list[int] = []  #: with subclusters: the data bits of a row
        self.new: list[int] = []  #: rows that take a cluster
        self.runs: list[tuple[int, int, bool]] = []  #: what they took, in their order, see ``Allocator.take_runs``

    def table(self, node: Qcow2Node, index: int) -> Table:
        """Return L2 table *index* for changing. The tables of other writes must not push it out of a small cache."""
        table = writable_table(node, index)
        table.writing += 1
        self.held[index] = table
        return table

    def let_go(self) -> None:
        """Let the tables leave the cache again."""
        for table in self.held.values():
            table.writing -= 1
        self.held.clear()

    def link(self, node: Qcow2Node, writes: UnitWrites) -> None:
        """Put the entries in place. The old ones named no place, or the same."""
        within, copied = node.cluster_size - 1, L.COPIED
        if self.marks:
            pack, unpack = PAIR.pack_into, PAIR.unpack_from
            for (table, at), host, offset, marked in zip(
                self.tables, writes.hosts, writes.offsets, self.marks, strict=True
            ):
                if host != SINGLY:
                    entry, bitmap = unpack(table.data, at)
                    entry = entry or host - (offset & within) | copied
                    pack(table.data, at, entry, (bitmap | marked) & ~(marked << 32))
                    table.dirty |= 1 << (at >> PAGE_BITS)
        else:
            put = L.U64.pack_into
            for (table, at), host, offset in zip(self.tables, writes.hosts, writes.offsets, strict=True):
                if host != SINGLY:
                    put(table.data, at, host - (offset & within) | copied)
                    table.dirty |= 1 << (at >> PAGE_BITS)
        for table in self.held.values():
            if table.dirty:
                node.mapping.cache.dirty[id(table)] = table
        # The entries make bytes visible, which have to be stable first.
        node.write_back.barrier = True
        if self.runs and not node.external:
            furthest = max(writes.hosts)
            end = furthest + writes.lengths[writes.hosts.index(furthest)]
            node.blank_end = max(node.blank_end, -(-end // writes.part) * writes.part)
        if self.runs and SINGLY in writes.hosts:
            for cluster, row in zip(self._taken(), self.new, strict=True):
                table, at = self.tables[row]
                if writes.hosts[row] == SINGLY and not L.U64.unpack_from(table.data, at)[0] & L.L2_OFFSET_MASK:
                    node.allocator.untake(cluster, 1)
        self.let_go()

    def abandon(self, node: Qcow2Node) -> None:
        """Give back what was taken."""
        for first, count, _ in self.runs:
            node.allocator.untake(first, count)
        self.let_go()

    def _taken(self) -> Iterator[int]:
        for first, count, _ in self.runs:
            yield from range(first, first + count)

    def take(self, node: Qcow2Node, writes: UnitWrites, relative: list[int]) -> None:
        """Take the clusters of ``new``; the hosts of the rows *relative* count from the first of them on, and become what they are."""
        size, hosts, bare = node.cluster_size, writes.hosts, writes.bare
        self.runs = node.allocator.take_runs(len(self.new))
        if len(self.runs) == 1 and len(relative) == len(hosts):
            first, _, fresh = self.runs[0]
            base = first * size
            writes.hosts = [base + host for host in hosts]
            if not fresh:
                writes.bare = [False] * len(hosts)
            return
        found = [
            (cluster * size, fresh) for first, count, fresh in self.runs for cluster in range(first, first + count)
        ]
        for row in relative:
            place, fresh = found[hosts[row] // size]
            hosts[row] = place + hosts[row] % size
            bare[row] = bare[row] and fresh


def reserve(node: Qcow2Node, writes: UnitWrites) -> None:
    """See :meth:`cowhand.block.format_io.reservations.ReservingNode.reserve_writes`."""
    if node.data_missing:
        raise missing(node)
    places = Places()
    try:
        relative = (_look_at_subclusters if node.extended else _look)(node, writes, places)
        if node.lazy:
            prepare_tables(node, list(places.held.values()))
        if node.external:
            child = node.data_child
            writes.bare = [bare and is_hole(child, *writes.span(row)) for row, bare in enumerate(writes.bare)]
        elif places.new:
            places.take(node, writes, relative)
    except BaseException:
        places.let_go()
        raise
    writes.child = node.data_child
    writes.state = places


def _look(node: Qcow2Node, writes: UnitWrites, places: Places) -> list[int]:
    """Fill the columns of *writes* and *places*; return the rows whose hosts count from the first cluster on that is to be taken."""
    mapping, external, busy = node.mapping, node.external, writes.busy
    bits, shift, mask, within = mapping.cluster_bits, mapping.table_shift, mapping.entries - 1, mapping.cluster_size - 1
    unpack, zero, bare_entry = L.U64.unpack_from, L.ENTRY_ZERO, node.backing is None
    known, tables, new = places.held.get, places.tables, places.new
    hosts: list[int] = []
    bare: list[bool] = []
    for row, offset in enumerate(writes.offsets):
        table = known(offset >> shift) or places.table(node, offset >> shift)
        at = (offset >> bits & mask) << 3
        entry = unpack(table.data, at)[0]
        tables.append((table, at))
        bare.append(bare_entry or entry != 0)
        if entry & ~zero or (busy and offset >> bits in busy):
            hosts.append(SINGLY)
        elif external:
            hosts.append(offset)
        else:
            hosts.append((len(new) << bits) + (offset & within))
            new.append(row)
    writes.hosts, writes.bare = hosts, bare
    return new


def _look_at_subclusters(node: Qcow2Node, writes: UnitWrites, places: Places) -> list[int]:
    """The same for extended L2 entries."""
    mapping, external, busy, shared = node.mapping, node.external, writes.busy, writes.shared
    assert isinstance(mapping, ExtendedMapping)
    bits, shift, mask, within = mapping.cluster_bits, mapping.table_shift, mapping.entries - 1, mapping.cluster_size - 1
    sub, unpack, metadata, backed = mapping.sub_bits, PAIR.unpack_from, node.metadata_clusters, node.backing is not None
    fit = L.COPIED | L.ENTRY_COMPRESSED | within & L.L2_OFFSET_MASK
    known, tables, marks, new = places.held.get, places.tables, places.marks, places.new
    hosts: list[int] = []
    bare: list[bool] = []
    relative: list[int] = []
    for row, (offset, length) in enumerate(zip(writes.offsets, writes.lengths, strict=True)):
        table = known(offset >> shift) or places.table(node, offset >> shift)
        at = (offset >> bits & mask) << 4
        entry, bitmap = unpack(table.data, at)
        begin = offset & within
        marked = (2 << (begin + length - 1 >> sub)) - (1 << (begin >> sub))
        tables.append((table, at))
        marks.append(marked)
        host = SINGLY
        blank = False
        if bitmap & (marked | bitmap >> 32) & ALL_DATA or (busy and offset >> bits in busy):
            pass
        elif entry:
            place = entry & L.L2_OFFSET_MASK
            if entry & fit != L.COPIED:
                pass
            elif external:
                if place == offset - begin:
                    host = offset
                    blank = not backed or bitmap >> 32 & marked == marked
            elif place and place >> bits not in metadata:
                host = place + begin
        elif bitmap & ALL_DATA:
            pass  # without a place: damage
        elif external:
            host = offset
            blank = not backed or bitmap >> 32 & marked == marked
        else:
            blank = not backed or bitmap >> 32 & marked == marked
            if row in shared:
                other = shared[row]  # which is in the same cluster
                host = hosts[other] - (writes.offsets[other] & within) + begin
            else:
                host = (len(new) << bits) + begin
                new.append(row)
            relative.append(row)
        hosts.append(host)
        bare.append(blank)
    writes.hosts, writes.bare = hosts, bare
    return relative
