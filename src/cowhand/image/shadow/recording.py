"""A node over which a change of an image is tried out: it reads the file below, and keeps what is written to itself, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from cowhand.block.node.node import BlockNode
from cowhand.core.buffers import Buffer
from cowhand.image.shadow.node import StandInNode

SECTOR = 512
#: Bytes that a rehearsal may write; what is beyond stays on no machine's wish list: the counts of a full 8 TiB image and all its tables.
MAX_BYTES = 512 << 20
#: Of these, what is kept in memory; the rest goes to an unnamed temporary file.
_IN_MEMORY = 16 << 20
WRITE, FLUSH, RESIZE = "write", "flush", "resize"


class Step(NamedTuple):
    """One change: whole sectors ``[offset, offset + length)`` whose bytes are kept at ``place``; a flush; a new size in ``length``."""

    kind: str
    offset: int = 0
    length: int = 0
    place: int = 0


class RehearsalNode(StandInNode):
    """Takes writes for a node that is only read. ``steps`` is what would have to be done below, in this order. Used by one thread."""

    driver: ClassVar[str] = "rehearsal"
    max_bytes, in_memory = MAX_BYTES, _IN_MEMORY
    way_out = "Repair it without a log (--no-log), on a copy."

    def __init__(self, inner: BlockNode) -> None:
        super().__init__(inner)
        self.steps: list[Step] = []
        self.sectors: dict[int, int] = {}  #: sector: where its last content is kept
        self._reads: list[tuple[int, int]] = []
        self._end = 0

    def content(self, step: Step) -> bytes:
        """Return the bytes of a write."""
        self._kept.seek(step.place)
        return self._kept.read(step.length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B")
        self._reads.append((offset, offset + len(view)))
        self._read(offset, view)

    def _read(self, offset: int, view: memoryview) -> None:
        self.below.read_into(offset, view)
        if not self.sectors:
            return
        end = offset + len(view)
        for sector in range(offset // SECTOR, -(-end // SECTOR)):
            place = self.sectors.get(sector)
            if place is not None:
                begin, stop = max(offset, sector * SECTOR), min(end, (sector + 1) * SECTOR)
                self._kept.seek(place + begin - sector * SECTOR)
                view[begin - offset : stop - offset] = self._kept.read(stop - begin)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        data = b"".join(buffers)
        begin, end = offset // SECTOR * SECTOR, -(-(offset + len(data)) // SECTOR) * SECTOR
        whole = bytearray(end - begin)
        self._check_room(self._end + len(whole))
        self._read(begin, memoryview(whole))
        whole[offset - begin : offset - begin + len(data)] = data
        self._kept.seek(self._end)
        self._kept.write(whole)
        for at in range(0, len(whole), SECTOR):
            self.sectors[(begin + at) // SECTOR] = self._end + at
        self.steps.append(Step(WRITE, begin, len(whole), self._end))
        self._end += len(whole)
        self._size = max(self._size, end)

    def flush(self) -> None:
        if self.steps and self.steps[-1].kind != FLUSH:
            self.steps.append(Step(FLUSH))

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        super().resize(size, preallocation=preallocation, shrink=shrink)
        self.steps.append(Step(RESIZE, length=size))

    # -- what it learnt

    @property
    def changed(self) -> bool:
        """Whether anything would be changed."""
        return any(step.kind != FLUSH for step in self.steps)

    def written(self) -> Iterator[tuple[int, int]]:
        """Yield, rising, the ranges (begin, end) that would be written."""
        yield from joined((sector * SECTOR, (sector + 1) * SECTOR) for sector in sorted(self.sectors))

    def only_read(self) -> Iterator[tuple[int, int]]:
        """Yield, rising, the ranges below that were read and stay as they are; none reaches past the end of the file."""
        limit = self.below.node.size
        written = list(self.written())
        at = 0
        for begin, end in joined(sorted(self._reads)):
            end = min(end, limit)
            while at < len(written) and written[at][1] <= begin:
                at += 1
            position = at
            while begin < end:
                if position == len(written) or written[position][0] >= end:
                    yield begin, end
                    break
                if begin < written[position][0]:
                    yield begin, written[position][0]
                begin = written[position][1]
                position += 1


def joined(ranges: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the rising *ranges* with those that touch or overlap made one."""
    current: tuple[int, int] | None = None
    for begin, end in ranges:
        if current is not None and begin <= current[1]:
            current = current[0], max(current[1], end)
            continue
        if current is not None:
            yield current
        current = begin, end
    if current is not None:
        yield current
