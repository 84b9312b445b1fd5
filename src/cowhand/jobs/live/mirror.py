"""Mirror of a running disk: the target becomes, and stays, the same, until the job completes; then the disk's users may go over to it.

Source: QEMU ``blockdev-mirror`` (``qapi/block-core.json``), ``docs/interop/live-block-operations``. With the base of the source's own chain
as target it is the commit of an active image.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.block.disk import Disk
from cowhand.block.filters.mirror_top import MirrorTopNode
from cowhand.block.format_io.block_copy import PIECE, BlockCopy, granule_of
from cowhand.block.graph import graph
from cowhand.block.graph.block_status import layered
from cowhand.block.graph.blockers import Blocker, check_blockers
from cowhand.block.graph.changes import drop_filter, insert_filter, replace_node
from cowhand.block.node.node import BlockNode, Role
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.core.extents import ALLOCATED, ZERO
from cowhand.jobs.job import Job
from cowhand.jobs.live.pieces import Pieces, cut

SYNCS = ("full", "top", "none", "bitmap")
COPY_MODES = ("background", "write-blocking")


class MirrorJob(Job):
    """Copies *source* to *target*, which has the same size, and follows what is written meanwhile.

    *sync*: *full*; *top*, what the topmost image allocates (*depth* layers of it); *none*, only what is written from now on; *bitmap*, what
    *bits* has dirty, for a target that held the rest before. *copy_mode* "write-blocking" writes both sides before a guest's write is
    answered, once the two are the same. *pivot*: at the end of a job that was completed, the source's users use the target. A ready job
    that is cancelled without force ends without the pivot; both sides hold the same at that moment.
    """

    kind: ClassVar[str] = "mirror"
    soft_cancel: ClassVar[bool] = True

    def __init__(
        self,
        ident: str,
        source: BlockNode,
        target: BlockNode,
        *,
        sync: str = "full",
        depth: int = 1,
        bits: Bitmap | None = None,
        granularity: int | None = None,
        copy_mode: str = "background",
        pivot: bool = True,
        target_is_zero: bool = False,
        filter_node_name: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(ident, **common)
        if sync not in SYNCS:
            raise InvalidArgument(
                f"Parameter 'sync' does not accept value '{sync}'", hint=f"One of: {', '.join(SYNCS)}."
            )
        if copy_mode not in COPY_MODES:
            raise InvalidArgument(f"Parameter 'copy-mode' does not accept value '{copy_mode}'")
        if (bits is not None) != (sync == "bitmap"):
            raise InvalidArgument("a bitmap goes with sync mode 'bitmap', and with no other")
        self.source = source
        self.target = target
        self.sync = sync
        self.copy_mode = copy_mode
        self.pivot = pivot
        self._depth = depth
        self._bits = bits
        self._granularity = granularity
        self._target_zero = target_is_zero
        self._filter_name = filter_node_name
        self._blocker = Blocker(f"block device is in use by block job: {self.kind}")
        self._marked = threading.Event()
        self._blocking_failed: CowhandError | None = None
        self.filter: MirrorTopNode | None = None
        self._pivoted = False
        self._copying: BlockCopy
        self._source_disk: Disk
        self._target_disk: Disk

    # -- the filter

    def check(self) -> None:
        """Raise InvalidArgument or NodeBusy where the job is not possible."""
        if self.source is self.target:
            raise InvalidArgument("Can't mirror node into itself")
        check_blockers(self.target, "mirror-target")
        check_blockers(self.source, "mirror-source")

    def install(self) -> None:
        """Mark what is written from now on. Called once, before :meth:`start`."""
        self.check()
        source, target = self.source, self.target
        with graph.quiesce(source, target):
            unit = self._granularity or 1 << 16
            filter = MirrorTopNode(source, Bitmap(source.size, unit), node_name=self._filter_name)
            self.filter = filter
            filter.marked = self._marked.set
            filter.failed = self._target_failed
            try:
                child = graph.attach(filter, "target", target, Role.DATA)
                self._target_disk = Disk(target, writable=True, resizable=False, name=f"{self.id} target")
                if self._granularity is None:
                    filter.dirty = Bitmap(source.size, max(unit, granule_of(child)))
                self._copying = BlockCopy(filter.below, child, filter.dirty, target_zero=self._target_zero)
                self._copying.ranges = filter.ranges
                insert_filter(filter, source)
                self._source_disk = Disk(filter, name=f"{self.id} source")
            except BaseException:
                self.uninstall()
                raise
            self._blocker.block(source)
            self._blocker.block(target)

    def uninstall(self, *, pivoted: bool = False) -> None:
        """Take the filter out and let go of both sides."""
        self._blocker.release()
        filter, self.filter = self.filter, None
        if filter is not None and not filter.closed:
            if filter.parents and not pivoted:
                drop_filter(filter)
            elif not filter.parents:
                graph.close_node(filter)
        for name in ("_source_disk", "_target_disk"):
            disk = self.__dict__.pop(name, None)
            if disk is not None:
                disk.close()

    def _target_failed(self, error: CowhandError) -> None:
        """A write of the guest's reached the source alone: the job copies it later, and hears of the error as of its own."""
        self._blocking_failed = error
        self._marked.set()

    # -- the job

    def run(self) -> None:
        filter = self.filter
        assert filter is not None, "install() comes before start()"
        if filter.size != self.target.size:
            raise InvalidArgument("Source and target image have different sizes")
        self._mark_first(filter)
        dirty, piece = filter.dirty, max(PIECE, filter.dirty.granularity)
        pieces = Pieces(self, (self._source_disk, self._target_disk), self._copy)
        while True:
            self._marked.clear()
            self.progress.total = self.progress.done + dirty.dirty_bytes()
            left = pieces.run(cut(dirty.extents(), piece))
            if self._blocking_failed is not None:
                error, self._blocking_failed = self._blocking_failed, None
                self.handle_error(error, reading=False)
            if not left and not dirty:
                self._write_both(filter)
                self.become_ready()
            if self.completing and not left:
                return
            if not dirty:
                self.pause_point()
                self._wait()

    def _wait(self) -> None:
        """Wait until there is something to do."""
        if not (self.completing or self._pauses):
            self._marked.wait(0.05)

    def _write_both(self, filter: MirrorTopNode) -> None:
        if self.copy_mode == "write-blocking" and filter.target is None:
            with graph.quiesce(filter):
                filter.target = filter.children["target"]

    def _mark_first(self, filter: MirrorTopNode) -> None:
        """Mark what the target lacks; what is written meanwhile is marked already."""
        size, dirty = filter.size, filter.dirty  # the node below may be another one by now
        if self._bits is not None:
            dirty.merge(self._bits)
        if self.sync in ("none", "bitmap"):
            return
        position = 0
        while position < size:
            self.pause_point()
            with self._source_disk.lease():
                rows = layered(filter, position, size - position, self._depth if self.sync == "top" else None)
            for row in rows:
                wanted = row.flags & ALLOCATED if self.sync == "top" else not (self._target_zero and row.flags & ZERO)
                if wanted:
                    dirty.mark(row.start, row.length)
            position = rows.end

    def _copy(self, offset: int, length: int) -> int:
        copying, filter = self._copying, self.filter
        assert filter is not None
        begin, end = copying.aligned(offset, length)
        done = 0
        with filter.ranges.hold(begin, end - begin):
            for position, count in list(filter.dirty.extents(begin, end - begin)):
                # Cleared first: what the guest writes from here on marks it again.
                filter.dirty.clear(position, count)
                try:
                    copying.copy_range(position, count)
                except BaseException:
                    filter.dirty.mark(position, count)
                    raise
                done += count
        return done

    # -- the end

    def prepare(self) -> None:
        filter = self.filter
        assert filter is not None
        with graph.quiesce(filter, self.target):
            # The last bits, with the guest held back.
            for position, count in list(filter.dirty.extents()):
                self._copy(position, count)
            self._target_disk.flush()
            if self.pivot and not self.ending_early:
                self._pivot(filter)

    def _pivot(self, filter: MirrorTopNode) -> None:
        """Have the users of the source use the target; the condition is that both hold the same, which the drain sees to."""
        self._blocker.release()
        keep = [self._source_disk.edge]
        replace_node(filter, self.target, but=keep, flush=False)
        self._pivoted = True

    def commit(self) -> None:
        self.uninstall(pivoted=self._pivoted)

    def abort(self) -> None:
        self.uninstall()


class ActiveCommitJob(MirrorJob):
    """Commit of an active image: what it, and the layers between, allocate goes into *base*; then its users use the base.

    *base* is a node of *top*'s own chain, open for writing.
    """

    kind: ClassVar[str] = "commit"

    def __init__(self, ident: str, top: BlockNode, base: BlockNode, **common: Any) -> None:
        depth, node = 1, _layer(top)
        while node.backing is not None and _layer(node.backing.node) is not base:
            node = _layer(node.backing.node)
            depth += 1
        if node.backing is None:
            raise InvalidArgument(
                f"'{base.filename}' is not in the backing chain of '{top.filename}'", path=base.filename
            )
        super().__init__(ident, top, base, sync="top", depth=depth, **common)


def _layer(node: BlockNode) -> BlockNode:
    while node.is_filter and node.primary is not None:
        node = node.primary.node
    return node
