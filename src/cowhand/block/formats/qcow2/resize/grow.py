"""Changing the size of a qcow2 image: growing, shrinking, and preallocation of what is new.

Safe order for growing: the L1 table becomes larger first (written, stable, switched by one header field), what a longer backing file would
show becomes zero, and last the size changes in the header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.reservations import Kind
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.buffers import is_zero
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.core.extents import ALLOCATED, DATA, ENCODED, OFFSET, ZERO

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.node.node import Child


def grow_l1(node: Qcow2Node, entries: int, *, exact: bool) -> None:
    """Make the L1 table at least *entries* long; not *exact*: with room for more. Takes the locks. On an error the old one stands."""
    have = node.header.l1_size
    if entries <= have:
        return
    if not exact:
        # QEMU's rule: half as much again, until it is enough.
        size = max(1, have)
        while size < entries:
            size = -(-size * 3 // 2)
        entries = size
    if entries * 8 > L.MAX_L1_BYTES:
        raise InvalidArgument(
            "the L1 table would be larger than 32 MiB", qemu="File too large", path=node.filename, errno=27
        )
    with node.exclusive():
        if entries > node.header.l1_size:
            replace_l1(node, entries)


def replace_l1(node: Qcow2Node, entries: int) -> None:
    size = node.cluster_size
    old = node.mapping.l1
    # What the old table's entries name must be on disk before a new table names it.
    node.write_back.run(locked=True)
    data = bytearray(entries * 8)
    data[: len(old.data)] = old.data
    clusters = -(-len(data) // size)
    node.fire("l1_grow_alloc_table")
    first = node.allocator.take(clusters)
    try:
        node.write_back.flush_refcounts()
        node.fire("l1_grow_write_table")
        node.write_metadata(first * size, data)
        node.flush_file()
        node.fire("l1_grow_activate_table")
        node.switch_header(l1_size=entries, l1_offset=first * size)
    except CowhandError:
        node.allocator.untake(first, clusters)
        raise
    old_first, old_count = old.host // size, -(-len(old.data) // size)
    node.mapping.l1 = Table(data, first * size)
    node.metadata.add(first, clusters)
    if old_count:
        node.metadata.remove(old_first, old_count)
        node.allocator.free(old_first, old_count)


def set_size(node: Qcow2Node, size: int) -> None:
    """Write the disk's size into the header, stably."""
    with node.exclusive():
        node.switch_header(size=size)
        if node.dirty_bitmaps is not None:
            node.dirty_bitmaps.resize(size)


