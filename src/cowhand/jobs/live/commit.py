"""Commit of layers that are not active: what they allocate goes down into a base, and the images above go over to the base.

Source: QEMU ``block-commit`` (``qapi/block-core.json``), ``docs/interop/live-block-operations``. The commit of the active image is
:class:`cowhand.jobs.live.mirror.ActiveCommitJob`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.graph.block_status import layered, skip_filters
from cowhand.block.graph.blockers import Blocker, check_blockers
from cowhand.block.graph.changes import GraphChange
from cowhand.block.graph.reopen import reopen
from cowhand.block.node.node import BlockNode
from cowhand.copy.engine.source import SECTOR
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.core.extents import ALLOCATED, ZERO
from cowhand.jobs.job import Job
from cowhand.jobs.live.layers import layers_above, overlays_of, writable_meanwhile
from cowhand.jobs.live.pieces import Pieces, cut

_PIECE = 1 << 20
_ZERO_PIECE = 1 << 30


class CommitJob(Job):
    """Writes what *top* and the layers between allocate into *base*, which is opened for writing meanwhile; both lie below an active image.

    At the end every image that has *top* as its backing file gets *base*, recorded as *backing_name*. What readers see is the same at each
    moment: the base changes only where the layers above hide it.
    """

    kind: ClassVar[str] = "commit"

    def __init__(
        self, ident: str, top: BlockNode, base: BlockNode, *, backing_name: str | None = None, **common: Any
    ) -> None:
        super().__init__(ident, **common)
        self.top = top
        self.base = skip_filters(base)
        self._layers = layers_above(top, base)
        self._name = backing_name
        self._blocker = Blocker("block device is in use by block job: commit")
        self._reopened = False  #: the base was opened for reading only
        self._top_disk: Disk | None = None
        self._base_disk: Disk | None = None

    def check(self) -> None:
        """Raise InvalidArgument or NodeBusy where the job is not possible."""
        check_blockers(self.top, "commit-source")
        check_blockers(self.base, "commit-target")
        if not overlays_of(self.top):
            raise InvalidArgument(
                f"'{self.top.filename}' is an active image: its commit is a job that becomes ready, and is completed",
                path=self.top.filename,
            )

    def install(self) -> None:
        """Open the base for writing. Called once, before :meth:`start`. Raises NodeBusy, ImageInUse, NotSupported."""
        self.check()
        try:
            self._top_disk = Disk(self.top, name=f"{self.id} top")
            self._base_disk = Disk(self.base, name=f"{self.id} base")
            self._reopened = not self.base.writable
            reopen(self._base_disk, writable=True)
            if self.top.size > self.base.size:
                self._base_disk.resize(-(-self.top.size // SECTOR) * SECTOR)
        except BaseException:
            self.uninstall()
            raise
        for node in (*self._layers, self.base):
            self._blocker.block(node)

    def uninstall(self) -> None:
        """Let go of the layers; the base is read-only again where it was."""
        self._blocker.release()
        base, self._base_disk = self._base_disk, None
        if base is not None:
            if self._reopened and not base.read_only:
                reopen(base, writable=False)
            base.close()
        top, self._top_disk = self._top_disk, None
        if top is not None:
            top.close()

    def run(self) -> None:
        top, base = self._top_disk, self._base_disk
        assert top is not None, "install() comes before start()"
        assert base is not None
        self.progress.total = top.size
        pieces = Pieces(self, (top, base), self._copy)
        while pieces.run(self._extents(top)):
            self.progress.done = 0

    def _extents(self, top: Disk) -> Iterator[tuple[int, int]]:
        position, depth = 0, len(self._layers)
        while position < top.size:
            with top.lease():
                rows = layered(top.root, position, top.size - position, depth)
            for row in rows:
                if row.flags & ALLOCATED:
                    yield from cut([(row.start, row.length)], _ZERO_PIECE if row.flags & ZERO else _PIECE)
            position = rows.end
            self.progress.done = position

    def _copy(self, offset: int, length: int) -> int:
        """Write a piece whose layers allocate it; what of it is zero is made zero."""
        top, base = self._top_disk, self._base_disk
        assert top is not None
        assert base is not None
        position, end = offset, offset + length
        while position < end:
            rows = layered(top.root, position, end - position, len(self._layers))
            for row in rows:
                stop = min(row.end, end)
                if row.flags & ALLOCATED:
                    self._copy_row(top, base, row.start, stop - row.start, zero=bool(row.flags & ZERO))
            position = rows.end
        return 0  # progress is the position

    def _copy_row(self, top: Disk, base: Disk, offset: int, length: int, *, zero: bool) -> None:
        data = b""
        if not zero:
            try:
                data = top.read(offset, length)
            except CowhandError as error:
                error.facts["doing"] = "reading"
                raise
        try:
            if zero:
                base.write_zeroes(offset, length)
            else:
                base.write(offset, data)
        except CowhandError as error:
            error.facts["doing"] = "writing"
            raise

    def prepare(self) -> None:
        base, top = self._base_disk, self._top_disk
        assert base is not None
        assert top is not None
        base.flush()
        overlays = overlays_of(self.top)
        with graph.quiesce(self.top, self.base, *(edge.parent for edge in overlays)):
            change = GraphChange()
            for edge in overlays:
                with writable_meanwhile(edge.parent):
                    edge.parent.change_backing(self._name or self.base.filename, self.base.driver)
                change.move(edge, self.base)
            self._blocker.release()
            change.commit()

    def commit(self) -> None:
        self.uninstall()

    def abort(self) -> None:
        self.uninstall()
