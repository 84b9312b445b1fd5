"""What an image names in its header, and how a header is read for it."""

from __future__ import annotations

import os
from typing import NamedTuple

from cowhand.core.errors import InvalidFormat

#: Bytes of one file that are read to find out what it names: longer than any header, descriptor or metadata region that QEMU accepts.
MAX_READ = 8 << 20

BACKING = "backing file"
DATA_FILE = "data file"
EXTENT = "extent"


class Link(NamedTuple):
    """Another file that an image reads through: ``role`` (BACKING, DATA_FILE, EXTENT), ``name`` as it is written, ``format`` if recorded.

    ``plain``: the name is a path whatever it looks like, relative to the working directory (qcow2's data files).
    """

    role: str
    name: str
    format: str | None = None
    plain: bool = False


class Reader:
    """Reads of an open file, bounded in sum. ``path`` is for messages; ``size`` in bytes. Used by one thread."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._left = MAX_READ
        self.path = path
        self.size = os.lseek(descriptor, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*. Raises InvalidFormat when the file does not have them, or too many were asked for; OSError."""
        if length > self._left or not 0 <= offset <= self.size - length:
            raise InvalidFormat(f"{length} bytes of the header are not in the file", path=self.path, offset=offset)
        self._left -= length
        data = os.pread(self._descriptor, length, offset)
        if len(data) < length:
            raise InvalidFormat(f"{length} bytes of the header are not in the file", path=self.path, offset=offset)
        return data

    def head(self, length: int) -> bytes:
        """Return the first *length* bytes, or as many as there are. Raises OSError."""
        return os.pread(self._descriptor, length, 0)

    def number(self, offset: int, length: int, *, little: bool = False) -> int:
        """Return the unsigned number of *length* bytes at *offset*. Raises as :meth:`read` does."""
        return int.from_bytes(self.read(offset, length), "little" if little else "big")
