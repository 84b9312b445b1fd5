"""The recorder: a node that remembers every change of the node below it, so that crashes can be replayed.

The log says when each change began and when it was acknowledged. :mod:`cowhand.testing.replay` makes from it what a medium with a volatile
cache may hold after the power failed: what a completed flush covered, and of the rest anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from cowhand.block.node.node import BlockNode
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.buffers import Buffer
from cowhand.core.extents import ZERO
from cowhand.testing.wrapper import WrapperNode

WRITE, ZERO_RANGE, DISCARD, RESIZE = "write", "zero", "discard", "resize"

#: The moment after everything that was recorded.
END_OF_LOG = 1 << 62
_PIECE = 1 << 20


class Change:
    """One change of a medium. ``length`` is the new size for a resize; ``end`` is None until (unless) it is acknowledged."""

    __slots__ = ("begin", "data", "end", "fua", "kind", "length", "medium", "offset")

    def __init__(
        self, kind: str, offset: int, length: int, data: bytes, fua: bool, begin: int, medium: int = 0
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data = data
        self.fua = fua
        self.begin = begin
        self.medium = medium
        self.end: int | None = None

    def apply(self, image: MemoryNode) -> None:
        """Do the change to *image*."""
        if self.kind == WRITE:
            image.write(self.offset, (self.data,))
        elif self.kind == ZERO_RANGE:
            image.write_zeroes(self.offset, self.length)
        elif self.kind == DISCARD:
            image.discard(self.offset, self.length)
        else:
            image.resize(self.length, shrink=True)

    def apply_part(self, image: MemoryNode, begin: int, end: int) -> None:
        """Do what the change does to bytes ``[begin, end)`` of *image*; not for a resize."""
        begin, end = max(begin, self.offset), min(end, self.offset + self.length)
        if begin >= end:
            return
        if self.kind == WRITE:
            image.write(begin, (memoryview(self.data)[begin - self.offset : end - self.offset],))
        elif self.kind == ZERO_RANGE:
            image.write_zeroes(begin, end - begin)
        else:
            image.discard(begin, end - begin)

    def __repr__(self) -> str:
        where = f" of medium {self.medium}" if self.medium else ""
        if self.kind == RESIZE:
            return f"resize to {self.length:#x}{where}"
        return f"{self.kind} {self.offset:#x}+{self.length:#x}{where}"


class Flush(NamedTuple):
    """A flush that ended well: it covers what was acknowledged before ``begin``, of its own medium."""

    begin: int
    end: int
    medium: int = 0


class Mark(NamedTuple):
    """What the test noted at a moment."""

    moment: int
    label: str
    payload: Any


class Log:
    """What was recorded: changes (those of several threads nearly in the order of their beginnings), flushes, marks. Thread-safe.

    Several media may share one log (an image and its data file): each has its own cache, and a flush of the one orders nothing of another.
    """

    def __init__(self, initial: MemoryNode) -> None:
        self.media = [initial]  #: what each medium held before, by its number
        self.changes: list[Change] = []
        self.flushes: list[Flush] = []
        self.marks: list[Mark] = []
        #: Take the next moment: one C call, so two threads never get the same.
        self.now: Callable[[], int] = itertools.count(1).__next__

    @property
    def initial(self) -> MemoryNode:
        """What the first medium held before."""
        return self.media[0]

    def add_medium(self, initial: MemoryNode) -> int:
        """Have the log tell of one more medium; return its number."""
        self.media.append(initial)
        return len(self.media) - 1

    def mark(self, label: str, payload: Any = None) -> None:
        """Note that *label* (with *payload*) holds from now on."""
        self.marks.append(Mark(self.now(), label, payload))

    def last_mark(self, moment: int, label: str | None = None) -> Mark | None:
        """Return the last mark (of that *label*) before *moment*, or None."""
        marks = (mark for mark in reversed(self.marks) if mark.moment < moment and label in (None, mark.label))
        return next(marks, None)

    def horizon(self, moment: int, medium: int = 0) -> int:
        """Return the moment before which everything acknowledged was stable on *medium* when the power failed at *moment*."""
        return max((flush.begin for flush in self.flushes if flush.medium == medium and flush.end < moment), default=0)


class RecorderNode(WrapperNode):
    """Records every write, zeroing, discard, resize and flush with its content, and does it below. Thread-safe.

    *sector* is the smallest unit that the recorded medium writes: with 512 a small write arrives as a whole sector, padded by the edge
    above, as on a disk; with 1 each small write is an event of its own, as nothing real does, which tests order more strictly. With *log*,
    that of another recorder, both are recorded in it.
    """

    driver: ClassVar[str] = "recorder"

    def __init__(
        self, inner: BlockNode, *, sector: int = 1, node_name: str | None = None, log: Log | None = None
    ) -> None:
        super().__init__(inner, node_name=node_name)
        self.limits = inner.limits._replace(request_alignment=max(sector, inner.limits.request_alignment))
        if log is None:
            self.log, self.medium = Log(copy_of(inner)), 0
        else:
            self.log, self.medium = log, log.add_medium(copy_of(inner))

    @contextmanager
    def _recorded(self, kind: str, offset: int, length: int, data: bytes = b"", fua: bool = False) -> Iterator[None]:
        change = Change(kind, offset, length, data, fua, self.log.now(), self.medium)
        self.log.changes.append(change)
        yield
        change.end = self.log.now()

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        data = b"".join(buffers)
        with self._recorded(WRITE, offset, len(data), data, fua):
            super().write(offset, (data,), fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        with self._recorded(ZERO_RANGE, offset, length, fua=fua):
            super().write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        with self._recorded(DISCARD, offset, length):
            super().discard(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        with self._recorded(RESIZE, 0, size):
            super().resize(size, preallocation=preallocation, shrink=shrink)

    def flush(self) -> None:
        begin = self.log.now()
        super().flush()
        self.log.flushes.append(Flush(begin, self.log.now(), self.medium))

    def mark(self, label: str, payload: Any = None) -> None:
        """Note that *label* holds from now on; a checker finds it by ``log.last_mark``."""
        self.log.mark(label, payload)


def copy_of(node: BlockNode) -> MemoryNode:
    """Return the content of *node* as a memory node; holes stay holes."""
    if isinstance(node, MemoryNode):
        return node.copy()
    image = MemoryNode()
    position, end = 0, node.size
    while position < end:
        for row in node.map_batch(position, end - position):
            for offset in range(row.start, row.start if row.flags & ZERO else row.end, _PIECE):
                buffer = bytearray(min(_PIECE, row.end - offset))
                node.read_into(offset, buffer)
                image.write(offset, (buffer,))
            position = row.end
    image.resize(end)
    return image
