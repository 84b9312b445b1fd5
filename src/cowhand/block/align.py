"""Alignment, written once: the way to a node whose request alignment is coarser than what its user keeps to.

Reads are widened; writes of partial blocks read, change and write whole ones, one such write at a time per node, so that two users of
one sector cannot undo each other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cowhand.block.node import BlockNode, Request, one_by_one
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, aligned
from cowhand.core.errors import NotSupported
from cowhand.core.locks import RANK_SECTOR, Lock, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.hooks import HookedAccess

_sector_locks: WeakKeyDictionary[BlockNode, Lock] = WeakKeyDictionary()
_guard = threading.Lock()


def _sector_lock(node: BlockNode) -> Lock:
    with _guard:
        lock = _sector_locks.get(node)
        if lock is None:
            lock = _sector_locks[node] = ranked_lock(RANK_SECTOR, "sector")
        return lock


class AlignedAccess:
    """Padding between a user with fine requests and *node*, through *access* (the node itself or its hooks)."""

    __slots__ = ("access", "block", "lock", "node")

    def __init__(self, node: BlockNode, access: BlockNode | HookedAccess) -> None:
        self.node = node
        self.access: Any = access
        self.block = node.limits.request_alignment
        self.lock = _sector_lock(node)

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
            with self.lock:
                self.access.write(offset, buffers, fua)
            return
        begin = offset - offset % block
        end = -(-(offset + length) // block) * block
        with self.lock:
            bounce = aligned(end - begin)
            if offset != begin:
                self.access.read_into(begin, bounce[:block])
            if offset + length != end and not (offset != begin and end - begin == block):
                self.access.read_into(end - block, bounce[-block:])
            position = offset - begin
            for buffer in buffers:
                bounce[position : position + len(buffer)] = memoryview(buffer)
                position += len(buffer)
            self.access.write(begin, (bounce,), fua)

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
        with self.lock:
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
            with self.lock:
                self.access.discard(begin, end - begin)

    def flush(self) -> None:
        self.node.flush()

    def submit(self, batch: Sequence[Request]) -> None:
        one_by_one(self, batch)
