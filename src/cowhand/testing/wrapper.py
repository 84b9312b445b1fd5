"""What the test nodes share: a node over one other node, whose operations all pass one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode, Role
from cowhand.block.node.options import NodeOptions
from cowhand.core.buffers import Buffer
from cowhand.core.extents import ExtentBatch


class WrapperNode(BlockNode):
    """A node that hands everything to the node below it. Subclasses override what they change, and call ``super()``.

    It owns the inner node like any parent: closing the wrapper closes the inner node when nobody else uses that. ``submit`` is the
    generic one, so that each request of a batch passes the overridden methods too.
    """

    driver: ClassVar[str] = "wrapper"
    is_filter: ClassVar[bool] = True

    def __init__(self, inner: BlockNode, *, node_name: str | None = None) -> None:
        super().__init__(NodeOptions(node_name=node_name, read_only=not inner.writable))
        self.limits = inner.limits
        self.capabilities = inner.capabilities
        self.below = graph.attach(self, "file", inner, Role.FILTERED)

    @property
    def inner(self) -> BlockNode:
        """The node below."""
        return self.below.node

    @property
    def size(self) -> int:
        return self.below.node.size

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self.below.read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self.below.write(offset, buffers, fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def flush(self) -> None:
        self.below.flush()

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        return self.below.node.map_batch(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        self.below.node.resize(size, preallocation=preallocation, shrink=shrink)
