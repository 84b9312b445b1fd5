"""Counting what is wrong in an L2 table, and what it refers to, as columns (QEMU ``docs/interop/qcow2``): for entries that are not told singly.

Does what :meth:`cowhand.block.formats.qcow2.check.references.Walk.look_closely` does entry by entry. A file can be full of noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.l2_scan import Scan

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check.check import Examination
    from cowhand.block.formats.qcow2.check.references import Walk

_DATA_BITS = 0xFFFFFFFF


def count(walk: Walk, data: bytes, times: int) -> tuple[Scan, int]:
    """Count *times* references to what the table *data* refers to; return what it has, and how many findings there are in it."""
    walk.tally.use_numpy()
    numpy: Any = walk.tally.numpy
    u8 = numpy.uint64
    words = numpy.frombuffer(data, ">u8").astype("u8")
    wrong = 0
    bitmaps: Any = numpy.zeros(0, "u8")
    if walk.extended:
        words, bitmaps = words[::2].copy(), words[1::2]
    squeezed = words & u8(L.ENTRY_COMPRESSED) != 0
    packed = words[squeezed]
    wrong += int(numpy.count_nonzero(packed >> u8(63)))
    if walk.external:
        wrong += len(packed)
        packed = packed[:0]
    elif walk.extended:
        marked = bitmaps[squeezed] != 0
        wrong += int(numpy.count_nonzero(marked))
        packed = packed[~marked]
    wrong += _packed(walk, packed & u8(L.ENTRY_COMPRESSED - 1), times)
    plain = words[~squeezed]
    wrong += int(numpy.count_nonzero(plain & u8(L.L2_RESERVED_MASK)))
    places = plain & u8(L.L2_OFFSET_MASK)
    named = places != 0
    if walk.external:
        at_zero = plain & u8(L.COPIED) != 0
        named |= at_zero if walk.extended else at_zero & (plain & u8(L.ENTRY_ZERO) == 0)
    if walk.extended:
        bits = bitmaps[~squeezed]
        wrong += int(numpy.count_nonzero(bits[~named] & u8(_DATA_BITS)))
        wrong += int(numpy.count_nonzero(((bits >> u8(32)) & bits)[named] & u8(_DATA_BITS)))
    places = places[named]
    wrong += int(numpy.count_nonzero(places & u8(walk.size - 1)))
    allocated = len(places) + len(packed)
    fragmented = int(numpy.count_nonzero(numpy.diff(places) != u8(walk.size))) + len(packed)
    if not walk.external:
        wrong += _plain(walk, places, times)
    return Scan(allocated, fragmented, len(packed)), wrong


def _plain(walk: Walk, places: Any, times: int) -> int:
    """Count the clusters at *places*; return how many do not lie in the file."""
    numpy: Any = walk.tally.numpy
    inside = places < numpy.uint64(walk.length)
    walk.note_all_behind(places[~inside], walk.size)
    places, beyond = places[inside], len(places) - int(numpy.count_nonzero(inside))
    aligned = places & numpy.uint64(walk.size - 1) == 0
    if aligned.any():
        clusters = (places[aligned] >> numpy.uint64(walk.bits)).astype("i8")
        walk.clusters = max(walk.clusters, int(clusters.max()) + 1)
        walk.tally.add_many(clusters, times)
    for place in places[~aligned].tolist():
        walk.count(place, walk.size, times)
    return beyond


def _packed(walk: Walk, descriptors: Any, times: int) -> int:
    """Count what compressed clusters touch; return how many do not lie in the file."""
    numpy: Any = walk.tally.numpy
    shift = 62 - (walk.bits - 8)
    offsets = (descriptors & numpy.uint64((1 << shift) - 1)).astype("i8")
    ends = offsets - offsets % 512 + ((descriptors >> numpy.uint64(shift)).astype("i8") + 1) * 512
    inside = ends - walk.length < walk.size
    walk.note_all_behind(offsets[~inside], walk.size)
    first, last = offsets[inside] >> walk.bits, (ends[inside] - 1) >> walk.bits
    if len(last):
        walk.clusters = max(walk.clusters, int(last.max()) + 1)
    while len(first):
        walk.tally.add_many(first, times)
        first = first + 1
        first, last = first[first <= last], last[first <= last]
    return len(offsets) - int(numpy.count_nonzero(inside))


def wrong_flags(exam: Examination, data: bytes) -> list[tuple[int, int]]:
    """Return (byte in the table, entry) of each entry of *data* whose COPIED bit is not what the counts on disk say."""
    walk = exam.walk
    walk.tally.use_numpy()
    numpy: Any = walk.tally.numpy
    u8 = numpy.uint64
    words = numpy.frombuffer(data, ">u8").astype("u8")
    at = numpy.arange(0, len(data), L.ENTRY_SIZE)
    if walk.extended:
        words, at = words[::2], at[::2]
    copied = words & u8(L.COPIED) != 0
    places = words & u8(L.L2_OFFSET_MASK)
    judged = words & u8(L.ENTRY_COMPRESSED) == 0
    if walk.external:
        wrong = judged & (places != 0) & ~copied
        return list(zip(at[wrong].tolist(), words[wrong].tolist(), strict=True))
    judged &= places != 0
    words, at, copied, clusters = words[judged], at[judged], copied[judged], places[judged] >> u8(walk.bits)
    # Where the table of counts names no block for a cluster, nothing counts it.
    blocks = numpy.frombuffer(bytes(exam.node.refcounts.table), ">u8") & u8(L.REFCOUNT_TABLE_OFFSET_MASK) != 0
    index = clusters // u8(exam.per_block)
    counted = index < len(blocks)
    counted[counted] = blocks[index[counted]]
    counted |= clusters < u8(-(-walk.length // walk.size))
    alone = numpy.zeros(len(words), bool)
    for position in numpy.flatnonzero(counted).tolist():
        count = exam.disk_count(int(clusters[position]))
        alone[position] = copied[position] if count is None else count == 1
    wrong = alone != copied
    return list(zip(at[wrong].tolist(), words[wrong].tolist(), strict=True))
