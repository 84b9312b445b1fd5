"""Bytes in memory: a file that exists only in this process. Our own protocol; no specification but that of BlockNode.

It behaves like a regular file on a medium without a volatile cache: it grows when it is written beyond its end, gives zeroes beyond it, has
holes, and a flush has nothing to do. Its content is made of immutable pages, so an exact copy of it (:meth:`MemoryNode.copy`) costs
one dictionary, and only what is written afterwards is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.node.node import BlockNode, Capabilities, Limits, Zeroing
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer, fill_zero
from cowhand.core.errors import InvalidArgument, NotSupported, ReadOnly
from cowhand.core.extents import ALLOCATED, DATA, MAX_ROWS, OFFSET, ZERO, ExtentBatch
from cowhand.core.locks import RANK_LEAF, ranked_lock
from cowhand.core.units import MAX_SIZE

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

#: Bytes of a page: what one partial write copies, and the granularity of holes. A file system's block.
PAGE = 4096


class MemoryOptions(NodeOptions):
    """What the memory driver takes."""

    size: int = option(0, kind="size", help="length at the beginning; all of it reads as zeroes")
    request_alignment: int = option(
        1, kind="size", help="offsets and lengths must be multiples of it, as on a disk with large sectors"
    )


class MemoryNode(BlockNode):
    """A sparse, growing array of bytes. Thread-safe: writers take one short lock, readers none, and a page is never seen half written.

    Sizes up to 8 EiB work, since only pages that were written exist. ``MemoryNode(content=...)`` begins with the given bytes.
    """

    driver: ClassVar[str] = "memory"
    outlives_closing: ClassVar[bool] = True
    immediate = True
    options_class: ClassVar[type[NodeOptions]] = MemoryOptions

    def __init__(self, options: MemoryOptions | None = None, content: Buffer = b"") -> None:
        options = options or MemoryOptions()
        super().__init__(options)
        alignment = options.request_alignment
        if alignment < 1 or alignment & (alignment - 1):
            raise InvalidArgument(f"request-alignment {alignment} is not a power of two")
        self.limits = Limits(request_alignment=alignment, zero_alignment=alignment, discard_alignment=alignment)
        self.capabilities = Capabilities(
            writable=self.writable, zeroes=Zeroing.NATIVE, discard=True, fua=True, resizable=self.writable
        )
        self._pages: dict[int, bytes] = {}
        self._size = max(options.size, len(content))
        self._lock = ranked_lock(RANK_LEAF, "memory pages")
        if content:
            self._store(0, memoryview(content))

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> MemoryNode:
        assert isinstance(options, MemoryOptions)
        return cls(options)

    def copy(self) -> MemoryNode:
        """Return a new, open node with the same content and options. Pages are shared until one side writes them."""
        twin = type(self)(self._anonymous_options())
        with self._lock:
            twin._pages = self._pages.copy()
            twin._size = self._size
        return twin

    def _anonymous_options(self) -> MemoryOptions:
        assert isinstance(self.options, MemoryOptions)
        return MemoryOptions(request_alignment=self.options.request_alignment)

    def snapshot_bytes(self) -> bytes:
        """Return the whole content. Meant for small nodes: it makes one object of ``size`` bytes."""
        content = bytearray(self._size)
        self.read_into(0, content)
        return bytes(content)

    @property
    def size(self) -> int:
        return self._size

    @property
    def filename(self) -> str:
        return "json:" + json.dumps({"driver": "memory", "size": self._size})

    # -- data

    def _aligned(self, offset: int, length: int) -> None:
        alignment = self.limits.request_alignment
        if (offset | length) & (alignment - 1):
            raise InvalidArgument(
                f"request at {offset:#x} of {length} bytes is not aligned to {alignment}", offset=offset
            )

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        length = len(view)
        self._aligned(offset, length)
        pages = self._pages
        done = 0
        while done < length:
            index, inside = divmod(offset + done, PAGE)
            count = min(PAGE - inside, length - done)
            page = pages.get(index)
            if page is None:
                fill_zero(view[done : done + count])
            elif count == PAGE:
                view[done : done + PAGE] = page
            else:
                view[done : done + count] = memoryview(page)[inside : inside + count]
            done += count

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self._check_writable()
        self._aligned(offset, sum(len(buffer) for buffer in buffers))
        for buffer in buffers:
            view = memoryview(buffer)
            self._store(offset, view)
            offset += len(view)

    def _store(self, offset: int, view: memoryview) -> None:
        length = len(view)
        done = 0
        with self._lock:
            self._grow(offset + length)
            while done < length:
                index, inside = divmod(offset + done, PAGE)
                count = min(PAGE - inside, length - done)
                piece = bytes(view[done : done + count])
                self._pages[index] = piece if count == PAGE else self._patched(index, inside, piece)
                done += count

    def _patched(self, index: int, inside: int, piece: bytes) -> bytes:
        page = self._pages.get(index) or bytes(PAGE)
        return page[:inside] + piece + page[inside + len(piece) :]

    def _grow(self, end: int) -> None:
        if end > MAX_SIZE:
            raise InvalidArgument(f"a memory node cannot be longer than {MAX_SIZE} bytes", offset=end)
        self._size = max(self._size, end)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self._check_writable()
        self._aligned(offset, length)
        with self._lock:
            self._grow(offset + length)
            self._punch(offset, offset + length)

    def discard(self, offset: int, length: int) -> None:
        self._check_writable()
        self._aligned(offset, length)
        with self._lock:
            self._punch(offset, min(offset + length, self._size))

    def _punch(self, begin: int, end: int) -> None:
        """Make ``[begin, end)`` a hole: drop whole pages, clear parts of the others. The lock is held."""
        for index in list(self._present(begin, end)):
            first = max(begin - index * PAGE, 0)
            last = min(end - index * PAGE, PAGE)
            if last - first == PAGE:
                del self._pages[index]
            else:
                self._pages[index] = self._patched(index, first, bytes(last - first))

    def _present(self, begin: int, end: int) -> Iterator[int]:
        """Yield the pages that exist in ``[begin, end)``, ascending; its cost is the smaller of the range and the content."""
        pages = self._pages
        first, last = begin // PAGE, -(-end // PAGE)
        if last - first <= len(pages):
            return (index for index in range(first, last) if index in pages)
        return iter(sorted(index for index in list(pages) if first <= index < last))

    def flush(self) -> None:
        pass

    # -- what is where

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        end = offset + length
        position = offset
        for index in self._present(offset, end):
            begin = max(index * PAGE, offset)
            if begin > position:
                batch.add(position, begin - position, ZERO | ALLOCATED | OFFSET, position, self)
            position = min((index + 1) * PAGE, end)
            batch.add(begin, position - begin, DATA | ALLOCATED | OFFSET, begin, self)
            if len(batch) >= MAX_ROWS - 1:
                return batch
        if position < end:
            batch.add(position, end - position, ZERO | ALLOCATED | OFFSET, position, self)
        return batch

    def allocated_size(self) -> int:
        return len(self._pages) * PAGE

    # -- life

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        self._check_writable()
        if preallocation != "off":
            raise NotSupported(
                f"Unsupported preallocation mode '{preallocation}'", hint="Memory is taken when it is written."
            )
        with self._lock:
            if size < self._size:
                if not shrink:
                    raise InvalidArgument(
                        f"the new size {size} is smaller than {self._size}",
                        hint="Allow shrinking if the data may be lost.",
                    )
                self._punch(size, self._size)
                self._size = size
            else:
                self._grow(size)

    def _check_writable(self) -> None:
        if not self.writable:
            raise ReadOnly(f"node '{self.name}' was opened for reading only")
