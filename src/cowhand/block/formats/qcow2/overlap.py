"""What of a qcow2 file is metadata: so that nothing else is ever written there, whatever a damaged or hostile image claims.

QEMU's kinds and texts. Unlike QEMU, which looks at what it has cached, everything that is known of the active tables is checked always;
inactive tables (of snapshots) only with ``overlap-check=all``, as there, since they have to be read for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2 import layout as L

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


class MetadataMap:
    """The host clusters that hold metadata. Changed with the allocation lock held; ``in`` needs no lock."""

    def __init__(self) -> None:
        self._clusters: set[int] = set()

    @property
    def clusters(self) -> set[int]:
        """The set itself, for the one hot test: is this cluster metadata?"""
        return self._clusters

    def add(self, first: int, count: int) -> None:
        self._clusters.update(range(first, first + count))

    def remove(self, first: int, count: int) -> None:
        self._clusters.difference_update(range(first, first + count))

    def clear(self) -> None:
        self._clusters.clear()


def regions(node: Qcow2Node) -> Iterator[tuple[str, int, int]]:
    """Yield (QEMU's name of the kind, host offset, length in bytes) of all metadata that the tables in memory tell of."""
    header = node.header
    cluster = node.cluster_size
    yield "qcow2_header", 0, cluster
    yield "active L1 table", header.l1_offset, header.l1_size * 8
    for entry in node.mapping.l1_entries():
        if entry & L.L1_OFFSET_MASK:
            yield "active L2 table", entry & L.L1_OFFSET_MASK, cluster
    yield "refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster
    for (entry,) in L.U64.iter_unpack(bytes(node.refcounts.table)):
        if entry & L.REFCOUNT_TABLE_OFFSET_MASK:
            yield "refcount block", entry & L.REFCOUNT_TABLE_OFFSET_MASK, cluster
    if header.snapshot_count:
        yield "snapshot table", header.snapshots_offset, node.snapshot_table_bytes
    for snapshot in node.snapshots:
        yield "inactive L1 table", snapshot.l1_offset, snapshot.l1_size * 8


def build(node: Qcow2Node) -> MetadataMap:
    """Return the map of *node*'s metadata. Offsets beyond the format's limit are left out: nothing can be written there."""
    out = MetadataMap()
    bits = node.header.cluster_bits
    for _, offset, length in regions(node):
        if length > 0 and offset < L.MAX_HOST_OFFSET:
            first = offset >> bits
            out.add(first, ((offset + length - 1) >> bits) - first + 1)
    if node.overlap_check_all:
        for offset in node.inactive_l2_tables():
            out.add(offset >> bits, 1)
    return out


def owner(node: Qcow2Node, offset: int, length: int) -> str | None:
    """Return QEMU's name of the metadata that ``[offset, offset + length)`` touches, or None."""
    end = offset + length
    for name, start, size in regions(node):
        if size > 0 and start < end and offset < start + size:
            return name
    if node.overlap_check_all:
        for table in node.inactive_l2_tables():
            if table < end and offset < table + node.cluster_size:
                return "inactive L2 table"
    return None
