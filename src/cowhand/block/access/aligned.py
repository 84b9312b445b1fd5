"""Alignment, written once: the way to a node whose request alignment is coarser than what its user keeps to.

Reads are widened; writes of partial blocks read, change and write whole ones. No two changes of one block overlap in time, so that two users of
one sector cannot undo each other; what lies elsewhere does not wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from cowhand.block.access.range_locks import RangeLocks
from cowhand.block.node.node import BlockNode, Failures, Request, one_by_one
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, aligned
from cowhand.core.errors import NotSupported

_block_locks: WeakKeyDictionary[BlockNode, RangeLocks] = WeakKeyDictionary()
_guard = threading.Lock()


def _locks_of(node: BlockNode) -> RangeLocks:
    with _guard:
        locks = _block_locks.get(node)
        if locks is None:
            locks = _block_locks[node] = RangeLocks()
        return locks


class AlignedAccess:
    """Padding between a user with fine requests and *node*, through *access* (the node itself or its hooks)."""

    __slots__ = ("access", "block", "locks", "node")

    def __init__(self, node: BlockNode, access: Any) -> None:
        self.node = node
        self.access: Any = access
        self.block = node.limits.request_alignment
        self.locks = _locks_of(node)

    def fire(self, event: str) -> None:
        """Tell a blkdebug node, the one whose alignment this is or one right below, what is about to happen."""
        sink: Callable[[str], None] | None = getattr(self.node, "event", self.node.event_sink)
        if sink is not None:
            sink(event)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        length = len(buffer)
        block = self.block
        if offset % block == 0 and length % block == 0:
            self.access.read_into(offset, buffer)
            return
        begin = offset - offset % block
        end = -(-(offset + length) // block) * block
        bounce = aligned(end - begin)
        self.access.read_into(begin, bounce)
        memoryview(buffer)[:] = bounce[offset - begin : offset - begin + length]

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        block = self.block
        length = sum(len(buffer) for buffer in buffers)
        if length == 0:
            return
        if offset % block == 0 and length % block == 0:
            # Alone in its blocks, but a partial write of a neighbour may be reading them just now.
            with self.locks.hold(offset, length):
                self.access.write(offset, buffers, fua)
            return
        begin = offset - offset % block
        end = -(-(offset + length) // block) * block
        with self.locks.hold(begin, end - begin):
            bounce = aligned(end - begin)
            self._read_edges(begin, bounce, offset != begin, offset + length != end)
            position = offset - begin
            for buffer in buffers:
                bounce[position : position + len(buffer)] = memoryview(buffer)
                position += len(buffer)
            self.access.write(begin, (bounce,), fua)

    def _read_edges(self, begin: int, bounce: memoryview, head: bool, tail: bool) -> None:
        """Read those of the first and last block of *bounce*, which lies at *begin*, that the request changes in part."""
        block = self.block
        if len(bounce) <= block * (head + tail):  # all of it at once
            self._read_some(begin, bounce, head, tail)
            return
        if head:
            self._read_some(begin, bounce[:block], True, False)
        if tail:
            self._read_some(begin + len(bounce) - block, bounce[-block:], False, True)

    def _read_some(self, offset: int, view: memoryview, head: bool, tail: bool) -> None:
        parts = [name for name, there in (("head", head), ("tail", tail)) if there]
        for part in parts:
            self.fire(f"pwritev_rmw_{part}")
        self.access.read_into(offset, view)
        for part in parts:
            self.fire(f"pwritev_rmw_after_{part}")

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        block = self.block
        begin = -(-offset // block) * block
        end = (offset + length) // block * block
        if not fallback and (offset != begin or end != offset + length):
            raise NotSupported(f"'{self.node.name}' zeroes whole blocks of {block} bytes only", offset=offset)
        if begin >= end:
            self._zero_bytes(offset, length, fua)
            return
        if offset < begin:
            self._zero_bytes(offset, begin - offset, fua)
        with self.locks.hold(begin, end - begin):
            self.access.write_zeroes(begin, end - begin, unmap=unmap, fallback=fallback, fua=fua)
        if end < offset + length:
            self._zero_bytes(end, offset + length - end, fua)

    def _zero_bytes(self, offset: int, length: int, fua: bool) -> None:
        while length:
            count = min(length, ZEROES_SIZE)
            self.write(offset, (ZEROES[:count],), fua)
            offset += count
            length -= count

    def discard(self, offset: int, length: int) -> None:
        block = self.block
        begin = -(-offset // block) * block
        end = (offset + length) // block * block
        if begin < end:
            with self.locks.hold(begin, end - begin):
                self.access.discard(begin, end - begin)

    def flush(self) -> None:
        self.node.flush()

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        return one_by_one(self, batch)
