"""After-write hooks: dirty bitmaps, thresholds and counters hear of every change of a node, on failure too.

A hook must not do I/O and must not block. Who has to act *before* a write is a filter node instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.block.node import READ, WRITE_REQUEST, BlockNode, Request
from cowhand.core.buffers import Buffer


class HookedAccess:
    """The way to a node that has hooks: the same calls, and the hooks before they return."""

    __slots__ = ("node", "read_into")

    def __init__(self, node: BlockNode) -> None:
        self.node = node
        self.read_into = node.read_into

    def fire(self, offset: int, length: int) -> None:
        """Tell every hook of a change in ``[offset, offset + length)``."""
        for hook in self.node.hooks:
            hook(offset, length)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        length = sum(len(buffer) for buffer in buffers)
        try:
            self.node.write(offset, buffers, fua)
        finally:
            self.fire(offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        try:
            self.node.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)
        finally:
            self.fire(offset, length)

    def discard(self, offset: int, length: int) -> None:
        try:
            self.node.discard(offset, length)
        finally:
            self.fire(offset, length)

    def submit(self, batch: Sequence[Request]) -> None:
        try:
            self.node.submit(batch)
        finally:
            for kind, offset, what in batch:
                if kind == WRITE_REQUEST:
                    self.fire(offset, len(what))
                elif kind != READ and what:
                    self.fire(offset, what)