def resize(node: Qcow2Node, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
    """Make the disk *size* bytes long. Nobody else uses the node meanwhile."""
    old = node.header.size
    if preallocation not in ("off", "metadata", "falloc", "full"):
        raise InvalidArgument(
            f"preallocation mode '{preallocation}' is not known", hint="One of: off, metadata, falloc, full."
        )
    if size % 512:
        raise InvalidArgument("The new size must be a multiple of 512", path=node.filename)
    node.check_writable()
    node.flush()
    if node.snapshots and node.header.version < 3 and size != old:
        # Its snapshots need not say how large the disk was.
        raise NotSupported("Can't resize a v2 image which has snapshots", path=node.filename)
    if node.bitmap_directory.present or node.bitmap_directory.entries:
        from cowhand.block.formats.qcow2.bitmap.store import prepare_resize

        prepare_resize(node, size)
    if size < old:
        if not shrink:
            raise InvalidArgument("shrinking was not asked for")
        if preallocation != "off":
            raise InvalidArgument("Preallocation can't be used for shrinking an image")
        from cowhand.block.formats.qcow2.resize.shrink import shrink_to

        shrink_to(node, size)
        if node.external:
            from cowhand.block.formats.qcow2.cluster import data_file

            data_file.shrink(node, size)
        return
    had = node.header.l1_size
    grow_l1(node, -(-size // (1 << node.mapping.table_shift)), exact=True)
    # The old table's room may be taken again at once: the header names the new one stably, and nobody else uses the node.
    node.flush()
    node.release_quarantine()
    if size == old and (size or preallocation in ("off", "metadata")):
        return  # an empty disk gets the refcount table that all others get of these modes
    if had and had != node.header.l1_size:
        # The old table's place is free at once, as in QEMU: no request is in flight.
        node.flush()
        node.release_quarantine(everything=True)
    if node.raw_data and preallocation == "off":
        preallocation = "metadata"
    if not node.external:
        _forget_behind(node, -(-old // node.cluster_size) * node.cluster_size, size)
    backing = node.backing
    longer = backing is not None and backing.node.size > old
    if preallocation in ("falloc", "full") and not node.external:
        from cowhand.block.formats.qcow2.resize import preallocate_run

        preallocate_run.grow(node, old, size, preallocation, hide_backing=longer)
    else:
        _grow(node, old, size, preallocation, longer)
    node.flush()
    set_size(node, size)


def _grow(node: Qcow2Node, old: int, size: int, preallocation: str, longer: bool) -> None:
    """Have what is new read as zeroes, and give it a place if that is asked for; *longer*: the backing file reaches behind the old end."""
    begin = _hide_tail(node, old, size, longer)
    if node.external and preallocation == "off":
        from cowhand.block.formats.qcow2.cluster import data_file

        data_file.resize(node, size)
    if preallocation != "off":
        from cowhand.block.formats.qcow2.resize.preallocate import preallocate

        preallocate(node, old, size, preallocation)
    # As in QEMU all that is new says so then, also behind the backing file's end; what has its place keeps it.
    if longer:
        _zero(node, begin, size)


def _hide_tail(node: Qcow2Node, old: int, new: int, longer: bool) -> int:
    """Make the rest of the last cluster read as zeroes: what a *longer* backing file would show, and what an earlier, longer life left there.

    Returns where the next cluster begins.
    """
    begin = -(-old // node.cluster_size) * node.cluster_size
    position = old
    while position < begin:
        # Subclusters may differ.
        run = node.map(position, begin - position)
        length, flags = run[0], run[1]
        if longer and not flags & (DATA | ZERO):
            _cover(node, position, min(begin, new))
            break
        if flags & DATA and not _zero_behind(node, position, run):
            node.write(position, (bytes(max(0, min(begin, new) - position)),))
            break
        position += length
    return begin


def _forget_behind(node: Qcow2Node, begin: int, end: int) -> None:
    """Take away what entries behind the disk's last cluster name, which the larger disk would show.

    There is something where parts of the disk share a table, where a VM state lay there, and after a growth that was interrupted.
    """
    unit, found = node.cluster_size, False
    while begin < end:
        rows = node.mapping.batch(begin, end - begin, holes=False)
        for row in rows:
            if row.flags & ALLOCATED:
                node.change(row.start, -(-row.length // unit) * unit, Kind.EMPTY)
                found = True
        begin = rows.end
    if found:
        node.flush()  # what follows looks in the file for its last cluster in use


def _cover(node: Qcow2Node, begin: int, end: int) -> None:
    """Have ``[begin, end)`` of one cluster read as zeroes, which a backing file shows through: written to the next subcluster, then said."""
    unit = node.copy_unit
    edge = -(-begin // unit) * unit
    if begin < edge:
        node.write(begin, (bytes(min(edge, end) - begin),))
    if edge < end:
        node.change(edge, -(-end // unit) * unit - edge, Kind.ZERO)


def _zero(node: Qcow2Node, begin: int, end: int) -> None:
    unit = node.cluster_size
    if begin >= end:
        return
    try:
        node.change(begin, -(-(end - begin) // unit) * unit, Kind.ZERO)
    except NotSupported:
        # Version 2 cannot say it, and has to hide what the backing file would show.
        step = 1 << 20
        end = min(end, node.backing.node.size) if node.backing is not None else begin
        for position in range(begin, end, step):
            node.write(position, (bytes(min(step, end - position)),))


def _zero_behind(node: Qcow2Node, begin: int, run: tuple[int, int, Child | None, int]) -> bool:
    """Tell whether the *run* at *begin* reads as zeroes. What the file knows to be a hole is not read, which would make data of it."""
    length, flags, child, host = run
    if child is not None and flags & OFFSET and not flags & ENCODED and not node.encodes:
        stop = min(host + length, child.node.size)
        while host < stop:
            rows = child.node.map_batch(host, stop - host)
            for row in rows:
                if not row.flags & ZERO and not _reads_zero(node, begin + row.start - host, row.length):
                    return False
            begin, host = begin + rows.end - host, rows.end
        return True
    return _reads_zero(node, begin, length)


def _reads_zero(node: Qcow2Node, begin: int, length: int) -> bool:
    data = bytearray(length)
    node.read_into(begin, data)
    return is_zero(data)
