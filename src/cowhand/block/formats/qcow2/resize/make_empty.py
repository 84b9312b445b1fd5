"""Emptying a whole qcow2 image at once, after a commit: new, small tables at the file's beginning, and the file ends behind them.

What the guest had stored is meant to go, so tables may be overwritten by zeroes; order only has to see to it that the file opens at any
moment and names nothing that is not there. The dirty bit is set before the first change: after a crash the reference counts are made anew.
Source: QEMU ``docs/interop/qcow2``; the places are those at which a new image has its tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.ondisk import layout as L

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Clusters before the L1 table: the header's, the refcount table's, and that of its only block.
_BEFORE_L1 = 3


def make_empty(node: Qcow2Node) -> bool:
    """Make *node*, which nobody else uses meanwhile, an image that stores nothing; False when its tables have to be gone through instead.

    Raises CowhandError; then *node* writes nothing more, and what is in the file shows its backing file once it is opened again.
    """
    node.check_writable()
    with node.operation:
        node.settle()
        clusters = _BEFORE_L1 + -(-node.header.l1_size * 8 // node.cluster_size)
        if not _can_be_cut(node, clusters):
            return False
        with node.exclusive():
            if not node.lazy:
                node.set_incompatible(node.header.incompatible | L.INCOMPAT_DIRTY)
            # From here on memory and file differ in what no write-back could put right.
            node.changed = False
            try:
                _forget_content(node)
                in_place = _in_place(node)
                _move_tables(node, clusters, in_place=in_place)
                _count(node, clusters, in_place=in_place)
                if node.file.node.size > clusters * node.cluster_size:
                    node.file.node.resize(clusters * node.cluster_size, shrink=True)
                node.file.flush()
                node.allocator.high_water = clusters * node.cluster_size
                if not node.lazy:
                    node.set_incompatible(node.header.incompatible & ~L.INCOMPAT_DIRTY)
            except BaseException as error:
                node.changed = False
                node.set_poison(error)
                raise
            node.rebuild_metadata_map()
    return True


def _can_be_cut(node: Qcow2Node, clusters: int) -> bool:
    """Tell whether nothing but the header, the counts and the L1 table has to stay, and one refcount block counts these."""
    header = node.header
    return (
        header.version >= 3
        and not node.snapshots
        and not node.views
        and not node.bitmap_directory.present
        and not node.bitmap_directory.entries
        and header.crypt_method != L.CRYPT_LUKS
        and not node.external
        and node.encryption is None
        and node.file.node.capabilities.resizable
        and clusters <= node.refcounts.per_block
    )


def _forget_content(node: Qcow2Node) -> None:
    """Make the L1 table say that nothing is allocated, stably: from now on the rest of the file means nothing."""
    l1 = node.mapping.l1
    node.fire("l1_update")
    if l1.data:
        node.file.write_zeroes(l1.host, -(-len(l1.data) // node.cluster_size) * node.cluster_size)
        node.file.flush()
    l1.data[:] = bytes(len(l1.data))
    l1.dirty = 0
    node.mapping.cache.clear()
    node.refcounts.cache.clear()


def _in_place(node: Qcow2Node) -> bool:
    """Tell whether the tables are already where they are meant to be, as in most images: then what they count can go without a moment of disorder."""
    unit, header = node.cluster_size, node.header
    return (
        header.l1_offset == _BEFORE_L1 * unit
        and header.refcount_table_offset == unit
        and header.refcount_table_clusters == 1
        and node.refcounts.table[:8] == L.U64.pack(2 * unit)
    )


def _move_tables(node: Qcow2Node, clusters: int, *, in_place: bool) -> None:
    """Have the header name tables at the file's beginning, all zeroes but for counts that are *in_place*."""
    unit, header, mapping = node.cluster_size, node.header, node.mapping
    node.fire("empty_image_prepare")
    if not in_place:
        node.file.write_zeroes(unit, (clusters - 1) * unit)
        node.file.flush()
    node.fire("l1_update")
    node.fire("reftable_update")
    node.switch_header(l1_offset=_BEFORE_L1 * unit, refcount_table_offset=unit, refcount_table_clusters=1)
    mapping.l1 = Table(mapping.l1.data, header.l1_offset)


def _count(node: Qcow2Node, clusters: int, *, in_place: bool) -> None:
    """Count what is left, in the only block."""
    unit, refcounts, allocator = node.cluster_size, node.refcounts, node.allocator
    block = Table(bytearray(unit), 2 * unit)
    refcounts.counts.fill(block.data, 0, clusters, 1)
    refcounts.table = bytearray(unit)
    L.U64.pack_into(refcounts.table, 0, 2 * unit)
    node.fire("refblock_alloc")
    # Blocks that the table still names have to be counted, and a block that it names has to count the tables.
    writes = [(2 * unit, block.data), (unit, refcounts.table)]
    for offset, data in reversed(writes) if in_place else writes:
        node.file.write(offset, (data,))
        node.file.flush()
    refcounts.cache.put(0, block)
    refcounts.free_index = 0
    allocator.forget()
