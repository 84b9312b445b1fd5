"""What formats that are only read have in common: one file, nothing that is ever changed, and QEMU's refusals."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cowhand.block.node.node import BlockNode, Child, Role
from cowhand.block.node.options import NodeOptions
from cowhand.core.errors import AccessDenied, InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening


class ReadOnlyFormat(BlockNode):
    """A format that can only be read. Drivers read their header in :meth:`start`, and answer ``size``, ``read_into`` and ``map_batch``."""

    is_format: ClassVar[bool] = True
    file: Child

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> Self:
        node = cls(options)
        file = given.pop("file", None)
        if file is None:
            raise InvalidArgument(
                f"a {cls.driver} image needs a 'file'", qemu='A block device must be specified for "file"'
            )
        opening.track(node)
        node.file = opening.child(node, "file", file, Role.PRIMARY)
        if node.writable:
            raise AccessDenied(
                f"{cls.driver} images can only be read", qemu="Image is read-only", errno=13, path=node.file.node.filename,
                hint="Convert it to qcow2 or raw, and write that.",
            )  # fmt: skip
        node.start()
        return node

    @abstractmethod
    def start(self) -> None:
        """Read and check the header. Raises InvalidFormat."""

    def flush(self) -> None:
        """Nothing is ever to be made stable."""
