"""Disks with known content for the tests of the copy room."""

from __future__ import annotations

import random
from pathlib import Path

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode, MemoryOptions

KIB = 1024
MIB = 1024 * KIB


def content(rng: random.Random, size: int, pieces: int = 12) -> bytes:
    """Return *size* bytes: mostly zeroes, with stretches of data of all lengths at all places, some of them compressible."""
    data = bytearray(size)
    for _ in range(pieces):
        length = min(size, rng.choice((1, 512, 4096, 5000, 65536, 200_000)))
        at = rng.randrange(size - length + 1) if size > length else 0
        if rng.random() < 0.5:
            at -= at % min(4096, max(1, size))
        fill = rng.randbytes(length) if rng.random() < 0.6 else (rng.randbytes(97) * (length // 97 + 1))[:length]
        data[at : at + length] = fill
    return bytes(data)


def memory_disk(data: bytes, *, writable: bool = False) -> Disk:
    """Return a disk in memory that holds *data*; its holes are whole pages of zeroes."""
    node = MemoryNode(MemoryOptions(size=len(data), read_only=not writable))
    if not writable:
        node.writable = True
    page = 4096
    for at in range(0, len(data), page):
        piece = data[at : at + page]
        if any(piece):
            node.write(at, (piece,))
    node.writable = writable
    return Disk(node, writable=writable)


def read_all(disk: Disk) -> bytes:
    """Return everything that *disk* holds."""
    return disk.read(0, disk.size)


def sparse_file(path: Path, data: bytes) -> Path:
    """Write *data* to *path*, leaving holes where pages are zero."""
    with open(path, "wb") as file:
        for at in range(0, len(data), 4096):
            piece = data[at : at + 4096]
            if any(piece):
                file.seek(at)
                file.write(piece)
        file.truncate(len(data))
    return path
