"""A snapshot of qcow2 as a disk of its own, for reading only, beside the active one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.bitmap.directory import Directory
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.formats.qcow2.metadata.options import Qcow2Options
from cowhand.block.formats.qcow2.refcount.refcounts import Refcounts
from cowhand.block.formats.qcow2.snapshot.operations import find
from cowhand.block.formats.qcow2.snapshot.table import read_l1
from cowhand.block.graph import graph
from cowhand.block.node.node import ALL_PERMISSIONS, CONSISTENT_READ, Capabilities, Child, Role
from cowhand.core.locks import RANK_LEAF, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.snapshot.table import Snapshot

_counting = ranked_lock(RANK_LEAF, "snapshot views")


class SnapshotView(Qcow2Node):
    """Reads one snapshot of ``origin``, whose file and backing file it shares.

    What a snapshot's tables refer to does not change while the snapshot exists, so the two need not know of each other's doings.
    """

    origin: Qcow2Node
    snapshot: Snapshot

    @classmethod
    def of(cls, origin: Qcow2Node, ident: str, name: str) -> SnapshotView:
        """Return a view of a snapshot. Raises SnapshotNotFound, and InvalidFormat when its tables are not possible."""
        # Nobody deletes it between the look for it and the note that it is being read.
        with origin.operation:
            snapshot = find(origin, ident, name)
            l1 = bytearray(read_l1(origin, snapshot))
            with _counting:
                origin.views[snapshot.l1_offset] = origin.views.get(snapshot.l1_offset, 0) + 1
        return cls._over(origin, snapshot, l1)

    @classmethod
    def _over(cls, origin: Qcow2Node, snapshot: Snapshot, l1: bytearray) -> SnapshotView:
        view = cls(Qcow2Options(read_only=True))
        view.origin, view.snapshot = origin, snapshot
        view.header = copy.copy(origin.header)
        view.header.size, view.header.l1_size, view.header.l1_offset = (
            snapshot.disk_size,
            snapshot.l1_size,
            snapshot.l1_offset,
        )
        view.cluster_size = view.allocation_unit = origin.cluster_size
        view.copy_unit = origin.copy_unit
        view.limits = origin.limits
        view.capabilities = Capabilities()
        view.event_sink = origin.event_sink
        view.cut_reads_as_zeroes = origin.cut_reads_as_zeroes
        view._preallocated = origin.metadata_preallocated
        try:
            view.file = graph.attach(view, "file", origin.file.node, Role.PRIMARY)
            view.data_child = view.file
            if origin.data_child is not origin.file:
                view.data_child = graph.attach(view, origin.data_child.name, origin.data_child.node, Role.DATA)
            if origin.backing is not None:
                graph.attach(view, "backing", origin.backing.node, Role.BACKING)
            view.bitmap_directory = Directory(view)  # bitmaps tell of the active disk
            view.refcounts = Refcounts(view, origin.refcounts.table)
            view.extended = origin.extended
            view.mapping = type(origin.mapping)(view, l1)
            if origin.encryption is not None:
                view.be_encrypted(origin.encryption.of(view))
        except BaseException:
            graph.close_node(view)
            raise
        return view

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        # The origin may be written meanwhile; not where this one reads.
        return CONSISTENT_READ, ALL_PERMISSIONS

    def close(self) -> None:
        views = self.origin.views
        with _counting:
            left = views.get(self.snapshot.l1_offset, 1) - 1
            if left:
                views[self.snapshot.l1_offset] = left
            else:
                views.pop(self.snapshot.l1_offset, None)
