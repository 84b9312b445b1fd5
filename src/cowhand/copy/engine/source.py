"""Where a copy reads: one disk, several one behind the other, or a part of one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from cowhand.block.format_io.mapped import MappedFormat
from cowhand.block.node.node import READ
from cowhand.copy.engine import plan
from cowhand.copy.engine.plan import Policy, Run
from cowhand.core.buffers import fill_zero
from cowhand.core.errors import CowhandError
from cowhand.core.extents import COMPRESSED, DATA, ENCODED, OFFSET

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.core.extents import ExtentBatch

SECTOR = 512
#: Bytes that a salvaging source plans at once.
_STRETCH = 2 << 20


class Part(NamedTuple):
    """Bytes ``[begin, begin + length)`` of a disk."""

    disk: Disk
    begin: int
    length: int

    @property
    def span(self) -> int:
        """The length in whole sectors, as QEMU counts disks."""
        return -(-self.length // SECTOR) * SECTOR


class Source:
    """*parts* (disks, or :class:`Part`) one behind the other, each rounded up to whole sectors. Reading is thread-safe.

    *exact* leaves the last one as long as it is: what the target has behind it is none of the copy's business.
    *depth* limits how many layers are asked what they allocate (1: each disk's own image, for a target that has a backing file).
    """

    #: whether several runs may be read before what the first one brings is told
    joins = True

    def __init__(self, parts: Sequence[Disk | Part], *, depth: int | None = None, exact: bool = False) -> None:
        self.parts = tuple(part if isinstance(part, Part) else Part(part, 0, part.size) for part in parts)
        self.depth = depth
        self.bases: list[int] = []
        self.size = 0
        for part in self.parts:
            self.bases.append(self.size)
            self.size += part.span
        if exact:
            self.size = self.bases[-1] + self.parts[-1].length

    def runs(self, policy: Policy) -> Iterator[Run]:
        """Yield what is to be done for the whole of it, in order; asks the disks while it goes."""
        return plan.joined(plan.rounded(self._rows(policy), policy.unit, self.size))

    def _rows(self, policy: Policy) -> Iterator[Run]:
        for base, part in zip(self.bases, self.parts, strict=True):
            if part.length:
                yield from self._rows_of(part, base, policy)
            padding = min(part.span, self.size - base) - part.length
            if padding:
                yield Run(base + part.length, padding, plan.DATA if policy.zeroes_are_data else plan.ZERO)

    def _rows_of(self, part: Part, base: int, policy: Policy) -> Iterator[Run]:
        return plan.rows_of(self._asked(part, base), base - part.begin, policy)

    def _asked(self, part: Part, base: int) -> Iterator[ExtentBatch]:
        position = 0
        try:
            for batch in part.disk.extents(part.begin, part.length, depth=self.depth):
                position = batch.end - part.begin
                yield batch
        except CowhandError as error:
            raise error.within(qemu=f"error while reading block status at offset {base + position}") from None

    def require_whole(self) -> None:
        """Raise what reading would raise where it is known beforehand that stored data is missing, as in a file that was cut off."""
        view = memoryview(bytearray(SECTOR))
        for base, part in zip(self.bases, self.parts, strict=True):
            for batch in self._asked(part, base) if part.length else ():
                for row in batch:
                    if row.flags & COMPRESSED and isinstance(row.node, MappedFormat):
                        wanted = row.node.units_at_end(row.start, row.length)
                    else:
                        wanted = (row.start,) if row.flags & (DATA | ENCODED | OFFSET) == DATA | ENCODED else ()
                    for at in wanted:
                        at = max(at, part.begin)
                        part.disk.read_into(at, view[: min(SECTOR, part.disk.size - at)])

    def locate(self, offset: int) -> tuple[Part, int]:
        """Return the part that *offset* lies in, and where in its disk."""
        # An empty part has the same base as the one behind it, which bisect_right finds.
        index = bisect_right(self.bases, offset) - 1
        part = self.parts[index]
        return part, offset - self.bases[index] + part.begin

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill *view* with the bytes at *offset*; the padding behind a part's end reads as zeroes."""
        while True:
            part, at = self.locate(offset)
            inside = max(0, min(len(view), part.begin + part.length - at))
            if inside == len(view):
                part.disk.read_into(at, view)
                return
            if inside:
                part.disk.read_into(at, view[:inside])
            whole = min(len(view), part.begin + part.span - at)
            fill_zero(view[inside:whole])
            view = view[whole:]
            offset += whole
            if not view:
                return

    def announce(self, offset: int, length: int) -> None:
        """Say that ``[offset, offset + length)`` will be read soon. A hint: what is wrong is told by the reading."""
        part, at = self.locate(offset)
        node = part.disk.root
        length = min(length, part.begin + part.length - at)
        if length > 0 and isinstance(node, MappedFormat):
            with suppress(CowhandError), part.disk.lease():
                node.announce(at, length)

    def read_all(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view of *wanted*, (offset, view), as :meth:`read_into` does; an error is that of the first one that cannot be read."""
        part, _ = self.locate(wanted[0][0])
        base = wanted[0][0] - self.locate(wanted[0][0])[1]
        offset, view = wanted[-1]
        if len(wanted) > 1 and offset + len(view) - base <= part.begin + part.length:
            try:
                part.disk.submit([(READ, offset - base, view) for offset, view in wanted])
            except CowhandError:
                pass  # by themselves it is found out which one it is
            else:
                return
        for offset, view in wanted:
            try:
                self.read_into(offset, view)
            except CowhandError as error:
                error.facts["disk_offset"] = offset
                if "guest_offset" in error.facts:
                    error.facts["source_offset"] = error.facts["guest_offset"] + base
                raise


class SalvagingSource(Source):
    """A source whose unreadable sectors read as zeroes, and are told to *report* (their offset and the error).

    Where not even the kind of a sector can be found out (*unknown* is told, if given), it is read.
    """

    joins = False

    def __init__(
        self,
        parts: Sequence[Disk | Part],
        *,
        depth: int | None = None,
        report: Callable[[int, CowhandError], None],
        unknown: Callable[[int, CowhandError], None] | None = None,
    ) -> None:
        super().__init__(parts, depth=depth)
        self._report = report
        self._unknown = unknown

    def runs(self, policy: Policy) -> Iterator[Run]:
        # Not joined: what is wrong with a stretch is told when it is the stretch's turn.
        return plan.rounded(self._rows(policy), policy.unit, self.size)

    def _rows_of(self, part: Part, base: int, policy: Policy) -> Iterator[Run]:
        position, end, length = part.begin, part.begin + part.length, _STRETCH
        while position < end:
            length = min(length, end - position)
            try:
                batches = list(part.disk.extents(position, length, depth=self.depth))
            except CowhandError as error:
                if length > SECTOR:
                    length = -(-length // (4 * SECTOR)) * SECTOR
                    continue
                at = position - part.begin + base
                if self._unknown is not None:
                    self._unknown(at, error)
                yield Run(at, length, plan.DATA)
            else:
                yield from plan.rows_of(batches, base - part.begin, policy)
            position += length
            length = _STRETCH

    def read_into(self, offset: int, view: memoryview) -> None:
        # Halved until the bad sectors stand alone: a medium's few bad ones cost a few reads each, not one for every sector around them.
        waiting = [(offset, view)]
        while waiting:
            position, part = waiting.pop()
            try:
                super().read_into(position, part)
            except CowhandError as error:
                if len(part) <= SECTOR:
                    fill_zero(part)
                    self._report(position, error)
                    continue
                middle = len(part) // 2
                middle += -(position + middle) % SECTOR
                if middle >= len(part):
                    middle = len(part) // 2
                waiting += ((position + middle, part[middle:]), (position, part[:middle]))
