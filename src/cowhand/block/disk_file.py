"""A disk as a Python file object: for libraries that read and write files (tarfile, zipfile, shutil, parsers of file systems)."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from cowhand.core.errors import NoSpace, NotSupported

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from cowhand.block.disk import Disk


class DiskFile(io.RawIOBase):
    """An unbuffered binary file over a :class:`cowhand.block.disk.Disk`, with a position of its own.

    The disk's size is the file's: reads stop there, writes behind it raise NoSpace, as on a block device. Closing
    the file flushes the disk and leaves it open. One file object is for one thread; each thread may make its own over the same disk.
    """

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk
        self._position = 0

    @property
    def name(self) -> str:
        """The image's name, as files have it."""
        return self._disk.filename

    @property
    def mode(self) -> str:
        return "rb" if self._disk.read_only else "rb+"

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def readable(self) -> bool:
        self._check_open()
        return True

    def writable(self) -> bool:
        self._check_open()
        return not self._disk.read_only

    def seekable(self) -> bool:
        self._check_open()
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self._disk.size
        elif whence != os.SEEK_SET:
            raise ValueError(f"invalid whence ({whence}, should be {os.SEEK_SET}, {os.SEEK_CUR} or {os.SEEK_END})")
        if offset < 0:
            raise ValueError(f"negative seek position {offset}")
        self._position = offset
        return offset

    def tell(self) -> int:
        self._check_open()
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill as much of *buffer* as the disk has from the position on; 0 at the end. Raises what ``Disk.read_into`` raises."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._disk.size - self._position))
        if count:
            self._disk.read_into(self._position, view[:count])
            self._position += count
        return count

    def write(self, buffer: ReadableBuffer) -> int:
        """Write what fits before the disk's end and return its length. Raises NoSpace where nothing fits, and what ``Disk.write`` raises."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._disk.size - self._position))
        if len(view) and not count:
            raise NoSpace(f"the disk ends at byte {self._disk.size}", path=self._disk.filename, offset=self._position)
        if count:
            self._disk.write(self._position, view[:count])
            self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Refuse: a disk changes its size by ``Disk.resize``, which knows what would be lost."""
        raise NotSupported("a disk's size is changed by resize, not by truncating a file", path=self._disk.filename)

    def flush(self) -> None:
        """Make what was written stable. Nothing is left to do when the disk was closed before."""
        super().flush()
        if not self._disk.read_only and not self._disk.closed:
            self._disk.flush()
