"""How much of its file an image may still allocate from, and what tables new clusters need."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.counted import native
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_CODES = {0: "B", 1: "B", 2: "B", 3: "B", 4: "H", 5: "I", 6: "Q"}


def unused_space(node: Qcow2Node, end: int) -> int | None:
    """Return the bytes of whole clusters before *end* of the file that nothing uses; None where the counts cannot be read."""
    cluster, refcounts = node.cluster_size, node.refcounts
    clusters = end // cluster
    order = node.header.refcount_order
    code = _CODES[order]
    free, counted = 0, 0
    try:
        for index in range(min(-(-clusters // refcounts.per_block), len(refcounts.table) // L.ENTRY_SIZE)):
            if not refcounts.block_offset(index):
                continue
            block = refcounts.block(index)
            refcounts.cache.trim()
            if block is None:
                continue
            count = min(refcounts.per_block, clusters - index * refcounts.per_block)
            values = array(code, native(block.data, order))
            counted += count
            free += values[:count].count(0)
    except CowhandError:
        return None
    return (free + clusters - counted) * cluster


def tables_needed(node: Qcow2Node, ranges: Iterable[tuple[int, int]]) -> int:
    """Return the bytes of L2 tables and refcount blocks that new clusters for *ranges*, (offset, length) of the disk and rising, need."""
    shift = node.mapping.table_shift
    tables = clusters = 0
    last = -1
    for offset, length in ranges:
        clusters += -(-length // node.cluster_size)
        for index in range(max(offset >> shift, last + 1), (offset + length - 1 >> shift) + 1):
            tables += not node.mapping.l1_entry(index) & L.L1_OFFSET_MASK
            last = index
    # Where nothing is free in the middle, new clusters lie behind the end, where no block counts them yet.
    per_block = node.refcounts.per_block
    end = -(-node.file.node.size // node.cluster_size)
    blocks = max(0, -(-(end + clusters + tables) // per_block) - -(-end // per_block)) if not node.external else 0
    return (tables + blocks) * node.cluster_size
