"""Reading whole L2 tables at once (QEMU ``docs/interop/qcow2``, "L2 table entry"): which host clusters a table refers to, how fragmented it is.

Only sound tables are taken; one with anything odd is left to the caller, who looks at it entry by entry. Tables in order are compared as bytes;
many others are read with numpy, few without, since importing it takes as long as some tens of them.
"""

from __future__ import annotations

import sys
from array import array
from functools import reduce
from itertools import pairwise
from operator import or_, sub
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import adjoining
from cowhand.block.formats.qcow2.ondisk.l2_ordered import OrderedTables

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.refcount.counted import Tally

_LITTLE = sys.byteorder == "little"
#: Tables not in order that are read without numpy; one of extended entries costs as much as two.
PLAIN_TABLES = 32
#: and entries, in tables of large clusters
_PLAIN_ENTRIES = 1 << 18
#: of a bitmap of subclusters
_DATA_BITS = (1 << 32) - 1


class Scan(NamedTuple):
    """What a table holds. Clusters are counted as QEMU's check counts them.

    ``runs`` are (first cluster, clusters) of all that is not compressed, when each entry has its COPIED bit and the runs are few; otherwise
    ``scattered`` are the clusters, as far as they are kept. Both None when a check of these bits has to look at the table again.
    """

    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0
    runs: tuple[tuple[int, int], ...] | None = None
    scattered: array[int] | None = None


#: Runs of a table that are remembered.
_FEW = 64
EMPTY = Scan(runs=())


