"""What filters share: the one child, its size and the printed name.

:class:`FilterNode` has no operation on data: each filter names what it hands on. :class:`PassingFilter` hands on what is not data: flushes,
questions, sizes, the VM state and internal snapshots; it is for filters that promise nothing of any of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.node.naming import json_name
from cowhand.block.node.node import BlockNode, Child, Role
from cowhand.block.node.options import NodeOptions
from cowhand.core.errors import InvalidArgument, ReadOnly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cowhand.block.node.records import SnapshotInfo
    from cowhand.block.opening.opening import Opening
    from cowhand.core.buffers import Buffer
    from cowhand.core.extents import ExtentBatch


class FilterNode(BlockNode):
    """A filter over one child, ``below``. Subclasses open it with :meth:`open_child`, and set limits and capabilities in :meth:`start`."""

    is_filter: ClassVar[bool] = True
    child_name: ClassVar[str] = "file"

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> FilterNode:
        node = cls(options)
        opening.track(node)
        open_child(opening, node, cls.child_name, given, Role.FILTERED)
        node.start()
        return node

    def start(self) -> None:
        """Take over the child's limits, and what it can do, as far as this filter was opened for it; on the way no descriptor is granted."""
        lower = self.below.node
        self.limits = lower.limits
        self.zero_when_new = lower.zero_when_new
        self.writable = self.writable and lower.writable
        self.capabilities = lower.capabilities._replace(
            writable=self.writable, discard=lower.capabilities.discard and self.options.discard != "ignore"
        )

    def refit(self) -> None:
        self.start()

    @property
    def below(self) -> Child:
        """The edge to the child."""
        return self.children[self.child_name]

    @property
    def size(self) -> int:
        return self.below.node.size

    @property
    def filename(self) -> str:
        return json_name(self) if self.child_name in self.children else ""

    def refuse_read_only(self) -> ReadOnly:
        """Return the error of a filter that cannot be used for reading alone."""
        return ReadOnly(
            f"'{self.driver}' writes to its file, which was opened for reading only", qemu="Block node is read-only",
            path=self.filename, errno=1,
        )  # fmt: skip


class PassingFilter(FilterNode):
    """A filter that lets through what is not a request of the guest's for data."""

    def flush(self) -> None:
        self.below.flush()

    def settle(self) -> None:
        self.below.node.settle()

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        return self.below.node.map_batch(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        self.below.node.resize(size, preallocation=preallocation, shrink=shrink)

    def extend(self, size: int, limit: int) -> None:
        self.below.node.extend(size, limit)

    def read_vmstate(self, offset: int, buffer: Buffer) -> None:
        self.below.node.read_vmstate(offset, buffer)

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.below.node.write_vmstate(offset, buffers)

    @property
    def snapshots(self) -> Any:
        """The records of the image's own snapshots, where it is one that has some (AttributeError otherwise)."""
        node: Any = self.below.node
        return node.snapshots

    def list_snapshots(self) -> list[SnapshotInfo]:
        return self.below.node.list_snapshots()

    def create_snapshot(
        self,
        name: str,
        *,
        date: tuple[int, int] | None,
        vm_state_size: int,
        vm_clock_nsec: int,
        icount: int | None,
        ident: str | None,
    ) -> SnapshotInfo:
        return self.below.node.create_snapshot(
            name, date=date, vm_state_size=vm_state_size, vm_clock_nsec=vm_clock_nsec, icount=icount, ident=ident
        )

    def apply_snapshot(self, ident: str, name: str) -> None:
        self.below.node.apply_snapshot(ident, name)

    def delete_snapshot(self, ident: str, name: str) -> None:
        self.below.node.delete_snapshot(ident, name)

    def open_snapshot(self, ident: str, name: str) -> BlockNode:
        return self.below.node.open_snapshot(ident, name)


def open_child(opening: Opening, node: BlockNode, name: str, given: dict[str, Any], role: Role) -> Child:
    """Take the description of child *name* out of *given* and open it. Raises InvalidArgument where there is none."""
    description = given.pop(name, None)
    if description is None:
        raise InvalidArgument(f'A block device must be specified for "{name}"')
    return opening.child(node, name, description, role)
