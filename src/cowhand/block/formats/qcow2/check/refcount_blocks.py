"""Checking qcow2: count the references from the refcount table to its blocks (QEMU ``docs/interop/qcow2``, "Host cluster management")."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.check.references import LARGE_L1, Walk
from cowhand.block.formats.qcow2.ondisk import findings as F, layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import runs_of, words_of
from cowhand.block.node.records import ERROR, REPAIRED, Finding

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check.check import Examination

#: Segments of the tally over which counting many clusters at once is worth it.
_FEW_SEGMENTS = 64


def count_blocks(exam: Examination, *, fix: bool) -> None:
    """Count every block that the refcount table names; what is wrong with an entry is told, and with *fix* the file made longer for it."""
    walk = exam.walk
    odd = L.REFCOUNT_TABLE_RESERVED_MASK | (walk.size - 1)
    words = words_of(bytes(exam.node.refcounts.table))
    if len(words) >= LARGE_L1:
        _count_sound_blocks(walk, words, odd)
    for first, entry, times in runs_of(words):
        for index in range(first, first + times):
            if exam.room < 0 and index > first + 1 and not entry & odd and walk.tally.get(entry >> walk.bits) > 1:
                # All of them share one block, and nobody hears of the others.
                left = first + times - index
                walk.region(entry, walk.size, "a refcount block", left)
                exam.counters.corruptions += left
                break
            _count_block(exam, index, entry, fix)


def _count_sound_blocks(walk: Walk, words: array[int], odd: int) -> None:
    """Count, in a large refcount table, the blocks that nothing else names, and zero their entries."""
    numpy = walk.tally.use_numpy()
    column = numpy.frombuffer(words, "u8")
    sound = numpy.flatnonzero((column & numpy.uint64(odd) == 0) & (column < walk.length) & (column != 0))
    if not len(sound):
        return
    clusters = (column[sound] >> numpy.uint64(walk.bits)).astype("i8")
    if int(clusters.max() - clusters.min()) >> walk.tally.bits > _FEW_SEGMENTS:
        return
    _, index, times = numpy.unique(clusters, return_index=True, return_counts=True)
    alone = index[times == 1]
    alone = alone[walk.tally.gather(clusters[alone]) == 0] if len(alone) else alone
    if len(alone):
        walk.tally.add_many(clusters[alone])
        column[sound[alone]] = 0


def _count_block(exam: Examination, index: int, entry: int, fix: bool) -> None:
    walk, counters = exam.walk, exam.counters
    cluster = (entry & L.REFCOUNT_TABLE_OFFSET_MASK) >> walk.bits
    odd = entry & (L.REFCOUNT_TABLE_RESERVED_MASK | (walk.size - 1))
    count = 0
    if not odd and cluster < walk.clusters:
        walk.region(entry, walk.size, f"refcount block {index}")
        count = walk.tally.get(cluster)
        if count == 1:
            return
    elif not odd and not fix and exam.room < 0:
        counters.corruptions += 1  # nobody hears of it
        return
    about: dict[str, Any] = {
        "cluster": cluster,
        "offset": exam.node.header.refcount_table_offset + index * L.ENTRY_SIZE,
        "owner": "the refcount table",
        "index": index,
    }
    if odd:
        exam.say(Finding(F.BLOCK_RESERVED if odd & L.REFCOUNT_TABLE_RESERVED_MASK else F.BLOCK_UNALIGNED, **about))
    elif count:
        exam.say(Finding(F.BLOCK_SHARED, refcount=count, **about))
    else:
        exam.say(Finding(F.BLOCK_OUTSIDE, REPAIRED if fix else ERROR, **about))
        if not fix:
            counters.corruptions += 1
            return
        from cowhand.block.formats.qcow2.check.repair import lengthen

        if lengthen(exam, entry):
            counters.corruptions_fixed += 1
            walk.region(entry, walk.size, f"refcount block {index}")
            return
    counters.corruptions += 1
    exam.rebuild = True
