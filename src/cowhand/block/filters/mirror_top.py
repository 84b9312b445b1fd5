"""The filter of a mirror job, above its source: it marks what the guest writes, or writes it to the target as well.

Source: QEMU's ``MirrorCopyMode`` (``qapi/block-core.json``): *background* marks, *write-blocking* writes both sides before it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.block.access.range_locks import RangeLocks
from cowhand.block.filters.base import FilterNode, PassingFilter
from cowhand.block.graph import graph
from cowhand.block.node.node import (
    ALL_PERMISSIONS,
    CONSISTENT_READ,
    READ,
    WRITE,
    WRITE_REQUEST,
    BlockNode,
    Child,
    Request,
    Role,
    Zeroing,
)
from cowhand.block.node.options import NodeOptions
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer
from cowhand.core.errors import CowhandError, InvalidArgument


class MirrorTopNode(PassingFilter):
    """Made by the job alone. ``dirty`` are the granules in which the two sides may differ; ``ranges`` is shared with the job's pieces."""

    driver: ClassVar[str] = "mirror_top"

    def __init__(self, node: BlockNode, dirty: Bitmap, *, node_name: str | None = None) -> None:
        super().__init__(NodeOptions(node_name=node_name, read_only=not node.writable, discard="unmap"))
        self.dirty = dirty
        self.ranges = RangeLocks()
        self.target: Child | None = None  #: where it writes as well, once that was switched on
        self.failed: Callable[[CowhandError], None] | None = None  #: hears of writes to the target that failed
        self.marked: Callable[[], None] = lambda: None  #: hears that there is something to copy
        graph.attach(self, "file", node, Role.FILTERED)
        FilterNode.start(self)

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        if child.name == "target":
            return (CONSISTENT_READ | WRITE if self.writable else CONSISTENT_READ), ALL_PERMISSIONS
        return perm, shared

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        raise InvalidArgument("a disk is not resized while it is mirrored", path=self.filename)

    # -- requests

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self.below.read_into(offset, buffer)

    def _change(self, offset: int, length: int, below: Callable[[], None], beside: Callable[[Child], None]) -> None:
        """Do *below*, and in write-blocking mode *beside*; what is not the same on both sides then is marked."""
        if self.target is None:
            try:
                below()
            finally:
                self.dirty.mark(offset, length)
                self.marked()
            return
        unit = self.dirty.granularity
        begin, end = offset // unit * unit, -(-(offset + length) // unit) * unit
        # A piece of the job that has read old bytes is waited for, and none reads between the two writes.
        with self.ranges.hold(begin, end - begin):
            try:
                below()
            except BaseException:
                self.dirty.mark(offset, length)
                self.marked()
                raise
            try:
                beside(self.target)
            except CowhandError as error:
                self.dirty.mark(offset, length)
                self.marked()
                if self.failed is not None:
                    self.failed(error)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        # The guest may change its buffer meanwhile; both sides must get the same bytes.
        data: Sequence[Buffer] = buffers if self.target is None else [b"".join(buffers)]
        length = sum(len(buffer) for buffer in data)
        self._change(
            offset, length, lambda: self.below.write(offset, data, fua), lambda target: target.write(offset, data)
        )

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self._change(
            offset, length,
            lambda: self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua),
            lambda target: zero(target, offset, length, unmap=unmap),
        )  # fmt: skip

    def discard(self, offset: int, length: int) -> None:
        # What a discard leaves behind may differ between the two: it is copied by the job afterwards.
        try:
            self.below.discard(offset, length)
        finally:
            self.dirty.mark(offset, length)
            self.marked()

    def submit(self, batch: Sequence[Request]) -> None:
        if self.target is not None and any(kind != READ for kind, _, _ in batch):
            BlockNode.submit(self, batch)
            return
        try:
            self.below.submit(batch)
        finally:
            marked = False
            for kind, offset, what in batch:
                if kind == READ or not what:
                    continue
                self.dirty.mark(offset, len(what) if kind == WRITE_REQUEST else what)
                marked = True
            if marked:
                self.marked()


def zero(target: Child, offset: int, length: int, *, unmap: bool = True) -> None:
    """Make a stretch of *target* read as zeroes, by writing bytes where it cannot do so otherwise."""
    if target.node.capabilities.zeroes is not Zeroing.NONE:
        target.write_zeroes(offset, length, unmap=unmap)
        return
    for at in range(offset, offset + length, ZEROES_SIZE):
        target.write(at, (ZEROES[: min(ZEROES_SIZE, offset + length - at)],))
