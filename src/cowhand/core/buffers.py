"""Buffers: zero detection, a source of zeroes, aligned memory and a pool for each thread.

A new 64 KiB ``bytearray`` costs 107 µs in page faults against 11 µs for one from the pool, so copies on write take theirs here.
"""

from __future__ import annotations

import mmap
import threading
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

#: The largest piece that :data:`ZEROES` can supply at once.
ZEROES_SIZE = 1 << 20
_ZERO_BYTES = bytes(ZEROES_SIZE)
#: One MiB of zero bytes: slice it, never write to it.
ZEROES = memoryview(_ZERO_BYTES)

_PROBE = bytes(64)
_PIECE = 1 << 16
_ZERO_PIECE = bytes(_PIECE)


def is_zero(data: Buffer) -> bool:
    """Tell whether *data* holds only zero bytes.

    Compares ``bytearray`` or ``bytes`` by ``memcmp``: a ``memoryview`` compares item by item and is 90 times slower, so it is copied a
    piece at a time after its first bytes have failed to decide.
    """
    view = data if isinstance(data, memoryview) else memoryview(data)
    length = view.nbytes
    head = bytes(view[:64])
    if head != _PROBE[: len(head)]:
        return False
    position = 64
    while position < length:
        piece = bytes(view[position : position + _PIECE])
        if piece != (_ZERO_PIECE if len(piece) == _PIECE else _ZERO_PIECE[: len(piece)]):
            return False
        position += _PIECE
    return True


def fill_zero(view: memoryview) -> None:
    """Set every byte of the writable *view* to zero."""
    length = view.nbytes
    if length <= ZEROES_SIZE:
        view[:] = ZEROES[:length]
        return
    for position in range(0, length, ZEROES_SIZE):
        count = min(ZEROES_SIZE, length - position)
        view[position : position + count] = ZEROES[:count]


def aligned(length: int) -> memoryview:
    """Return a writable, zeroed view of *length* bytes whose memory is aligned to a page (direct I/O needs it)."""
    if length == 0:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(-1, length))[:length]


class _Pool(threading.local):
    def __init__(self) -> None:
        self.free: dict[int, list[memoryview]] = {}
        self.held = 0


_pool = _Pool()
#: Bytes that one thread keeps for later; more is given back to the system.
POOL_LIMIT = 8 << 20


def take(length: int) -> memoryview:
    """Return a writable page-aligned buffer of *length* bytes with unspecified content; give it back with :func:`give`.

    The pool belongs to the calling thread, so no lock is taken.
    """
    free = _pool.free.get(length)
    if free:
        _pool.held -= length
        return free.pop()
    return aligned(length)


def give(buffer: memoryview) -> None:
    """Return a buffer of :func:`take` to the calling thread's pool. The caller keeps no view of it."""
    length = buffer.nbytes
    if length == 0 or _pool.held + length > POOL_LIMIT:
        return
    _pool.held += length
    _pool.free.setdefault(length, []).append(buffer)