class Scanner:
    """Scans L2 tables of one image into *tally*; every cluster has to begin before *length*, the file's. Not thread-safe."""

    def __init__(
        self, cluster_bits: int, tally: Tally, length: int, *, extended: bool = False, external: bool = False
    ) -> None:
        self.bits = cluster_bits
        self.size = 1 << cluster_bits
        self.tally = tally
        self.last = length - 1  #: highest offset at which a cluster may begin
        self.end = -(-length // self.size) * self.size
        self.stride = 2 if extended else 1
        self.external = external  #: data clusters lie in another file
        self.entries = self.size // (8 * self.stride)
        self.table_bytes = self.size
        self._zeroes = bytes(self.size)
        self._bad = L.L2_RESERVED_MASK | ((self.size - 1) & L.L2_OFFSET_MASK)
        self._zero_flag = 0 if extended else L.ENTRY_ZERO
        self._cost = 0
        self._data_bits = 0
        self._in_order = OrderedTables(cluster_bits, self.stride)

    def scan(self, data: bytes, times: int = 1) -> Scan | None:
        """Count *times* references to every cluster that the table *data* refers to; None, and nothing counted, when something in it is odd."""
        if data == self._zeroes:
            return EMPTY
        found = self._ordered(data, times)
        if found is not None:
            return found
        self._cost += self.stride
        many = self._cost > PLAIN_TABLES or self._cost * self.entries > _PLAIN_ENTRIES
        if self.tally.numpy is None and many:
            self.tally.use_numpy()
        if self.tally.numpy is not None and not self.external:
            return self._vector(data, times)
        return self._plain(data, times)

    # -- a full table in one run

    def _ordered(self, data: bytes, times: int) -> Scan | None:
        first = L.U64.unpack_from(data)[0]
        host = first ^ L.COPIED
        if self.external or host & (L.ENTRY_COMPRESSED | self._zero_flag | L.COPIED | self._bad) or not host:
            return None
        last = host + (self.entries - 1) * self.size
        if L.U64.unpack_from(data, len(data) - 8 * self.stride)[0] != last | L.COPIED or last > self.last:
            return None
        bitmap = L.U64.unpack_from(data, 8)[0] if self.stride == 2 else 0
        if (bitmap >> 32) & bitmap or not self._in_order.matches(data):
            return None
        self.tally.add(host >> self.bits, self.entries, times)
        return Scan(self.entries, 0, 0, ((host >> self.bits, self.entries),))

    def _overlapping(self, table: int) -> bool:
        """Tell whether a subcluster is called data and zero at once, in a table of extended entries as one large number."""
        if not self._data_bits:
            self._data_bits = int.from_bytes((bytes(12) + b"\xff" * 4) * self.entries, "big")
        return bool((table >> 32) & table & self._data_bits)

    # -- any table, without numpy

    def _plain(self, data: bytes, times: int) -> Scan | None:
        words = array("Q", data)
        if _LITTLE:
            words.byteswap()
        bitmaps: array[int] | None = None
        if self.stride == 1 and not self.external:
            found = self._scattered(words, times)
            if found is not None:
                return found
        if self.stride == 2:
            if self._overlapping(int.from_bytes(data, "big")):
                return None
            words, bitmaps = words[::2], words[1::2]
        size, bits, mask = self.size, self.bits, L.L2_OFFSET_MASK
        runs: list[tuple[int, int]] = []
        pieces: list[tuple[int, int]] = []
        allocated = fragmented = compressed = 0
        following = position = 0
        copied = True
        count = len(words)
        while position < count:
            entry = words[position]
            position += 1
            bitmap = bitmaps[position - 1] if bitmaps is not None else 0
            if not entry:
                if bitmap & _DATA_BITS:
                    return None
                continue
            if entry & L.ENTRY_COMPRESSED:
                if entry & L.COPIED or self.external or bitmap:
                    return None
                host, nbytes = L.compressed_location(entry, bits)
                if host + nbytes > self.end:
                    return None
                pieces.append((host >> bits, ((host + nbytes - 1) >> bits) - (host >> bits) + 1))
                compressed += 1
                continue
            if entry & self._bad:
                return None
            host = entry & mask
            if not host and not (self.external and entry & L.COPIED and not entry & self._zero_flag):
                if bitmap & _DATA_BITS:
                    return None
                continue
            begin = position - 1
            run = adjoining(words, begin, size)
            position = begin + run
            if host + (run - 1) * size > self.last and not self.external:
                return None
            if following and host != following:
                fragmented += 1
            following = host + run * size
            allocated += run
            copied = copied and bool(entry & L.COPIED)
            runs.append((host >> bits, run))
        if not self.external:
            for first, run in (*runs, *pieces):
                self.tally.add(first, run, times)
        known = tuple(runs) if copied and len(runs) <= _FEW and not self.external else None
        return Scan(allocated + compressed, fragmented + compressed, compressed, known)

    def _scattered(self, words: array[int], times: int) -> Scan | None:
        """Scan a sound table without compressed clusters of which many lie apart; None, and nothing counted, for any other."""
        if words[-1] - words[0] == (len(words) - 1) * self.size:
            return None
        placed = [word for word in words if word & L.L2_OFFSET_MASK]
        if len(placed) < 2 or reduce(or_, words) & (L.ENTRY_COMPRESSED | self._bad):
            return None
        bits, mask = self.bits, L.L2_OFFSET_MASK
        clusters = [(word & mask) >> bits for word in placed]
        steps = list(map(sub, clusters[1:], clusters))
        breaks = len(steps) - steps.count(1)
        if breaks * 4 < len(steps) or max(clusters) << bits > self.last:
            return None
        self.tally.add_each(clusters, times)
        copied = min(placed) >= L.COPIED
        return Scan(len(clusters), breaks, 0, None, array("Q", clusters) if copied else None)

    # -- any table, with numpy

    def _vector(self, data: bytes, times: int) -> Scan | None:
        numpy = self.tally.numpy
        words = numpy.frombuffer(data, ">u8").astype("u8")
        if self.stride == 2:
            words, bitmaps = words[::2], words[1::2]
            if ((bitmaps >> numpy.uint64(32)) & bitmaps).any():
                return None
            nowhere = words & numpy.uint64(L.L2_OFFSET_MASK | L.ENTRY_COMPRESSED) == 0
            if (bitmaps[nowhere] & numpy.uint64(_DATA_BITS)).any():
                return None
            if bitmaps[words & numpy.uint64(L.ENTRY_COMPRESSED) != 0].any():
                return None
        squeezed = (words & numpy.uint64(L.ENTRY_COMPRESSED)) != 0
        compressed = int(numpy.count_nonzero(squeezed))
        packed = words[squeezed]
        if compressed:
            if (packed >> numpy.uint64(63)).any():
                return None
            words = words[~squeezed]
        if (words & numpy.uint64(self._bad)).any():
            return None
        hosts = words & numpy.uint64(L.L2_OFFSET_MASK)
        words, hosts = words[hosts != 0], hosts[hosts != 0]
        allocated = len(hosts)
        if allocated and int(hosts.max()) > self.last:
            return None
        if compressed and not self._packed(packed, times):
            return None
        clusters = (hosts >> numpy.uint64(self.bits)).astype("i8")
        breaks = numpy.flatnonzero(numpy.diff(clusters) != 1)
        known = None
        if allocated and len(breaks) < max(_FEW, allocated // 16):
            runs = [
                (int(clusters[begin]), end - begin) for begin, end in pairwise([0, *(breaks + 1).tolist(), allocated])
            ]
            for first, run in runs:
                self.tally.add(first, run, times)
            if len(runs) <= _FEW and bool((words >> numpy.uint64(63)).all()):
                known = tuple(runs)
        elif allocated:
            self.tally.add_many(clusters, times)
        return Scan(allocated + compressed, len(breaks) + compressed, compressed, known)

    def _packed(self, entries: Any, times: int) -> bool:
        """Count what compressed clusters touch; False, and nothing counted, when one lies beyond the end."""
        numpy = self.tally.numpy
        shift = 62 - (self.bits - 8)
        offsets = (entries & numpy.uint64((1 << shift) - 1)).astype("i8")
        sectors = ((entries & numpy.uint64(L.ENTRY_COMPRESSED - 1)) >> numpy.uint64(shift)).astype("i8") + 1
        ends = offsets - offsets % 512 + sectors * 512
        if int(ends.max()) > self.end:
            return False
        first, last = offsets >> self.bits, (ends - 1) >> self.bits
        self.tally.add_many(first, times)
        while True:
            first = first + 1
            more = first <= last
            if not more.any():
                return True
            first, last = first[more], last[more]
            self.tally.add_many(first, times)

    # -- COPIED bits

    def flags_sound(self, data: bytes) -> bool:
        """Tell, by the counts in the tally, whether every COPIED bit of the table *data* is set where the count is 1, and only there.

        False may also mean that it takes a look at each entry to find out.
        """
        numpy = self.tally.numpy
        if numpy is None or self.external:
            return False
        words = numpy.frombuffer(data, ">u8").astype("u8")[:: self.stride]
        hosts = words & numpy.uint64(L.L2_OFFSET_MASK)
        normal = (hosts != 0) & (words & numpy.uint64(L.ENTRY_COMPRESSED) == 0)
        words, hosts = words[normal], hosts[normal]
        if not len(hosts):
            return True
        if int(hosts.max()) > self.last:
            return False
        counts = self.tally.gather((hosts >> numpy.uint64(self.bits)).astype("i8"))
        return bool(((counts == 1) == (words >> numpy.uint64(63) != 0)).all())
