"""Nodes over which a change of an image is tried out: they read the file below, and keep what is written to themselves."""

from __future__ import annotations

import tempfile
from typing import ClassVar

from cowhand.block.graph import graph
from cowhand.block.node.node import ALL_PERMISSIONS, CONSISTENT_READ, BlockNode, Capabilities, Child, Role, Zeroing
from cowhand.block.node.options import NodeOptions
from cowhand.core.errors import NotSupported, UnsupportedFeature


class StandInNode(BlockNode):
    """Takes writes for a node that is only read. What is written is kept in a temporary file without a name. Used by one thread."""

    is_filter: ClassVar[bool] = True
    #: bytes that may be kept, and of these what stays in memory; bytes of zeroes that are written at once
    max_bytes: ClassVar[int]
    in_memory: ClassVar[int]
    zero_piece: ClassVar[int] = 1 << 20
    #: what to do when more would be changed
    way_out: ClassVar[str]

    def __init__(self, inner: BlockNode) -> None:
        super().__init__(NodeOptions(read_only=False))
        self.limits = inner.limits
        self.capabilities = Capabilities(writable=True, zeroes=Zeroing.EMULATED, resizable=True)
        self._kept = tempfile.SpooledTemporaryFile(self.in_memory)  # noqa: SIM115 - closed with the node
        self._size = inner.size
        self.below = graph.attach(self, "file", inner, Role.FILTERED)

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        return CONSISTENT_READ, ALL_PERMISSIONS

    @property
    def size(self) -> int:
        return self._size

    def _check_room(self, end: int) -> None:
        """Raise UnsupportedFeature unless *end* bytes may be kept."""
        if end > self.max_bytes:
            raise UnsupportedFeature(
                f"more than {self.max_bytes >> 20} MiB of the image would be changed, which cannot be tried out first",
                path=self.filename, hint=self.way_out,
            )  # fmt: skip

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if not fallback:
            raise NotSupported(f"a {self.driver} writes zeroes as bytes")
        while length:
            piece = min(length, self.zero_piece)
            self.write(offset, (bytes(piece),))
            offset, length = offset + piece, length - piece

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if size < self._size:
            raise NotSupported("what is cut off cannot be tried out", path=self.filename)
        self._size = size

    def close(self) -> None:
        self._kept.close()
