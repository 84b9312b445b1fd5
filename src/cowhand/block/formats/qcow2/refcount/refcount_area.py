"""Areas of a qcow2 file that describe themselves: a new refcount table with the blocks that it lacks (QEMU ``docs/interop/qcow2``, "Refcounts").

Such an area lies behind everything that is in use, and counts itself. One header field makes it valid. How large it becomes is QEMU's reckoning,
since its tests know the offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import ImageCorrupt, NoSpace

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.refcount.refcounts import Refcounts


def blocks_needed(clusters: int, cluster_size: int, per_block: int, *, generous: bool) -> int:
    """Return how many refcount blocks count *clusters* and, behind these, the blocks themselves and their table.

    Blocks that exist are among the clusters and counted once more, as by QEMU, so there are some to spare. *generous* leaves room for half as
    many clusters of the table again.
    """
    per_table_cluster = cluster_size // 8
    blocks = table = 0
    last = -1
    while True:
        blocks = -(-(clusters + table + blocks) // per_block)
        table = -(-blocks // per_table_cluster)
        size = clusters + blocks + table
        if size == last:
            if not generous:
                return blocks
            clusters += -(-table // 2)
            generous = False
        last = size


def make(
    refcounts: Refcounts,
    start: int,
    *,
    extra: int = 0,
    exact: bool = False,
    known: tuple[int, int] | None = None,
) -> int:
    """Move the table to a new area from cluster *start* on, where nothing is; return the first cluster behind the area. Both locks are held.

    Blocks are made for the area and for *extra* clusters behind it, which stay free. *exact*: the table has no room to grow. *known* is
    (index, cluster) of a block that is on disk already and that only the new table names. On an error the old table stands.
    """
    node, size, per_block = refcounts.node, refcounts.cluster_size, refcounts.per_block
    total = blocks_needed(start + extra, size, per_block, generous=not exact)
    per_table_cluster = size // 8
    entries = total if exact else total + -(-total // 2)
    entries = max(entries, len(refcounts.table.rstrip(b"\0")) + 7 >> 3)
    entries = -(-entries // per_table_cluster) * per_table_cluster
    if entries * 8 > L.MAX_REFCOUNT_TABLE_BYTES:
        raise NoSpace("the refcount table cannot grow any more", path=node.filename, errno=27)
    table = bytearray(refcounts.table[: entries * 8]).ljust(entries * 8, b"\0")
    if known is not None:
        L.U64.pack_into(table, known[0] * 8, known[1] * size)
    missing = [i for i in range(start // per_block, total) if not L.U64.unpack_from(table, i * 8)[0]]
    table_start = start + len(missing)
    end = table_start + entries // per_table_cluster
    if refcounts.find_free(start, end - start) != start:
        raise ImageCorrupt(
            f"there is no room for reference counts at {start * size:#x}: something refers to these clusters", path=node.filename,
            offset=start * size, qemu="Input/output error", hint="Repair the image: check --repair all.",
        )  # fmt: skip
    node.check_overlap(start * size, (end - start) * size)
    blocks = _new_blocks(refcounts, missing, start, end)
    for index, block in blocks:
        L.U64.pack_into(table, index * 8, block.host)
    # What lies in blocks that exist is counted there, stably, before anything refers to it.
    counted = _raise_counts(refcounts, start, end, set(missing))
    try:
        node.write_back.flush_refcounts()
        if blocks:
            node.fire("refblock_alloc_write_blocks")
            node.write_metadata(start * size, b"".join(block.data for _, block in blocks))
        node.fire("refblock_alloc_write_table")
        node.write_metadata(table_start * size, table)
        node.flush_file()
        node.fire("refblock_alloc_switch_table")
        refcounts.switch_table(table_start, table)
    except BaseException:
        for first, count in counted:
            refcounts.change(first, count, -1)
        raise
    for index, block in blocks:
        refcounts.cache.put(index, block)
    refcounts.verification.again()
    node.metadata.add(start, len(blocks))
    node.allocator.use(start, end - start)
    return end


def _new_blocks(refcounts: Refcounts, missing: list[int], start: int, end: int) -> list[tuple[int, Table]]:
    """Return (index, block) of the *missing* ones, which lie from cluster *start* on; they count ``[start, end)`` as far as it is theirs."""
    size, per_block = refcounts.cluster_size, refcounts.per_block
    blocks = []
    for number, index in enumerate(missing):
        data = bytearray(size)
        low, high = max(start, index * per_block), min(end, (index + 1) * per_block)
        if low < high:
            refcounts.counts.fill(data, low - index * per_block, high - low, 1)
        blocks.append((index, Table(data, (start + number) * size)))
    return blocks


def _raise_counts(refcounts: Refcounts, start: int, end: int, missing: set[int]) -> list[tuple[int, int]]:
    """Count those of the clusters ``[start, end)`` whose block is not *missing*; return [(first, count)]."""
    per_block = refcounts.per_block
    parts: list[tuple[int, int]] = []
    position = start
    while position < end:
        index = position // per_block
        stop = min(end, (index + 1) * per_block)
        if index not in missing:
            parts.append((position, stop - position))
        position = stop
    done: list[tuple[int, int]] = []
    try:
        for first, count in parts:
            refcounts.change(first, count, 1)
            done.append((first, count))
    except BaseException:
        for first, count in done:
            refcounts.change(first, count, -1)
        raise
    return parts
