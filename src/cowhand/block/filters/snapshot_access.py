"""The driver "snapshot-access": reads the moment that a copy-before-write filter keeps (image fencing).

Source: QEMU's ``BlockdevOptionsGenericFormat`` for "snapshot-access" (``qapi/block-core.json``), since 7.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from cowhand.block.filters.base import open_child
from cowhand.block.node.node import ALL_PERMISSIONS, CONSISTENT_READ, BlockNode, Capabilities, Child, Role
from cowhand.block.node.options import NodeOptions
from cowhand.core.buffers import Buffer
from cowhand.core.errors import InvalidArgument
from cowhand.core.extents import ALLOCATED, DATA, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening


@runtime_checkable
class KeepsMoment(Protocol):
    """A node that keeps a moment of its disk beside the present."""

    def read_snapshot(self, offset: int, buffer: Buffer) -> None:
        """Fill *buffer* with what the disk held then."""


class SnapshotAccessNode(BlockNode):
    """A read-only disk: what the filter below keeps."""

    driver: ClassVar[str] = "snapshot-access"

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> SnapshotAccessNode:
        node = cls(options)
        node.writable = False
        opening.track(node)
        child = open_child(opening, node, "file", given, Role.DATA)
        if not isinstance(child.node, KeepsMoment):
            raise InvalidArgument(f"node '{child.node.name}' keeps no moment: a copy-before-write filter does")
        node.capabilities = Capabilities()
        node.limits = child.node.limits._replace(request_alignment=1)
        return node

    @property
    def size(self) -> int:
        return self.children["file"].node.size

    @property
    def filename(self) -> str:
        return self.children["file"].node.filename if "file" in self.children else ""

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        # The filter below is written meanwhile: that is what it is for.
        return CONSISTENT_READ, ALL_PERMISSIONS

    def read_into(self, offset: int, buffer: Buffer) -> None:
        keeper: Any = self.children["file"].node
        inside = max(0, min(len(buffer), self.size - offset))
        view = memoryview(buffer)
        if inside:
            keeper.read_snapshot(offset, view[:inside])
        view[inside:] = bytes(len(view) - inside)

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        # Where it lies changes with every write of the guest's: nobody may go there directly.
        batch = ExtentBatch()
        batch.add(offset, length, DATA | ALLOCATED, 0, self)
        return batch

    def flush(self) -> None:
        return
