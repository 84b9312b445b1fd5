"""Replaying logs in dm-log-writes format, of "blklogwrites" or of the kernel's target: from the file to what a crash could have left.

Source: Linux' ``Documentation/admin-guide/device-mapper/log-writes.rst``. Everything that is logged had been acknowledged, in that order; a flush
covers what stands before it. So the log becomes a :class:`cowhand.testing.recorder.Log`, from which :mod:`cowhand.testing.replay` makes images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from cowhand.block.filters.blklogwrites import (
    DISCARD,
    ENTRY,
    FLUSH,
    FUA,
    MAGIC,
    MARK,
    MAX_SECTOR,
    MIN_SECTOR,
    SUPER,
    VERSION,
)
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidFormat
from cowhand.testing import recorder

#: A log of a test; longer ones are not read into memory.
MAX_ENTRIES = 1 << 20
MAX_DATA = 1 << 30


class Entry(NamedTuple):
    """One entry: byte offset and length, flags, and what was written (or the text of a mark)."""

    offset: int
    length: int
    flags: int
    data: bytes


def entries(file: BinaryIO) -> Iterator[Entry]:
    """Yield the entries that the super block of the log in *file* counts. Raises InvalidFormat."""
    head = file.read(SUPER.size).ljust(SUPER.size, b"\0")
    magic, version, count, block = SUPER.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise InvalidFormat("this is no log of writes of version 1", offset=0)
    if block & (block - 1) or not MIN_SECTOR <= block < MAX_SECTOR or count > MAX_ENTRIES:
        raise InvalidFormat(f"a log of {count} entries in sectors of {block} bytes is not read", offset=16)
    position, total = block, 0
    for number in range(count):
        file.seek(position)
        raw = file.read(block)
        if len(raw) < ENTRY.size:
            raise InvalidFormat(f"the log ends before entry {number} of {count}", offset=position)
        sector, sectors, flags, text = ENTRY.unpack_from(raw)
        length = sectors * block
        data = b""
        if flags & MARK:
            data = raw[ENTRY.size : ENTRY.size + text]
        elif not flags & DISCARD:
            total += length
            if total > MAX_DATA:
                raise InvalidFormat(f"a log of more than {MAX_DATA} bytes is not read", offset=position)
            data = file.read(length)
            if len(data) < length:
                data = data.ljust(length, b"\0")  # zeroes at the end of a file need not be there
        yield Entry(sector * block, length, flags, data)
        position += block + (0 if flags & (DISCARD | MARK) else length)


def read_log(file: BinaryIO, initial: MemoryNode) -> recorder.Log:
    """Return the log in *file* as one whose medium held *initial* before. Raises InvalidFormat."""
    log = recorder.Log(initial)
    for entry in entries(file):
        if entry.flags & MARK:
            log.mark(entry.data.split(b"\0")[0].decode("utf-8", "replace"))
            continue
        if entry.flags & FLUSH:
            begin = log.now()
            log.flushes.append(recorder.Flush(begin, log.now()))
        if entry.length:
            kind = recorder.DISCARD if entry.flags & DISCARD else recorder.WRITE
            change = recorder.Change(kind, entry.offset, entry.length, entry.data, bool(entry.flags & FUA), log.now())
            change.end = log.now()
            log.changes.append(change)
    return log
