"""Stream: what the layers below an image hold is copied up into it, until it stands alone, or on a lower base.

Source: QEMU ``block-stream`` (``qapi/block-core.json``), ``docs/interop/live-block-operations``. What was copied stays: a job that was
killed or cancelled is simply begun anew, and copies the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from cowhand.block.disk import Disk
from cowhand.block.filters.copy_on_read import CopyOnReadNode, CopyOnReadOptions
from cowhand.block.graph import graph
from cowhand.block.graph.blockers import Blocker, check_blockers
from cowhand.block.graph.changes import GraphChange, drop_filter, insert_filter
from cowhand.block.node.node import BlockNode, Role
from cowhand.core.errors import InvalidArgument, ReadOnly
from cowhand.jobs.job import Job
from cowhand.jobs.live.layers import layers_above
from cowhand.jobs.live.pieces import Pieces, cut

_PIECE = 1 << 20
#: Bytes of the disk that are looked at together for what is to be copied.
_STRETCH = 256 << 20


class StreamJob(Job):
    """Copies into *top*, an image that is open for writing, what the layers above *base* allocate (all layers without one).

    Then *base* becomes its backing file, recorded as *backing_name* (its file name by default) with *backing_format*.
    """

    kind: ClassVar[str] = "stream"

    def __init__(
        self,
        ident: str,
        top: BlockNode,
        *,
        base: BlockNode | None = None,
        backing_name: str | None = None,
        backing_format: str | None = None,
        filter_node_name: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(ident, **common)
        self.top = top
        self.base = base
        self._layers = layers_above(top, base)
        self._name = backing_name
        self._format = backing_format
        self._filter_name = filter_node_name
        self._blocker = Blocker("block device is in use by block job: stream")
        self.filter: CopyOnReadNode | None = None
        self._disk: Disk | None = None

    @property
    def image(self) -> BlockNode:
        """The layer that is filled."""
        return self._layers[0]

    def check(self) -> None:
        """Raise ReadOnly, InvalidArgument or NodeBusy where the job is not possible."""
        if not self.image.writable:
            raise ReadOnly(f"'{self.image.filename}' is open for reading only", path=self.image.filename)
        if self._name is not None and self.base is None:
            raise InvalidArgument("backing file specified, but streaming the entire chain")
        check_blockers(self.top, "stream")

    def install(self) -> None:
        """Put the filter over the image. Called once, before :meth:`start`. Raises ReadOnly, NodeBusy."""
        self.check()
        bottom = self._layers[-1].name if len(self._layers) > 1 else self.image.name
        with graph.quiesce(self.top):
            filter = CopyOnReadNode(CopyOnReadOptions(node_name=self._filter_name, bottom=bottom, discard="unmap"))
            graph.attach(filter, "file", self.top, Role.FILTERED)
            filter.start()
            self.filter = filter
            try:
                insert_filter(filter, self.top)
                self._disk = Disk(filter, writable=True, resizable=False, name=f"{self.id} stream")
            except BaseException:
                self.uninstall()
                raise
            for node in self._layers:
                self._blocker.block(node)

    def uninstall(self) -> None:
        """Take the filter out."""
        self._blocker.release()
        filter, self.filter = self.filter, None
        if filter is not None and not filter.closed:
            if filter.parents:
                drop_filter(filter)
            else:
                graph.close_node(filter)
        disk, self._disk = self._disk, None
        if disk is not None:
            disk.close()

    def run(self) -> None:
        filter, disk = self.filter, self._disk
        assert filter is not None, "install() comes before start()"
        assert disk is not None
        if self.image.backing is None or len(self._layers) == 1:
            return
        self.progress.total = disk.size
        pieces = Pieces(self, (disk,), self._copy)
        while pieces.run(self._extents(filter, disk)):
            self.progress.done = 0

    def _extents(self, filter: CopyOnReadNode, disk: Disk) -> Iterator[tuple[int, int]]:
        for begin in range(0, disk.size, _STRETCH):
            length = min(_STRETCH, disk.size - begin)
            with disk.lease():
                missing = filter.missing(begin, length)
            yield from cut(missing, _PIECE)
            self.progress.done = begin + length

    def _copy(self, offset: int, length: int) -> int:
        assert self.filter is not None
        self.filter.populate(offset, length)
        return 0  # progress is the position

    def prepare(self) -> None:
        image, base, filter = self.image, self.base, self.filter
        assert filter is not None
        if image.backing is None or len(self._layers) == 1:
            return
        with graph.quiesce(filter):
            image.flush()
            below = image.backing
            name = None if base is None else self._name or base.filename
            format = None if base is None else self._format or base.driver
            image.change_backing(name, format)
            change = GraphChange()
            if base is None:
                change.detach(below)
            else:
                change.move(below, base)
            self._blocker.release()
            change.commit()

    def commit(self) -> None:
        self.uninstall()

    def abort(self) -> None:
        self.uninstall()
