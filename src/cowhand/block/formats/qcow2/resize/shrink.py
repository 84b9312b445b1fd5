"""Shrinking a qcow2 image: what lies behind the new end is given up, then the size changes, then the file becomes shorter.

Each step is stable before the next begins. After a crash in the middle the image has its old size, and what was given up reads as zeroes or
as its backing file; nothing before the new end is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cowhand.block.format_io.reservations import Kind
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def shrink_to(node: Qcow2Node, size: int) -> None:
    """Make the disk *size* bytes long, less than it is. Nobody else uses the node meanwhile."""
    from cowhand.block.formats.qcow2.resize.grow import set_size

    if not node.like_qemu:  # which meets the damage on its way
        node.refcounts.verification.require()
    unit = node.cluster_size
    begin, end = -(-size // unit) * unit, -(-node.header.size // unit) * unit
    if begin < end:
        _step("Failed to discard cropped clusters", lambda: node.change(begin, end - begin, Kind.EMPTY))
    _step("Failed to reduce the number of L2 tables", lambda: _drop_tables(node, size))
    _settle(node)
    _step("Failed to discard unused refblocks", lambda: _drop_blocks(node))
    node.flush()
    set_size(node, size)
    _cut_tail(node)


def _step(text: str, action: Callable[[], None]) -> None:
    try:
        action()
    except CowhandError as error:
        raise error.within(qemu=text) from None


def _drop_blocks(node: Qcow2Node) -> None:
    drop_refblocks(node)


def _settle(node: Qcow2Node) -> None:
    """Forget on disk what was given up, then count it down: nobody can reach it any more."""
    node.flush()
    node.release_quarantine(everything=True)
    node.flush()


def _drop_tables(node: Qcow2Node, size: int) -> None:
    mapping = node.mapping
    with node.exclusive():
        for index in range(-(-size >> mapping.table_shift), node.header.l1_size):
            entry = mapping.l1_entry(index)
            if not entry & L.L1_OFFSET_MASK:
                continue
            cluster = mapping.l2_offset(index) >> mapping.cluster_bits
            mapping.set_l1(index, 0)
            mapping.cache.drop(index)
            node.metadata.remove(cluster, 1)
            node.allocator.free(cluster, 1)
            node.changed = True


def drop_refblocks(node: Qcow2Node, first: int = 0) -> int:
    """Free refcount blocks, from number *first* on, that count nothing but themselves; return how many."""
    refcounts = node.refcounts
    unused: list[tuple[int, int]] = []
    with node.exclusive():
        for index in range(first, len(refcounts.table) // 8):
            offset = L.U64.unpack_from(refcounts.table, index * 8)[0] & L.REFCOUNT_TABLE_OFFSET_MASK
            if not offset:
                continue
            if _counts_nothing(node, index, offset):
                unused.append((index, offset // node.cluster_size))
        # No entry is left that names what is then freed; nor one for a block that cannot be.
        for index, cluster in unused:
            at = node.header.refcount_table_offset + index * 8
            node.switch(at, bytes(refcounts.table[index * 8 : index * 8 + 8]), bytes(8))
            refcounts.table[index * 8 : index * 8 + 8] = bytes(8)
            refcounts.cache.drop(index)
            node.metadata.remove(cluster, 1)
        for index, cluster in unused:
            if cluster // refcounts.per_block == index:
                continue  # its count is gone with it
            if refcounts.get_or_none(cluster) is None:
                text = f"Refblock at {cluster * node.cluster_size:#x} is not covered by the refcount structures"
                raise node.mark_corrupt(text, offset=node.header.refcount_table_offset + index * 8)
            refcounts.change(cluster, 1, -1)
    return len(unused)


def _counts_nothing(node: Qcow2Node, index: int, offset: int) -> bool:
    """Tell whether refcount block *index*, which lies at *offset*, counts nothing but itself."""
    refcounts = node.refcounts
    if offset % node.cluster_size:
        text = f"Cannot get entry from refcount block cache: Offset {offset:#x} is unaligned"
        raise node.mark_corrupt(text, offset=node.header.refcount_table_offset + index * 8)
    if offset >= node.file.node.size:
        return True  # behind the end of the file lie zeroes
    block = refcounts.block(index)
    assert block is not None
    cluster = offset // node.cluster_size
    used = refcounts.per_block - refcounts.counts.zeros(block.data, 0, refcounts.per_block)
    own = (
        cluster // refcounts.per_block == index and refcounts.counts.get(block.data, cluster % refcounts.per_block) != 0
    )
    return used == own


def _cut_tail(node: Qcow2Node) -> None:
    """Make the file end behind its last cluster in use. A failure only costs space."""
    file, unit = node.file.node, node.cluster_size
    try:
        with node.lock:
            found = node.refcounts.verification.run()
            cluster = max(node.refcounts.last_used(-(-file.size // unit)), found.last() if found is not None else 0)
    except CowhandError as error:
        diagnostics.report(f"the tail of the image is not cut off: {error.qemu()}", as_tool=True)
        return
    end = (cluster + 1) * unit
    if end >= file.size or not file.capabilities.resizable:
        return
    try:
        file.resize(end, shrink=True)
    except CowhandError as error:
        diagnostics.report(f"Failed to truncate the tail of the image: {error.qemu()}", as_tool=True)
    else:
        node.allocator.high_water = min(node.allocator.high_water, end)
