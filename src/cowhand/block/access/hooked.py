"""After-write hooks: dirty bitmaps, thresholds and counters hear of every change of a node, on failure too.

A hook must not do I/O and must not block. Who has to act *before* a write is a filter node instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cowhand.block.node.node import READ, WRITE_REQUEST, BlockNode, Failures, Hook, Request
from cowhand.core.buffers import Buffer


class HookedAccess:
    """The way to a node that has hooks: the same calls, and the hooks before they return."""

    __slots__ = ("_hooks", "node", "read_into", "write")

    def __init__(self, node: BlockNode) -> None:
        self.node = node
        self.read_into = node.read_into
        self._hooks: Sequence[Hook] = node.hooks
        if len(node.hooks) == 1:
            # A hook that is made of others lets them be called without itself; its list is the one that changes.
            self._hooks = getattr(node.hooks[0], "parts", node.hooks)
        self.write = _hooked_write(node.write, self._hooks)

    def fire(self, offset: int, length: int) -> None:
        """Tell every hook of a change in ``[offset, offset + length)``."""
        for hook in self._hooks:
            hook(offset, length)

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

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        try:
            return self.node.submit(batch)
        finally:
            # Hooks one after the other, each with all requests: small ones feel every call.
            for hook in list(self._hooks):
                for kind, offset, what in batch:
                    if kind == WRITE_REQUEST:
                        hook(offset, len(what))
                    elif kind != READ and what:
                        hook(offset, what)


def _hooked_write(write: Callable[..., None], hooks: Sequence[Hook]) -> Callable[..., None]:
    """Return *write* followed by *hooks*. A function of its own and no method: small writes feel every look-up of an attribute."""

    def hooked(offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        try:
            write(offset, buffers, fua)
        finally:
            for hook in hooks:
                hook(offset, length)

    return hooked
