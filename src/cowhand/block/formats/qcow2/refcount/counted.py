"""References to host clusters, counted: what the reference counts of a qcow2 image ought to be. No I/O.

Counts are kept in the machine's byte order, in segments of up to half a million clusters that are made when they are first needed. A segment's
memory comes zeroed from the system, page by page as it is touched: a sparse image costs what its references cost.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Literal

SEGMENT_BITS = 19
#: Clusters that are counted together from which numpy is worth its import.
_LONG_RUN = 1 << 14
#: Clusters that are looked at together when what is counted is sought.
_STRETCH = 1 << 13
_CODES: dict[int, Literal["B", "H", "I", "Q"]] = {0: "B", 1: "B", 2: "B", 3: "B", 4: "H", 5: "I", 6: "Q"}
_LITTLE = sys.byteorder == "little"


def native(block: bytes | bytearray, order: int) -> bytes:
    """Return the counts of a refcount block, ``2**order`` bits wide, in the form that :class:`Tally` keeps: whole bytes, the machine's order."""
    if order >= 3:
        if order == 3 or not _LITTLE:
            return bytes(block)
        values = array(_CODES[order], bytes(block))
        values.byteswap()
        return values.tobytes()
    bits = 1 << order
    mask = (1 << bits) - 1
    spread = [bytes((byte >> shift) & mask for shift in range(0, 8, bits)) for byte in range(256)]
    return b"".join([spread[byte] for byte in block])


def encoded(values: bytes, order: int) -> bytes:
    """Return the refcount block that :func:`native` gave as *values*."""
    if order >= 3:
        return native(values, order)
    bits = 1 << order
    per = 8 // bits
    columns = [values[i::per] for i in range(per)]
    return bytes(sum(value << (bits * i) for i, value in enumerate(group)) for group in zip(*columns, strict=True))


