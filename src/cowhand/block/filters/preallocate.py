"""The filter "preallocate": space behind the end of a growing file is taken in large pieces, and what was not used is given back at the end.

Source: QEMU's ``BlockdevOptionsPreallocate``. The file is longer than its users know while the filter has it alone for writing: from the moment when
somebody may write and resize it until nobody may, or it is closed. After a crash the file keeps its zeroes behind the end, as with QEMU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cowhand.block.filters.base import PassingFilter
from cowhand.block.node.node import RESIZE, WRITE, Child, Zeroing
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.core.locks import RANK_SECTOR, ranked_lock

if TYPE_CHECKING:
    from cowhand.core.locks import Lock

_SECTOR = 512
_OWN = WRITE | RESIZE


class PreallocateOptions(NodeOptions):
    """Options of the filter."""

    prealloc_align: int = option(
        1 << 20, kind="size", help="the file's length is rounded up to this (default 1M)", strong=False
    )
    prealloc_size: int = option(128 << 20, kind="size", help="how much to take at once (default 128M)", strong=False)


class PreallocateNode(PassingFilter):
    """A filter over a file. Its size is the end of what was written, not that of the file."""

    driver: ClassVar[str] = "preallocate"
    options_class: ClassVar[type[NodeOptions]] = PreallocateOptions
    changeable: ClassVar[frozenset[str]] = frozenset(("prealloc-align", "prealloc-size"))
    options: PreallocateOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        #: Held while the file grows; writes inside of it take no lock.
        self._lock: Lock = ranked_lock(RANK_SECTOR, "preallocation")
        self._end: int | None = None  #: what users see, None while others may change the file
        self._file_end = 0  #: how long the file is
        self._zeroes = 0  #: from here to the file's end are only zeroes
        self._able = True

    def start(self) -> None:
        super().start()
        align, block = self.options.prealloc_align, self.below.node.limits.request_alignment
        what = "prealloc-align parameter of preallocate filter is not aligned to"
        if align % _SECTOR or not align:
            raise InvalidArgument(f"{what} {_SECTOR}")
        if align % block:
            raise InvalidArgument(f"{what} underlying node request alignment ({block})")
        self._able = self.below.node.capabilities.zeroes is Zeroing.NATIVE

    # -- who has the file

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        return perm, shared & ~_OWN if perm & _OWN == _OWN else shared

    def update_permissions(self, perm: int, shared: int) -> None:
        if not self.children:
            return
        with self._lock:
            if perm & _OWN != _OWN:
                self._give_back()
                self._end = None
            elif self._end is None and self.writable:
                self._end = self._file_end = self._zeroes = self.below.node.size

    def _give_back(self) -> None:
        """Cut off what is not used (lock held)."""
        if self._end is not None and self._end < self._file_end:
            self.below.node.resize(self._end, shrink=True)
            self._file_end = self._zeroes = self._end

    @property
    def size(self) -> int:
        end = self._end
        return self.below.node.size if end is None else end

    def close(self) -> None:
        if self.children:
            with self._lock:
                self._give_back()

    # -- requests

    def _extend(self, offset: int, length: int, *, zeroes: bool = False) -> bool:
        """Take space for a write that goes past the end; tell whether it is zeroes that are there already."""
        end = offset + length
        before = self._end
        if before is None or end <= before:
            return False
        with self._lock:
            if end > self._file_end:
                self._grow(end)
            known = zeroes and offset >= self._zeroes and end <= self._file_end
            if not known:
                self._zeroes = max(self._zeroes, end)
            self._end = max(self._end or 0, end)
            self._file_end = max(self._file_end, end)
            return known

    def _grow(self, end: int) -> None:
        # Nothing is in flight behind the file's end: who writes there comes through here first.
        if not self._able:
            return
        block = self.limits.request_alignment
        begin = -(-self._file_end // block) * block
        align = self.options.prealloc_align
        stop = -(-(max(begin, end) + self.options.prealloc_size) // align) * align
        try:
            self.below.write_zeroes(begin, stop - begin, fallback=False)
        except CowhandError:
            self._able = False  # no space, or no such call: then the write has to do by itself
            return
        self._file_end = stop

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self.below.read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self._extend(offset, sum(len(buffer) for buffer in buffers))
        self.below.write(offset, buffers, fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if not self._extend(offset, length, zeroes=not unmap and not fua):
            self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def extend(self, size: int, limit: int) -> None:
        end = self._end
        if end is None:
            super().extend(size, limit)
        elif end < size:
            # What was taken ahead reads as zeroes where nothing was written.
            self.write_zeroes(end, size - end)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if size < self.size and not shrink:
            raise InvalidArgument("the file would be cut shorter, which was not allowed", path=self.filename)
        with self._lock:
            if self._end is not None and size > self._end:
                if preallocation == "falloc" and size <= self._file_end:
                    self._end = size
                    return
                if preallocation != "falloc":
                    self._give_back()
            self.below.node.resize(size, preallocation=preallocation, shrink=shrink or self._end is not None)
            if self._end is not None:
                self._end = self._file_end = self._zeroes = size
