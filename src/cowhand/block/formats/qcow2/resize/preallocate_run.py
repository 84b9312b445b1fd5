"""Growing a qcow2 image by one run of clusters whose space is taken from the file system (preallocation "falloc" and "full").

Where things lie is as in QEMU, whose tests know it: behind the last cluster in use a refcount table that counts all of what follows, then the
guest's new clusters, and L2 tables wherever there is room. The order is safe: the table is switched, the space taken, and only then refer
L2 entries to it.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cowhand.block.format_io.blank_file import check_room
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.cluster.allocation import EntryChange, writable_table
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount import refcount_area
from cowhand.block.node.node import Zeroing
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Clusters for L2 tables that the counts allow for beyond those that the run's length needs: it may begin and end inside a table.
_PARTIAL_TABLES = 2


def grow(node: Qcow2Node, begin: int, end: int, mode: str, *, hide_backing: bool) -> None:
    """Give the clusters of ``[begin, end)`` their places, one behind the other; nobody else uses the node.

    What the first of them held before *begin* moves with it; all else reads as zeroes, or with subclusters and without *hide_backing* as the
    backing file. Mode "falloc" reserves the space, "full" writes zeroes. On an error the clusters that nothing refers to yet are given back.
    """
    unit = node.cluster_size
    start = begin - begin % unit
    count = -(-(end - start) // unit)
    with node.exclusive():
        first, held = _take(node, count)
    linked = 0
    try:
        _take_space(node, first * unit, count * unit, held, mode)
        if start < begin:
            head = memoryview(bytearray(begin - start))
            node.read_into(start, head)
            node.store(node.data_child, first * unit, start, (head,))
            node.write_back.barrier = True
        while linked < count:
            linked += _link(node, start + linked * unit, first + linked, count - linked, begin, hide_backing)
    except CowhandError:
        with node.lock:
            node.allocator.untake(first + linked, count - linked)
        raise
    except BaseException as error:
        node.set_poison(error)  # it is not known how far the run is linked
        raise


def _take(node: Qcow2Node, count: int) -> tuple[int, int]:
    """Count *count* clusters behind all others and a new refcount table; return the first, and the offset from which on the file is empty."""
    refcounts = node.refcounts
    size = node.file.node.size
    behind = refcounts.last_used(-(-size // node.cluster_size)) + 1
    tables = -(-count // node.mapping.entries) + _PARTIAL_TABLES
    first = refcount_area.make(refcounts, behind, extra=count + tables, exact=True)
    have = node.allocator.take_at(first, count)
    assert have == count, "the file ends before this run"
    node.changed = True
    return first, size


def _take_space(node: Qcow2Node, begin: int, length: int, held: int, mode: str) -> None:
    """Have host ``[begin, begin + length)`` occupy space and read as zeroes; up to *held* the file had other bytes before."""
    file, end = node.file, begin + length
    try:
        check_room(file.node, end)
    except CowhandError as error:
        raise error.within(qemu="Could not resize image") from None
    if not file.node.capabilities.resizable:
        held = end
    for position in range(begin, min(held, end), ZEROES_SIZE):
        step = min(ZEROES_SIZE, min(held, end) - position)
        if file.node.capabilities.zeroes is not Zeroing.NONE:
            file.write_zeroes(position, step)
        else:
            file.write(position, (ZEROES[:step],))
    if end > file.node.size:
        file.node.resize(end, preallocation=mode)


def _link(node: Qcow2Node, offset: int, cluster: int, count: int, begin: int, hide_backing: bool) -> int:
    """Refer the guest's clusters from *offset* on, inside one L2 table, to host *cluster* and following; return how many."""
    mapping = node.mapping
    with node.lock:
        crowded = mapping.cache.trim() and len(mapping.cache.dirty) * node.cluster_size > mapping.cache.limit // 2
    if crowded:
        node.flush()
    with node.exclusive():
        table = writable_table(node, offset >> mapping.table_shift)
        first = offset >> mapping.cluster_bits & mapping.entries - 1
        count = min(count, mapping.entries - first)
        host = cluster * node.cluster_size | L.COPIED
        entries = array("Q", range(host, host + count * node.cluster_size, node.cluster_size))
        if node.extended:
            entries = _with_bitmaps(table, first, entries, hide_backing, max(0, begin - offset))
        entries.byteswap()
        EntryChange(table, first * (2 if node.extended else 1), entries.tobytes(), barrier=True).link(node)
        node.changed = True
    return count


def _with_bitmaps(table: Table, first: int, entries: array[int], hide_backing: bool, kept: int) -> array[int]:
    """Return extended *entries*: subclusters stay what they were, unless a backing file is to be hidden."""
    pairs = array("Q", bytes(16 * len(entries)))
    pairs[::2] = entries
    if hide_backing:
        pairs[1::2] = array("Q", [L.U32.unpack(b"\xff" * 4)[0]]) * len(entries)
        return pairs
    old = array("Q", bytes(table.data[first * 16 : (first + len(entries)) * 16]))
    old.byteswap()
    pairs[1::2] = old[1::2]
    if old[0] & L.ENTRY_COMPRESSED and kept:
        pairs[1] = 0xFFFFFFFF
    return pairs
