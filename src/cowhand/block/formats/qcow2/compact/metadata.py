"""Compacting qcow2: metadata that lies behind free clusters moves into them (QEMU ``docs/interop/qcow2``).

L1 tables, the snapshot table, refcount table and blocks, and bitmaps with their directory. Each move is: count and write the copy, flush, change one
reference inside one sector, flush, free the old place. A crash leaks the one or the other. An encryption header stays where it is.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2 import overlap
from cowhand.block.formats.qcow2.bitmap import data as bitmapdata
from cowhand.block.formats.qcow2.bitmap.directory import StoredBitmap
from cowhand.block.formats.qcow2.bitmap.header_switch import switch_directory
from cowhand.block.formats.qcow2.metadata import cluster_sets
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.snapshot.operations import store_table
from cowhand.block.formats.qcow2.snapshot.table import Snapshot, read_l1
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.metadata.cluster_sets import Clusters


def move_down(node: Qcow2Node, used: int) -> int:
    """Move each piece of metadata to the lowest room before it that is free; return the bytes moved. Nothing else uses *node*, which is sound.

    *used* clusters are in use: so far reference counts have blocks afterwards, since free clusters without one cannot be taken.
    """
    moved = 0
    steps: tuple[Callable[[Qcow2Node], int], ...] = (
        _refcount_blocks,
        _refcount_table,
        _active_l1,
        _snapshots,
        _bitmaps,
    )
    with node.exclusive():
        node.rebuild_metadata_map()
        for first in range(0, used, node.refcounts.per_block):
            node.refcounts.add_block(first)
        node.write_back.flush_refcounts()
    for step in steps:
        moved += step(node) * node.cluster_size
        settle(node)
    return moved


def settle(node: Qcow2Node) -> None:
    """Make everything stable, and free what was given up."""
    node.changed = True
    node.flush()
    node.release_quarantine(everything=True)
    node.flush()


def occupied(node: Qcow2Node) -> Iterator[Clusters]:
    """Yield the clusters of all metadata but L2 tables: who moves one of them as data leaves the metadata without a count.

    No check finds it wrong that a damaged image's table names one of them, as long as the count says so.
    """
    for region in overlap.regions(node):
        if region.name not in (cluster_sets.ACTIVE_L2, cluster_sets.INACTIVE_L2):
            yield region.clusters
    for entry in node.bitmap_directory:
        if entry.at >= 0:
            yield overlap.span(node, entry.table, entry.entries * L.ENTRY_SIZE)
            words = bitmapdata.read_table(node, entry)
            yield {(word & L.BITMAP_TABLE_OFFSET_MASK) // node.cluster_size for word in words}


def _lower(node: Qcow2Node, place: int, clusters: int) -> bool:
    """Tell whether *clusters* adjoining ones are free before cluster *place*, with blocks that count them."""
    if not clusters:
        return False
    refcounts = node.refcounts
    # Whatever is freed here lies behind what was taken for it, so that nothing below this is free until the end.
    refcounts.free_index = refcounts.find_free(refcounts.free_index, 1)
    if refcounts.free_index >= place:
        return False
    first = refcounts.find_free(refcounts.free_index, clusters)
    return first + clusters <= place and all(
        refcounts.get_or_none(cluster) is not None for cluster in range(first, first + clusters)
    )


@contextmanager
def _searching(node: Qcow2Node) -> Iterator[None]:
    """Take several clusters together in the ``with`` block: smaller gaps before them stay known."""
    first = node.refcounts.free_index
    try:
        yield
    finally:
        node.refcounts.free_index = min(node.refcounts.free_index, first)


def _refcount_blocks(node: Qcow2Node) -> int:
    refcounts, moved = node.refcounts, 0
    for index in range(len(refcounts.table) // 8):
        offset = refcounts.block_offset(index)
        old = offset // node.cluster_size
        if not offset or not _lower(node, old, 1):
            continue
        with node.exclusive():
            place = node.allocator.take(1)
            try:
                node.write_back.flush_refcounts()
                block = refcounts.block(index)
                assert block is not None
                node.write_metadata(place * node.cluster_size, bytes(block.data))
                node.flush_file()
                at = node.header.refcount_table_offset + index * 8
                entry = L.U64.pack(place * node.cluster_size)
                node.switch(at, bytes(refcounts.table[index * 8 : index * 8 + 8]), entry)
            except CowhandError:
                node.allocator.untake(place, 1)
                raise
            refcounts.table[index * 8 : index * 8 + 8] = entry
            block.host = place * node.cluster_size
            node.metadata.remove(old, 1)
            node.metadata.add(place, 1)
            refcounts.change(old, 1, -1)
            node.write_back.flush_refcounts()
        moved += 1
    return moved


def _refcount_table(node: Qcow2Node) -> int:
    header, size = node.header, node.cluster_size
    clusters = header.refcount_table_clusters
    if not _lower(node, header.refcount_table_offset // size, clusters):
        return 0
    with node.exclusive():
        with _searching(node):
            place = node.allocator.take(clusters)
        try:
            node.write_back.flush_refcounts()
            node.write_metadata(place * size, bytes(node.refcounts.table))
            node.flush_file()
            node.refcounts.switch_table(place, node.refcounts.table)
        except CowhandError:
            node.allocator.untake(place, clusters)
            raise
    return clusters


def _active_l1(node: Qcow2Node) -> int:
    from cowhand.block.formats.qcow2.resize.grow import replace_l1

    header, size = node.header, node.cluster_size
    clusters = -(-header.l1_size * L.ENTRY_SIZE // size)
    if not _lower(node, header.l1_offset // size, clusters):
        return 0
    with node.exclusive(), _searching(node):
        replace_l1(node, header.l1_size)
    return clusters


def _snapshots(node: Qcow2Node) -> int:
    """Move the L1 tables of snapshots, and their table, which has to be written anew for that."""
    size, moved = node.cluster_size, 0
    taken: list[tuple[int, int]] = []
    given_up: list[tuple[int, int]] = []
    snapshots: list[Snapshot] = []
    with node.exclusive(), _searching(node):
        try:
            for snapshot in node.snapshots:
                clusters = -(-snapshot.l1_size * L.ENTRY_SIZE // size)
                old = snapshot.l1_offset // size
                if _lower(node, old, clusters) and node.refcounts.get(old) == 1:
                    with _searching(node):
                        place = node.allocator.take(clusters)
                    taken.append((place, clusters))
                    given_up.append((old, clusters))
                    node.write_metadata(place * size, read_l1(node, snapshot))
                    snapshot = copy.copy(snapshot)
                    snapshot.l1_offset = place * size
                    moved += clusters
                snapshots.append(snapshot)
            clusters = -(-node.snapshot_table_bytes // size)
            if not moved and not _lower(node, node.header.snapshots_offset // size, clusters):
                return 0
            node.flush_file()
            store_table(node, snapshots)
        except CowhandError:
            if node.poison is None and node.snapshots is not snapshots:
                for place, count in taken:
                    node.allocator.untake(place, count)
            raise
        for old, count in given_up:
            node.refcounts.change(old, count, -1)
        node.rebuild_metadata_map()
    return moved + clusters


def _bitmaps(node: Qcow2Node) -> int:
    """Move what bitmaps have stored, their tables and the directory; all of it is named by one switch in the header."""
    directory, size = node.bitmap_directory, node.cluster_size
    if not directory.present or directory.broken or not directory.readable or directory.outdated or directory.changed:
        return 0
    if any(entry.at < 0 for entry in directory):
        return 0
    taken: list[tuple[int, int]] = []
    given_up: list[tuple[int, int]] = []
    with node.exclusive():
        try:
            fresh = [_moved_bitmap(node, entry, taken, given_up) for entry in directory]
            clusters = -(-directory.size // size)
            if not taken and not _lower(node, directory.offset // size, clusters):
                return 0
            data = b"".join(entry.encode() for entry in fresh)
            with _searching(node):
                place = node.allocator.take(clusters)
            taken.append((place, clusters))
            given_up.append((directory.offset // size, clusters))
            node.write_metadata(place * size, data)
            node.write_back.flush_refcounts()
            node.flush_file()
            switch_directory(node, L.BITMAP_EXTENSION.pack(len(fresh), 0, len(data), place * size))
        except CowhandError:
            if node.poison is None:
                for first, count in taken:
                    node.allocator.untake(first, count)
            raise
        directory.entries, directory.offset = fresh, place * size
        for first, count in given_up:
            node.refcounts.change(first, count, -1)
        node.rebuild_metadata_map()
    return sum(count for _, count in taken)


def _moved_bitmap(
    node: Qcow2Node, entry: StoredBitmap, taken: list[tuple[int, int]], given_up: list[tuple[int, int]]
) -> StoredBitmap:
    """Return *entry* with what can be stored before where it lies written there."""
    size = node.cluster_size
    words = bitmapdata.read_table(node, entry)
    changed = False
    for index, word in enumerate(words):
        old = (word & L.BITMAP_TABLE_OFFSET_MASK) // size
        if old and _lower(node, old, 1):
            data = bitmapdata.cluster_content(node, word)
            assert data is not None
            words[index] = _put(node, data, old, 1, taken, given_up)
            changed = True
    clusters, old = -(-entry.entries * L.ENTRY_SIZE // size), entry.table // size
    if not changed and not _lower(node, old, clusters):
        return entry
    new = copy.copy(entry)
    new.table = _put(node, bitmapdata.encode_table(words), old, clusters, taken, given_up)
    return new


def _put(
    node: Qcow2Node, data: bytes, old: int, clusters: int, taken: list[tuple[int, int]], given_up: list[tuple[int, int]]
) -> int:
    with _searching(node):
        place = node.allocator.take(clusters)
    taken.append((place, clusters))
    given_up.append((old, clusters))
    node.write_metadata(place * node.cluster_size, data)
    return place * node.cluster_size
