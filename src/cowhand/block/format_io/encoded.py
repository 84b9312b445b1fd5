"""Writing what a format stores in another form than its own, encryption above all: by blocks, large writes in bounded pieces.

New units are written whole, and need no lock. In place a part of a block is read, changed and written, one such write at a time for each node,
so that two users of one block cannot undo each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.core.buffers import Buffer
from cowhand.core.extents import DATA, ENCODED, OFFSET

if TYPE_CHECKING:
    from cowhand.block.format_io.format_node import FormatNode
    from cowhand.block.node.node import Child

#: Encryption changes blocks of so many bytes, whole ones.
BLOCK = 512
#: Bytes that are encoded and written at once.
_PIECE = 1 << 20


def store(node: FormatNode, child: Child, host: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """See :meth:`cowhand.block.format_io.format_node.FormatNode.store`."""
    for piece in _pieces(buffers):
        child.write(host, (node.encode(host, offset, piece),))
        host += len(piece)
        offset += len(piece)


def overwrite(node: FormatNode, child: Child, host: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """See :meth:`cowhand.block.format_io.format_node.FormatNode.overwrite`."""
    length = sum(len(buffer) for buffer in buffers)
    head, tail = offset % BLOCK, -(offset + length) % BLOCK
    if head or tail:
        _overwrite_parts(node, child, host - head, offset - head, head, buffers, tail)
        return
    for piece in _pieces(buffers):
        stored = node.encode(host, offset, piece)
        # Alone in its blocks, but a write of a part of one may have read it and be about to write it.
        with node.block_lock:
            child.write(host, (stored,))
        host += len(piece)
        offset += len(piece)


def _overwrite_parts(
    node: FormatNode, child: Child, host: int, offset: int, head: int, buffers: Sequence[Buffer], tail: int
) -> None:
    """Write *buffers* between the first *head* and the last *tail* bytes of the blocks from *offset* on, which stay."""
    length = head + sum(len(buffer) for buffer in buffers) + tail
    whole = memoryview(bytearray(length))
    last = length - BLOCK
    flags = DATA | OFFSET | ENCODED
    with node.block_lock:
        if head:
            node.decode((BLOCK, flags, child, host), offset, whole[:BLOCK])
        if tail and (last or not head):
            node.decode((BLOCK, flags, child, host + last), offset + last, whole[last:])
        position = head
        for buffer in buffers:
            whole[position : position + len(buffer)] = memoryview(buffer).cast("B")
            position += len(buffer)
        for begin in range(0, length, _PIECE):
            child.write(host + begin, (node.encode(host + begin, offset + begin, whole[begin : begin + _PIECE]),))


def _pieces(buffers: Sequence[Buffer]) -> Iterator[memoryview]:
    """Yield what *buffers* hold, one behind the other, in pieces of which all but the last have one length."""
    if len(buffers) == 1:
        view = memoryview(buffers[0]).cast("B")
        for begin in range(0, len(view), _PIECE):
            yield view[begin : begin + _PIECE]
        return
    gathered = bytearray()
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while len(view):
            room = _PIECE - len(gathered)
            gathered += view[:room]
            view = view[room:]
            if len(gathered) == _PIECE:
                yield memoryview(gathered)
                gathered = bytearray()
    if gathered:
        yield memoryview(gathered)