class Tally:
    """Counts of host clusters, none above ``maximum``. Not thread-safe.

    *overflow* is called with (cluster, times) for references that no longer fit.
    """

    def __init__(self, order: int, clusters: int, overflow: Callable[[int, int], None]) -> None:
        self.order = order
        self.code = _CODES[order]
        self.width = max(1, (1 << order) // 8)
        self.maximum = (1 << 63) - 1 if order == 6 else (1 << (1 << order)) - 1
        # Whole refcount blocks, whatever the cluster size: 2 MiB clusters of 1-bit counts have 2**24 of them.
        self.bits = min(SEGMENT_BITS, max(9, clusters.bit_length()))
        self.size = 1 << self.bits
        self._within = self.size - 1
        self._overflow = overflow
        self.segments: dict[int, bytearray] = {}
        self._views: dict[int, memoryview] = {}
        self.numpy: Any = None
        self._arrays: dict[int, Any] = {}

    def use_numpy(self) -> Any:
        """Import numpy, worth its 100 ms for many tables only, and use it from now on."""
        if self.numpy is None:
            import numpy

            self.numpy = numpy
        return self.numpy

    def _segment(self, number: int) -> bytearray:
        found = self.segments.get(number)
        if found is None:
            found = self.segments[number] = bytearray(self.size * self.width)
            self._views[number] = memoryview(found).cast(self.code)
        return found

    def _array(self, number: int) -> Any:
        found = self._arrays.get(number)
        if found is None:
            found = self._arrays[number] = self.numpy.frombuffer(self._segment(number), dtype=self.code)
        return found

    # -- looking

    def get(self, cluster: int) -> int:
        """Return the count of *cluster*."""
        view = self._views.get(cluster >> self.bits)
        return int(view[cluster & self._within]) if view is not None else 0

    def piece(self, first: int, count: int) -> bytes | None:
        """Return *count* native counts from *first* on, or None when all of them are zero because nothing was ever counted there."""
        parts = []
        known = False
        for number, begin, step in self._split(first, count):
            segment = self.segments.get(number)
            known = known or segment is not None
            if segment is None:
                parts.append(bytes(step * self.width))
            else:
                parts.append(bytes(segment[begin * self.width : (begin + step) * self.width]))
        return b"".join(parts) if known else None

    def next_known(self, cluster: int) -> int:
        """Return *cluster*, or the beginning of the next stretch in which something may be counted; without any, the end of its own."""
        number = cluster >> self.bits
        if number in self.segments:
            return cluster
        later = min((other for other in self.segments if other > number), default=number + 1)
        return later << self.bits

    def is_all(self, first: int, count: int, value: int) -> bool:
        """Tell whether *count* clusters from *first* on all have the count *value*."""
        piece = self.piece(first, count)
        if piece is None:
            return value == 0
        return piece == value.to_bytes(self.width, sys.byteorder) * count

    def each(self, clusters: Sequence[int]) -> Sequence[int]:
        """Return the counts of *clusters*, at least two."""
        number = min(clusters) >> self.bits
        if number != max(clusters) >> self.bits:
            return [self.get(cluster) for cluster in clusters]
        view = self._views.get(number)
        if view is None:
            return [0] * len(clusters)
        base = number << self.bits
        counts: tuple[int, ...] = itemgetter(*[cluster - base for cluster in clusters])(view)
        return counts

    def gather(self, clusters: Any) -> Any:
        """Return the counts of the numpy array *clusters*, in its order."""
        numpy = self.numpy
        segments = clusters >> self.bits
        low, high = int(segments.min()), int(segments.max())
        local = clusters & self._within
        if low == high:
            return self._array(low)[local] if low in self.segments else numpy.zeros(len(clusters), dtype=self.code)
        out = numpy.zeros(len(clusters), dtype=self.code)
        for number in numpy.unique(segments).tolist():
            if number in self.segments:
                chosen = segments == number
                out[chosen] = self._array(number)[local[chosen]]
        return out

    def _split(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        while count:
            begin = first & self._within
            step = min(count, self.size - begin)
            yield first >> self.bits, begin, step
            first += step
            count -= step

    # -- counting

    def add(self, first: int, count: int, times: int = 1) -> None:
        """Count *times* references to each of *count* clusters from *first* on."""
        if count == 1:
            number, at = first >> self.bits, first & self._within
            self._segment(number)
            view = self._views[number]
            value = view[at] + times
            if value > self.maximum:
                self._overflow(first, value - self.maximum)
                value = self.maximum
            view[at] = value
            return
        for number, begin, step in self._split(first, count):
            self._add_run(number, begin, step, times)

    def add_each(self, clusters: Sequence[int], times: int = 1) -> None:
        """Count *times* references to each of *clusters*, at least two, in any order, without numpy."""
        number = min(clusters) >> self.bits
        if number == max(clusters) >> self.bits and len(set(clusters)) == len(clusters):
            self._segment(number)
            view, base = self._views[number], number << self.bits
            local = [cluster - base for cluster in clusters]
            known = set(itemgetter(*local)(view))
            if max(known) + times <= self.maximum:
                if len(known) == 1:
                    value = known.pop() + times
                    for cluster in local:
                        view[cluster] = value
                else:
                    for cluster in local:
                        view[cluster] += times
                return
        for cluster in clusters:
            self.add(cluster, 1, times)

    def _add_run(self, number: int, begin: int, count: int, times: int) -> None:
        width = self.width
        segment = self._segment(number)
        start, end = begin * width, (begin + count) * width
        head = bytes(segment[start : start + width])
        value = int.from_bytes(head, sys.byteorder) + times
        if value <= self.maximum and segment[start:end] == head * count:
            segment[start:end] = value.to_bytes(width, sys.byteorder) * count
            return
        if self.numpy is not None or count >= _LONG_RUN:
            self.use_numpy()
            values = self._array(number)[begin : begin + count]
            if int(values.max()) + times <= self.maximum:
                values += values.dtype.type(times)
                return
        for cluster in range((number << self.bits) + begin, (number << self.bits) + begin + count):
            self.add(cluster, 1, times)

    def add_many(self, clusters: Any, times: int = 1) -> None:
        """Count *times* references to each element of the numpy array *clusters*, in which numbers may appear repeatedly."""
        numpy = self.numpy
        segments = clusters >> self.bits
        low, high = int(segments.min()), int(segments.max())
        for number in (low,) if low == high else numpy.unique(segments).tolist():
            local = (clusters if low == high else clusters[segments == number]) & self._within
            values = self._array(number)
            if int(values[local].max()) + times * len(local) <= self.maximum:
                numpy.add.at(values, local, values.dtype.type(times))
            else:
                unique, repeats = numpy.unique(local, return_counts=True)
                wanted = values[unique].astype("u8") + repeats.astype("u8") * numpy.uint64(times)
                over = wanted > self.maximum
                for cluster, excess in zip(unique[over].tolist(), (wanted[over] - self.maximum).tolist(), strict=True):
                    self._overflow((number << self.bits) + cluster, excess)
                values[unique] = numpy.minimum(wanted, self.maximum)

    def replace(self, first: int, values: bytes) -> None:
        """Make the native *values* the counts of the clusters from *first* on."""
        at = 0
        for number, begin, step in self._split(first, len(values) // self.width):
            start, length = begin * self.width, step * self.width
            self._segment(number)[start : start + length] = values[at : at + length]
            at += length

    def used_blocks(self, per_block: int) -> Iterator[int]:
        """Yield, rising, the numbers of the refcount blocks in whose range something may be counted."""
        last = -1
        step = min(_STRETCH, self.size)
        zeroes = bytes(step * self.width)
        for number in sorted(self.segments):
            segment = self.segments[number]
            for begin in range(0, self.size, step):
                if segment[begin * self.width : (begin + step) * self.width] == zeroes:
                    continue
                first = (number << self.bits) + begin
                for block in range(max(first // per_block, last + 1), (first + step - 1) // per_block + 1):
                    last = block
                    yield block
