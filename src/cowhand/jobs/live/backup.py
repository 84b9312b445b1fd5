"""Backup of a running disk: the target gets what the disk holds at one moment, whatever the guest writes meanwhile.

Source: QEMU ``blockdev-backup`` (``qapi/block-core.json``), ``docs/interop/live-block-operations`` and ``docs/interop/bitmaps``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.bitmaps.named import BitmapSet, DirtyBitmap
from cowhand.block.disk import Disk
from cowhand.block.filters.copy_before_write.node import CopyBeforeWriteNode, CopyBeforeWriteOptions
from cowhand.block.format_io.block_copy import PIECE, granule_of
from cowhand.block.graph import graph
from cowhand.block.graph.block_status import layered
from cowhand.block.graph.blockers import Blocker, check_blockers
from cowhand.block.graph.changes import drop_filter, insert_filter
from cowhand.block.node.node import BlockNode, Role
from cowhand.core.errors import InvalidArgument
from cowhand.core.extents import ALLOCATED
from cowhand.jobs.job import Job
from cowhand.jobs.live.pieces import Pieces, cut

SYNCS = ("full", "top", "none", "incremental", "bitmap")
BITMAP_MODES = ("on-success", "never", "always")


class BackupJob(Job):
    """Copies the moment at which :meth:`install` was called from *source* to *target*, another node of the same size.

    *sync*: *full*, the whole disk; *top*, what the topmost image allocates, for a target with the same backing file; *none*, only what the
    guest overwrites, until the job is cancelled (image fleecing); *incremental* and *bitmap*, what *bitmap*, one of *source*'s, has dirty.
    *bitmap_mode* says when the bitmap is advanced to the moment: on success, never, or always (after a failure it keeps what was not
    copied). *target_is_zero* leaves zeroes out. The target is closed at the end where nothing else uses it.
    """

    kind: ClassVar[str] = "backup"

    def __init__(
        self,
        ident: str,
        source: BlockNode,
        target: BlockNode,
        *,
        sync: str = "full",
        bitmap: DirtyBitmap | None = None,
        bitmap_mode: str | None = None,
        target_is_zero: bool = False,
        filter_node_name: str | None = None,
        on_cbw_error: str = "break-guest-write",
        **common: Any,
    ) -> None:
        super().__init__(ident, **common)
        self.source = source
        self.target = target
        self.sync = sync
        self.bitmap = bitmap
        self.bitmap_mode = _bitmap_mode(sync, bitmap, bitmap_mode)
        self._target_zero = target_is_zero
        self._filter_name = filter_node_name
        self._on_cbw_error = on_cbw_error
        self.filter: CopyBeforeWriteNode | None = None
        self._disks: list[Disk] = []
        self._blocker = Blocker("block device is in use by block job: backup")
        self._frozen: BitmapSet | None = None

    def check(self) -> None:
        """Raise InvalidArgument or NodeBusy where the job is not possible."""
        source, target = self.source, self.target
        if source is target:
            raise InvalidArgument("Source and target cannot be the same")
        if target.size != source.size:
            raise InvalidArgument("Source and target image have different sizes")
        check_blockers(target, "backup-target")
        check_blockers(source, "backup-source")

    def install(self) -> None:
        """Keep the present moment from now on. Called once, before :meth:`start`; for several disks at one moment inside one drain of all."""
        self.check()
        with graph.quiesce(self.source, self.target):
            try:
                self._install()
            except BaseException:
                self.uninstall()
                raise

    def _install(self) -> None:
        source, target = self.source, self.target
        bits = None
        if self.bitmap is not None:
            holder = source
            while holder.dirty_bitmaps is None and holder.is_filter and holder.primary is not None:
                holder = holder.primary.node
            if holder.dirty_bitmaps is None or holder.dirty_bitmaps.get(self.bitmap.name) is not self.bitmap:
                raise InvalidArgument(f"Bitmap '{self.bitmap.name}' could not be found")
            self.bitmap.check()
            holder.dirty_bitmaps.freeze(self.bitmap)
            self._frozen = holder.dirty_bitmaps
            bits = self.bitmap.bits
        filter = CopyBeforeWriteNode(
            CopyBeforeWriteOptions(
                node_name=self._filter_name,
                read_only=not source.writable,
                on_cbw_error=self._on_cbw_error,
                discard="unmap",
            )
        )
        child = graph.attach(filter, "file", source, Role.FILTERED)
        self.filter = filter
        filter.start()
        target_child = graph.attach(filter, "target", target, Role.DATA)
        self._disks.append(Disk(target, writable=True, name=f"{self.id} target"))
        if self.sync == "top":
            bits = _allocated(source, granule_of(target_child, child))
        filter.begin(bits=bits, target_zero=self._target_zero)
        insert_filter(filter, source)
        self._disks.append(Disk(filter, name=f"{self.id} source"))
        self._blocker.block(source)
        self._blocker.block(target)
        self.progress.total = filter.copying.bits.dirty_bytes()

    def uninstall(self, *, success: bool = False) -> None:
        """Let go of everything; the bitmap gets what the mode says. Never raises for what was not installed."""
        self._blocker.release()
        if self._frozen is not None and self.bitmap is not None:
            frozen, self._frozen = self._frozen, None
            with graph.quiesce(self.filter or self.source):  # the node below may be another one by now
                self._thaw(frozen, success)
        if self.filter is not None:
            filter, self.filter = self.filter, None
            if filter.parents:
                drop_filter(filter)
            else:
                graph.close_node(filter)
        for disk in self._disks:
            disk.close()
        self._disks.clear()

    def _thaw(self, frozen: BitmapSet, success: bool) -> None:
        bitmap = self.bitmap
        assert bitmap is not None
        if self.bitmap_mode == "always" and not success and self.filter is not None:
            rest = self.filter.copying.bits
            frozen.abdicate(bitmap)
            bitmap.bits.merge(rest)
        elif self.bitmap_mode == "always" or (success and self.bitmap_mode == "on-success"):
            frozen.abdicate(bitmap)
        else:
            frozen.reclaim(bitmap)

    # -- the job

    def run(self) -> None:
        filter = self.filter
        assert filter is not None, "install() comes before start()"
        if self.sync == "none":
            while True:
                self.pause_point()
                self.cancel_token.wait(0.1)
                self._check_snapshot()
        copying = filter.copying
        pieces = Pieces(self, self._disks, copying.copy)
        while True:
            left = pieces.run(cut(copying.bits.extents(), max(PIECE, copying.bits.granularity)))
            self._check_snapshot()
            self.progress.done = self.progress.total - copying.bits.dirty_bytes()
            if not left and not copying.bits:
                return

    def _check_snapshot(self) -> None:
        if self.filter is not None and self.filter.failure is not None:
            raise self.filter.failure

    def prepare(self) -> None:
        self._check_snapshot()
        self._disks[0].flush()

    def commit(self) -> None:
        self.uninstall(success=True)

    def abort(self) -> None:
        self.uninstall()


def _bitmap_mode(sync: str, bitmap: DirtyBitmap | None, mode: str | None) -> str:
    """Return the bitmap mode. Raises InvalidArgument for what does not go together, in QEMU's words."""
    if sync not in SYNCS:
        raise InvalidArgument(f"Parameter 'sync' does not accept value '{sync}'", hint=f"One of: {', '.join(SYNCS)}.")
    if mode is not None and mode not in BITMAP_MODES:
        raise InvalidArgument(f"Parameter 'bitmap-mode' does not accept value '{mode}'")
    if sync == "incremental":
        if mode not in (None, "on-success"):
            raise InvalidArgument("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
        mode = "on-success"
    if sync in ("incremental", "bitmap"):
        if bitmap is None:
            raise InvalidArgument(f"must provide a valid bitmap name for '{sync}' sync mode")
        if mode is None:
            raise InvalidArgument("Bitmap sync mode must be given when providing a bitmap")
        return mode
    if bitmap is None:
        if mode is not None:
            raise InvalidArgument("Cannot specify bitmap sync mode without a bitmap")
        return "never"
    if sync == "none":
        raise InvalidArgument("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode is None:
        raise InvalidArgument("Bitmap sync mode must be given when providing a bitmap")
    if mode == "never":
        raise InvalidArgument(
            f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
        )
    return mode


def _allocated(node: BlockNode, granularity: int) -> Bitmap:
    """Return a bitmap of what the topmost image of *node* allocates."""
    bits = Bitmap(node.size, granularity)
    position = 0
    while position < node.size:
        rows = layered(node, position, node.size - position, 1)
        for row in rows:
            if row.flags & ALLOCATED:
                bits.mark(row.start, row.length)
        position = rows.end
    return bits
