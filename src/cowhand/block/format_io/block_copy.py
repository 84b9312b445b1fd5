"""Copying between two children of a filter, granule by granule, beside guests that write (QEMU: ``block/block-copy.c``).

A bitmap says what is still to be copied. Whoever copies a range (a job, or a guest's write that may not overwrite it before) holds its
lock meanwhile; so nothing is copied twice, and a write that finds its granules clean may go on.
"""

from __future__ import annotations

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.block.access.range_locks import RangeLocks
from cowhand.block.graph.block_status import layered
from cowhand.block.node.node import Child, Zeroing
from cowhand.core.buffers import is_zero
from cowhand.core.errors import CowhandError
from cowhand.core.extents import ZERO

#: Bytes that are read and written at once.
PIECE = 1 << 20
#: The least that is copied at once: a smaller granule would make every small write of a guest copy more often than it pays.
MIN_GRANULE = 1 << 16


def granule_of(*children: Child) -> int:
    """Return the bytes that are to be copied at once to the last of *children*: its allocation unit, 64 KiB at least."""
    unit = MIN_GRANULE
    for child in children:
        node = child.node
        while node.is_filter and node.primary is not None:
            node = node.primary.node
        unit = max(unit, getattr(node, "allocation_unit", 1))
    return unit


class BlockCopy:
    """Copies from *source* to *target* what *bits* says. Thread-safe.

    *target_zero* says that the target reads as zeroes where nothing was written. ``written`` and ``zeroed`` count bytes.
    """

    def __init__(self, source: Child, target: Child, bits: Bitmap, *, target_zero: bool = False) -> None:
        self.source = source
        self.target = target
        self.bits = bits
        self.target_zero = target_zero
        self.ranges = RangeLocks()
        self.written = 0
        self.zeroed = 0

    def pending(self, offset: int, length: int) -> bool:
        """Tell whether something of ``[offset, offset + length)`` is still to be copied."""
        return next(self.bits.extents(offset, length), None) is not None

    def aligned(self, offset: int, length: int) -> tuple[int, int]:
        """Return (begin, end) of the granules that a range touches, cut to the disk."""
        unit = self.bits.granularity
        return offset // unit * unit, min(self.bits.size, -(-(offset + length) // unit) * unit)

    def copy(self, offset: int, length: int) -> int:
        """Copy what of ``[offset, offset + length)``, in whole granules, is still to be copied; return how many bytes that were.

        Raises CowhandError, with ``facts["doing"]`` "reading" or "writing"; what was not copied stays marked.
        """
        begin, end = self.aligned(offset, length)
        done = 0
        with self.ranges.hold(begin, end - begin):
            for position, count in list(self.bits.extents(begin, end - begin)):
                self.copy_range(position, count)
                self.bits.clear(position, count)
                done += count
        return done

    def copy_range(self, offset: int, length: int) -> None:
        """Copy a range, whatever the bits say; its lock is held. Raises as :meth:`copy`."""
        position, end = offset, offset + length
        while position < end:
            try:
                rows = layered(self.source.node, position, end - position)
            except CowhandError as error:
                error.facts["doing"] = "reading"
                raise
            for row in rows:
                stop = min(row.end, end)
                if row.flags & ZERO:
                    self._zero(row.start, stop - row.start)
                else:
                    self._copy_data(row.start, stop)
            position = rows.end

    def _copy_data(self, position: int, end: int) -> None:
        while position < end:
            data = bytearray(min(PIECE, end - position))
            try:
                self.source.read_into(position, data)
            except CowhandError as error:
                error.facts["doing"] = "reading"
                raise
            if is_zero(data):
                self._zero(position, len(data))
            else:
                try:
                    self.target.write(position, (data,))
                except CowhandError as error:
                    error.facts["doing"] = "writing"
                    raise
                self.written += len(data)
            position += len(data)

    def _zero(self, offset: int, length: int) -> None:
        self.zeroed += length
        if self.target_zero:
            return
        try:
            if self.target.node.capabilities.zeroes is Zeroing.NONE:
                for at in range(offset, offset + length, PIECE):
                    self.target.write(at, (bytes(min(PIECE, offset + length - at)),))
            else:
                self.target.write_zeroes(offset, length, unmap=True)
        except CowhandError as error:
            error.facts["doing"] = "writing"
            raise
