"""The way to a node with ``detect-zeroes``: what is written and is all zero becomes a request for zeroes.

Formats that allocate find zeroes by themselves, unit by unit; this is for everything else: raw images, filters, protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowhand.block.node.node import WRITE_REQUEST, ZERO_REQUEST, ZERO_UNMAP, BlockNode, Failures, Request, Zeroing
from cowhand.core.buffers import Buffer, is_zero


class DetectingAccess:
    """The same calls as those of *access*, the node or its hooks, but for writes of zeroes."""

    __slots__ = ("access", "discard", "node", "read_into", "unmap", "write_zeroes")

    def __init__(self, node: BlockNode, access: Any) -> None:
        self.node = node
        self.access = access
        self.unmap = node.options.detect_zeroes == "unmap"
        self.read_into = access.read_into
        self.write_zeroes = access.write_zeroes
        self.discard = access.discard

    def _only_zeroes(self, buffers: Sequence[Buffer]) -> bool:
        return self.node.capabilities.zeroes is not Zeroing.NONE and all(map(is_zero, buffers))

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        length = sum(len(buffer) for buffer in buffers)
        if length and self._only_zeroes(buffers):
            self.access.write_zeroes(offset, length, unmap=self.unmap, fua=fua)
        else:
            self.access.write(offset, buffers, fua)

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        kind = ZERO_UNMAP if self.unmap else ZERO_REQUEST
        failures: Failures | None = self.access.submit(
            [
                (kind, request[1], len(request[2]))
                if request[0] == WRITE_REQUEST and len(request[2]) and self._only_zeroes((request[2],))
                else request
                for request in batch
            ]
        )
        return failures
