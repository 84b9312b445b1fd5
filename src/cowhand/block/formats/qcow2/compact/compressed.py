"""Compacting qcow2: which clusters move where, and how compressed ones are packed anew (QEMU ``docs/interop/qcow2``, "Compressed Clusters
Descriptor"). No I/O.

Compressed data begins at any byte and may reach into the next host cluster. Each piece gets room of its own from a sector on, adjoining the last
one where free clusters adjoin; a cluster is empty when the last piece has left it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.counted import Tally

_SECTOR = 512
#: Pieces of compressed data that one compaction keeps in memory; with more of them they stay where they are.
MAX_PIECES = 4 << 20


class Packed:
    """New places of compressed data: ``pieces`` are (source byte, target byte, length)."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, int]] = []
        self.gained: dict[int, int] = {}  #: references to each target cluster
        self.lost: dict[int, int] = {}  #: references that a source cluster loses
        self.renamed: dict[int, int] = {}  #: L2 entry: the one that replaces it

    @property
    def nbytes(self) -> int:
        """Return how many bytes move."""
        return sum(length for _, _, length in self.pieces)

    def entries(self, numpy: Any) -> tuple[Any, Any]:
        """Return the old entries, rising, and the new ones."""
        old = sorted(self.renamed)
        return numpy.array(old, dtype="u8"), numpy.array([self.renamed[entry] for entry in old], dtype="u8")


class Packer:
    """Collects the compressed entries of all L2 tables, then plans. Used once."""

    def __init__(self, cluster_bits: int, tally: Tally) -> None:
        self.bits = cluster_bits
        self.tally = tally
        self.numpy: Any = tally.use_numpy()
        self._entries: list[Any] = []
        self._times: list[int] = []
        self._count = 0
        self._packed = Packed()
        self._cursor = self._room = 0  #: where the next piece may begin, and where that room ends

    def add(self, column: Any, times: int) -> Iterator[Any]:
        """Take note of the entries *column* of an L2 table to which there are *times* references; yield the clusters that compressed data touches."""
        found = column[column & self.numpy.uint64(L.ENTRY_COMPRESSED) != 0]
        if len(found):
            self._count += len(found)
            if self._count <= MAX_PIECES:
                self._entries.append(found)
                self._times.append(times)
            yield from self._clusters(found)

    def _clusters(self, entries: Any) -> Iterator[Any]:
        """Yield the first clusters that *entries* touch, then the second ones, as long as there are any; each once."""
        numpy = self.numpy
        shift = 62 - (self.bits - 8)
        offsets = entries & numpy.uint64((1 << shift) - 1)
        sectors = ((entries & numpy.uint64(L.ENTRY_COMPRESSED - 1)) >> numpy.uint64(shift)) + numpy.uint64(1)
        ends = offsets - offsets % numpy.uint64(_SECTOR) + sectors * numpy.uint64(_SECTOR) - numpy.uint64(1)
        first, last = (offsets >> numpy.uint64(self.bits)).astype("i8"), (ends >> numpy.uint64(self.bits)).astype("i8")
        while len(first):
            yield numpy.unique(first)
            first = first + 1
            first, last = first[first <= last], last[first <= last]

    def packed(self) -> Packed | None:
        """Return the new places of compressed data, None where none moves."""
        return self._packed if self._packed.pieces else None

    def _by_cluster(self) -> dict[int, list[tuple[int, int]]]:
        """Return {host cluster: (entry, references) of the compressed data that touches it}."""
        if not self._entries or self._count > MAX_PIECES:
            return {}
        numpy = self.numpy
        values, inverse = numpy.unique(numpy.concatenate(self._entries), return_inverse=True)
        times = numpy.zeros(len(values), dtype="i8")
        weights = numpy.repeat(numpy.array(self._times, dtype="i8"), [len(part) for part in self._entries])
        numpy.add.at(times, inverse, weights)
        touching: dict[int, list[tuple[int, int]]] = {}
        for entry, count in zip(values.tolist(), times.tolist(), strict=True):
            offset, length = L.compressed_location(entry, self.bits)
            for cluster in range(offset >> self.bits, ((offset + length - 1) >> self.bits) + 1):
                touching.setdefault(cluster, []).append((entry, count))
        return touching

    def plan(self, free: Any, single: Any) -> tuple[Any, Any]:
        """Return (sources, targets) of the clusters *single* that move as they are; *free* are the clusters to be taken, both rising.

        From the end of the file on, each cluster in use gives up its place for the lowest free one, until both meet.
        """
        numpy = self.numpy
        touching = self._by_cluster()
        stops = [*sorted(touching, reverse=True), -1]
        single, taken = single[::-1], 0
        sources, targets = [], []
        done = 0
        for stop in stops:
            count = int(numpy.count_nonzero(single[done:] > stop))
            candidates, places = single[done : done + count], free[taken : taken + count]
            fits = candidates[: len(places)] > places
            good = len(fits) if fits.all() else int(numpy.argmin(fits))
            sources.append(candidates[:good])
            targets.append(places[:good])
            done, taken = done + good, taken + good
            if good < count or stop < 0:
                break
            used = self._place(touching[stop], free, taken, stop)
            if used is None:
                break
            taken += used
        return numpy.concatenate(sources), numpy.concatenate(targets)

    def _place(self, pieces: list[tuple[int, int]], free: Any, taken: int, limit: int) -> int | None:
        """Give *pieces*, all that is in cluster *limit*, new places before it; return how many free clusters that took, None: no room."""
        packed, begun = self._packed, taken
        cursor, room = self._cursor, self._room
        planned: list[tuple[int, int, int, int, int]] = []
        gained: dict[int, int] = {}
        for entry, times in pieces:
            if entry in packed.renamed:
                continue
            offset, length = L.compressed_location(entry, self.bits)
            while True:
                clusters = range(cursor >> self.bits, ((cursor + length - 1) >> self.bits) + 1)
                have = [packed.gained.get(cluster, 0) + gained.get(cluster, 0) for cluster in clusters]
                if cursor + length <= room and max(have) + times <= self.tally.maximum:
                    break
                if taken == len(free) or free[taken] >= limit:
                    return None
                cluster = int(free[taken])
                taken += 1
                if cluster << self.bits != room or max(have) + times > self.tally.maximum:
                    cursor = cluster << self.bits
                room = (cluster + 1) << self.bits
            planned.append((entry, times, offset, cursor, length))
            for cluster in clusters:
                gained[cluster] = gained.get(cluster, 0) + times
            cursor += -(-length // _SECTOR) * _SECTOR
        for entry, times, offset, target, length in planned:
            packed.pieces.append((offset, target, length))
            packed.renamed[entry] = L.compressed_entry(target, length, self.bits)
            for cluster in range(offset >> self.bits, ((offset + length - 1) >> self.bits) + 1):
                packed.lost[cluster] = packed.lost.get(cluster, 0) + times
        for cluster, times in gained.items():
            packed.gained[cluster] = packed.gained.get(cluster, 0) + times
        self._cursor, self._room = cursor, room
        return taken - begun
