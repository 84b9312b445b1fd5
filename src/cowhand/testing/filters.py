"""What every filter has to keep to, beyond the contract of nodes: it stands over one node and hides none of its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode, Role
from cowhand.block.protocols.memory import MemoryNode, MemoryOptions
from cowhand.core.errors import IOFailed
from cowhand.testing.faults import CHANGES, READ, FaultNode
from cowhand.testing.nodes import NodeContract


class FilterContract(NodeContract):
    """Tests of any filter in the state in which it changes nothing. Override :meth:`wrap`."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        """Return the filter over *inner*."""
        raise NotImplementedError

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        return self.wrap(MemoryNode(MemoryOptions(read_only=not writable), content))

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        while not isinstance(node, MemoryNode):
            assert node.primary is not None
            node = node.primary.node
        return node.snapshot_bytes()

    def test_stands_over_one_node(self, node: BlockNode) -> None:
        assert node.is_filter
        assert node.primary is not None
        assert node.primary.role is Role.FILTERED
        assert node.size == node.primary.node.size

    def test_closes_what_it_stands_over(self) -> None:
        inner = MemoryNode(content=self.content())
        graph.close_node(self.wrap(inner))
        assert inner.closed

    def test_keeps_to_the_alignment_below(self) -> None:
        inner = MemoryNode(MemoryOptions(request_alignment=4096), self.content())
        with Disk(self.wrap(inner), writable=True) as disk:
            disk.write(100, b"unaligned")  # the memory node refuses what is not aligned
            assert disk.read(99, 11) == self.content()[99:100] + b"unaligned" + self.content()[109:110]

    @pytest.mark.parametrize("kind", sorted({READ} | CHANGES))
    def test_errors_below_come_through(self, kind: str) -> None:
        faults = FaultNode(MemoryNode(content=self.content()))
        with Disk(self.wrap(faults), writable=True) as disk:
            calls: dict[str, Callable[[], object]] = {
                "read": lambda: disk.read(0, 4096),
                "write": lambda: disk.write(0, b"x" * 4096),
                "zero": lambda: disk.write_zeroes(0, 4096),
                "discard": lambda: disk.discard(0, 4096),
                "flush": disk.flush,
                "truncate": lambda: disk.resize(2 * self.size),
            }
            if kind == "discard" and not disk.root.capabilities.discard:
                pytest.skip(f"driver '{disk.format}' does not discard")
            if kind == "truncate" and not disk.root.capabilities.resizable:
                pytest.skip(f"driver '{disk.format}' cannot be resized")
            faults.fail(kind, lasting=True)
            with pytest.raises(IOFailed):
                calls[kind]()
            faults.reset()
