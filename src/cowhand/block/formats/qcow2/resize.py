"""Changing the size of a qcow2 image: growing, shrinking, and preallocation of what is new.

Safe order for growing: the L1 table becomes larger first (written, stable, switched by one header field), what a longer backing file would
show becomes zero, and last the size changes in the header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.cache import Table
from cowhand.block.formats.qcow2 import layout as L
from cowhand.block.reserving import Kind
from cowhand.core.buffers import is_zero
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.core.extents import DATA, ZERO

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


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
        from cowhand.block.formats.qcow2.bitmapstore import prepare_resize

        prepare_resize(node, size)
    if size < old:
        if not shrink:
            raise InvalidArgument("shrinking was not asked for")
        if preallocation != "off":
            raise InvalidArgument("Preallocation can't be used for shrinking an image")
        from cowhand.block.formats.qcow2.shrink import shrink_to

        shrink_to(node, size)
        if node.external:
            from cowhand.block.formats.qcow2 import datafile

            datafile.shrink(node, size)
        return
    had = node.header.l1_size
    grow_l1(node, -(-size // (1 << node.mapping.table_shift)), exact=True)
    # The old table's room may be taken again at once: the header names the new one stably, and nobody else uses the node.
    node.flush()
    node.release_quarantine()
    if size == old:
        return
    if had and had != node.header.l1_size:
        # The old table's place is free at once, as in QEMU: no request is in flight.
        node.flush()
        node.release_quarantine(everything=True)
    if node.raw_data and preallocation == "off":
        preallocation = "metadata"
    begin, longer = _hide_tail(node, old, size)
    if node.external and preallocation == "off":
        from cowhand.block.formats.qcow2 import datafile

        datafile.resize(node, size)
    if preallocation != "off":
        from cowhand.block.formats.qcow2.preallocate import preallocate

        preallocate(node, old, size, preallocation, transparent=not longer)
    # As in QEMU all that is new says so then, also behind the backing file's end; what has its place keeps it.
    if longer and preallocation in ("off", "metadata"):
        _zero(node, begin, size)
    node.flush()
    set_size(node, size)


def _hide_tail(node: Qcow2Node, old: int, new: int) -> tuple[int, bool]:
    """Make the rest of the last cluster read as zeroes: what a longer backing file would show, and what an earlier, longer life left there.

    Returns where the next cluster begins, and whether the backing file is longer than the disk was.
    """
    backing = node.backing
    longer = backing is not None and backing.node.size > old
    begin = -(-old // node.cluster_size) * node.cluster_size
    position = old
    while position < begin:
        # Subclusters may differ.
        length, flags, _, _ = node.map(position, begin - position)
        if (longer and not flags & (DATA | ZERO)) or (
            flags & DATA and not _zero_behind(node, position, position + length)
        ):
            node.write(position, (bytes(max(0, min(begin, new) - position)),))
            break
        position += length
    return begin, longer


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


def _zero_behind(node: Qcow2Node, begin: int, end: int) -> bool:
    data = bytearray(end - begin)
    node.read_into(begin, data)
    return is_zero(data)
