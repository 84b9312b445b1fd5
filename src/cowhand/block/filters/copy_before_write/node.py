"""The filter "copy-before-write": before the guest overwrites something, it is copied to a target, which so keeps one moment.

Source: QEMU's ``BlockdevOptionsCbw`` (``qapi/block-core.json``): options "target", "bitmap" and "on-cbw-error"; not "cbw-timeout":
a request that hangs below is not given up.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.block.filters.base import PassingFilter, open_child
from cowhand.block.format_io.block_copy import BlockCopy, granule_of
from cowhand.block.node.node import (
    ALL_PERMISSIONS,
    CONSISTENT_READ,
    READ,
    RESIZE,
    WRITE,
    WRITE_REQUEST,
    Child,
    Request,
    Role,
)
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, InvalidArgument, SnapshotLost

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening


class CopyBeforeWriteOptions(NodeOptions):
    """Options of the filter."""

    on_cbw_error: str = option(
        "break-guest-write",
        choices=("break-guest-write", "break-snapshot"),
        help="whether a copy that fails fails the guest's write, or ends the snapshot",
    )


class CopyBeforeWriteNode(PassingFilter):
    """Keeps in its target what the disk held when the filter was inserted; a job or a reader of the snapshot uses :attr:`copying`."""

    driver: ClassVar[str] = "copy-before-write"
    options_class: ClassVar[type[NodeOptions]] = CopyBeforeWriteOptions
    options: CopyBeforeWriteOptions
    copying: BlockCopy

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.failure: CowhandError | None = None  #: why the snapshot is lost, where it is (on-cbw-error=break-snapshot)
        self._failing = threading.Lock()

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> CopyBeforeWriteNode:
        bitmap = given.pop("bitmap", None)
        node = super().open(opening, options, given)
        assert isinstance(node, CopyBeforeWriteNode)
        open_child(opening, node, "target", given, Role.DATA)
        node.begin(bits=_named_bits(opening, node, bitmap))
        return node

    def begin(self, *, bits: Bitmap | None = None, granule: int | None = None, target_zero: bool = False) -> None:
        """Keep the present moment from now on: *bits*, or the whole disk, is to be copied. Called before the filter has users."""
        target = self.children["target"]
        if target.node.size < self.size:
            raise InvalidArgument(
                f"the target has {target.node.size} bytes, and the disk {self.size}",
                qemu="Source and target image have different sizes", path=target.node.filename,
            )  # fmt: skip
        wanted = Bitmap(self.size, granule or granule_of(target))
        if bits is None:
            wanted.mark(0, self.size)
        else:
            wanted.merge(bits)
        self.copying = BlockCopy(self.below, target, wanted, target_zero=target_zero)

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        if child.name == "target":
            return (CONSISTENT_READ | WRITE if self.writable else CONSISTENT_READ), ALL_PERMISSIONS
        if perm & WRITE:
            # What others write beside the filter would not be copied before.
            return perm | CONSISTENT_READ, shared & ~(WRITE | RESIZE)
        return perm | CONSISTENT_READ, shared

    # -- requests

    def _before(self, offset: int, length: int) -> None:
        """Copy what a change of a range would overwrite. Raises what that raises, unless the snapshot gives way."""
        if length <= 0 or self.failure is not None or not self.copying.pending(offset, length):
            return
        try:
            self.copying.copy(offset, length)
        except CowhandError as error:
            if self.options.on_cbw_error == "break-guest-write":
                raise
            with self._failing:
                if self.failure is None:
                    self.failure = SnapshotLost(
                        f"what the guest was about to overwrite could not be kept: {error.message}",
                        path=error.path, offset=offset, errno=error.errno,
                    )  # fmt: skip

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self.below.read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self._before(offset, sum(len(buffer) for buffer in buffers))
        self.below.write(offset, buffers, fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self._before(offset, length)
        self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self._before(offset, length)
        self.below.discard(offset, length)

    def submit(self, batch: Sequence[Request]) -> None:
        for kind, offset, what in batch:
            if kind != READ and what:
                self._before(offset, len(what) if kind == WRITE_REQUEST else what)
        self.below.submit(batch)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        raise InvalidArgument("a disk is not resized while a moment of it is kept", path=self.filename)

    # -- reading the moment

    def read_snapshot(self, offset: int, buffer: Buffer) -> None:
        """Fill *buffer* with what the disk held when the filter was inserted. Raises SnapshotLost, what reading raises."""
        if self.failure is not None:
            raise self.failure
        view, position, end = memoryview(buffer), offset, offset + len(buffer)
        copying = self.copying
        begin, stop = copying.aligned(offset, len(buffer))
        # Held, so that no write of the guest's copies and overwrites meanwhile.
        with copying.ranges.hold(begin, stop - begin):
            for at, count in [*copying.bits.extents(offset, len(buffer)), (end, 0)]:
                if position < at:
                    copying.target.read_into(position, view[position - offset : at - offset])
                if count:
                    copying.source.read_into(at, view[at - offset : at + count - offset])
                position = at + count


def _named_bits(opening: Opening, node: CopyBeforeWriteNode, given: Any) -> Bitmap | None:
    """Return the bits of the bitmap that the option "bitmap" names: {"node": ..., "name": ...}."""
    if given is None:
        return None
    if not isinstance(given, dict) or set(given) != {"node", "name"}:
        raise InvalidArgument("Parameter 'bitmap' expects a node and a name")
    holder = opening.names.find(str(given["node"])) if opening.names is not None else None
    found = None if holder is None or holder.dirty_bitmaps is None else holder.dirty_bitmaps.get(str(given["name"]))
    if found is None:
        raise InvalidArgument(f"Dirty bitmap '{given['name']}' not found", path=node.filename)
    found.check(busy=True, read_only=True)
    return found.bits
