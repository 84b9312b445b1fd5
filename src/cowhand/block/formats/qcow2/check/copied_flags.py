"""Checking qcow2, last part: the COPIED bits of the active tables (QEMU ``docs/interop/qcow2``, "L1 table entry", "Standard Cluster Descriptor")."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.check.references import LARGE_L1
from cowhand.block.formats.qcow2.ondisk import findings as F, layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import runs_of, words_of
from cowhand.block.node.records import ERROR, REPAIRED, Finding

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check.check import Examination

#: Bytes of the L1 table that are written at once.
_PIECE = 1 << 20
#: What may lie between two entries that are written together.
_GAP = 4096


def check_flags(exam: Examination) -> None:
    """Check that COPIED is set in the active tables where the count on disk is 1, and only there; mend that when it is asked for and safe."""
    node, walk, counters = exam.node, exam.walk, exam.counters
    mend = exam.fix_errors or (
        exam.fix_leaks and not counters.check_errors and not counters.corruptions and not counters.leaks
    )
    if exam.wrote_counts:
        node.flush_file()  # a bit may say "alone" only when the count does
    judged: dict[int, tuple[list[Finding], int]] = {}
    status = REPAIRED if mend else ERROR
    mending = _L1Mending(exam)
    words = words_of(memoryview(node.mapping.l1.data)[: node.header.l1_size * L.ENTRY_SIZE])
    if len(words) >= LARGE_L1:
        _judge_lost(exam, words, mend)
    for first, entry, times in runs_of(words):
        host = entry & L.L1_OFFSET_MASK
        count = exam.disk_count(host >> walk.bits) if host else None
        if count is None:
            continue
        wrong = (count == 1) != bool(entry & L.COPIED)
        known = judged.get(host)
        found, untold = known if known is not None else (None, 0)
        for index in range(first, first + times):
            told = exam.room >= 0
            # Those of which there is nothing to tell, or nobody to hear it, are all alike.
            alike = 1 if found is None or (told and (wrong or found)) else first + times - index
            if wrong:
                if told:
                    at = node.header.l1_offset + index * L.ENTRY_SIZE
                    about: dict[str, Any] = {"cluster": host >> walk.bits, "offset": at, "owner": "the active L1 table"}
                    exam.say(Finding(F.COPIED_L2, status, **about, index=index, entry=entry, refcount=count))
                if mend:
                    mending.put(index, alike, entry ^ L.COPIED)
                else:
                    counters.corruptions += alike
            if found is None:
                mending.write()  # in the order in which they were found
                found, untold = judged[host] = _judge_flags(exam, host, mend)
            if not mend:  # else it was mended when it was met first
                counters.corruptions += (len(found) + untold) * alike
                for finding in found if told else ():
                    exam.say(finding)
            if alike > 1:
                break
    mending.write()


def _judge_lost(exam: Examination, words: array[int], mend: bool) -> None:
    """Judge those entries of a large L1 table that name what lies behind the end, uncounted, but for so many as somebody hears of; zero them.

    There can be four million, each of another place. No table lies there, and nothing says that it has a count of 1.
    """
    import numpy

    from cowhand.block.formats.qcow2.check.repair import flag_l1

    walk, room = exam.walk, max(0, exam.room)
    blocks = numpy.frombuffer(bytes(exam.node.refcounts.table), ">u8") & numpy.uint64(L.REFCOUNT_TABLE_OFFSET_MASK) != 0
    column = numpy.frombuffer(words, "u8")
    for first in range(0, len(column), _PIECE // L.ENTRY_SIZE):
        piece = column[first : first + _PIECE // L.ENTRY_SIZE]
        host = piece & numpy.uint64(L.L1_OFFSET_MASK)
        index = (host >> numpy.uint64(walk.bits)) // numpy.uint64(exam.per_block)
        counted = numpy.zeros(len(piece), bool)
        known = index < len(blocks)
        counted[known] = blocks[index[known]]
        lost = numpy.flatnonzero((host >= exam.compared_bytes) & ~counted)
        room, lost = max(0, room - len(lost)), lost[room:]
        wrong = lost[piece[lost] & numpy.uint64(L.COPIED) != 0]
        if mend and len(wrong):
            piece[wrong] ^= numpy.uint64(L.COPIED)
            flag_l1(exam, first * L.ENTRY_SIZE, piece.astype(">u8").tobytes())
            exam.counters.corruptions_fixed += len(wrong)
        else:
            exam.counters.corruptions += len(wrong)
        piece[lost] = 0


class _L1Mending:
    """Entries of the active L1 table that get another COPIED bit, written together where they lie together: there can be millions."""

    def __init__(self, exam: Examination) -> None:
        self._exam = exam
        self._begin = 0  #: in the table, in bytes
        self._new = bytearray()
        self._count = 0

    def put(self, index: int, count: int, entry: int) -> None:
        """Make *entry* that of *count* indices from *index* on, at once or soon; indices rise."""
        at, end = index * L.ENTRY_SIZE, self._begin + len(self._new)
        if at - end > _GAP or len(self._new) >= _PIECE:
            self.write()
            self._begin = at
        else:
            self._new += self._exam.node.mapping.l1.data[end:at]
        self._new += L.U64.pack(entry) * count
        self._count += count

    def write(self) -> None:
        """Write what was not written yet."""
        from cowhand.block.formats.qcow2.check.repair import flag_l1

        new, count = self._new, self._count
        self._new, self._count = bytearray(), 0
        for at in range(0, len(new), _PIECE):
            flag_l1(self._exam, self._begin + at, new[at : at + _PIECE])
        self._begin += len(new)
        self._exam.counters.corruptions_fixed += count


def _judge_flags(exam: Examination, host: int, mend: bool) -> tuple[list[Finding], int]:
    """Return a finding for each wrong COPIED bit in the table at *host*, and how many more there are when nobody is told of them.

    With *mend* they are told, counted and put right.
    """
    walk = exam.walk
    if host >= walk.length:
        return [], 0
    seen = walk.seen.get(host)
    if seen is not None and seen.scan.runs is not None and not exam.unreadable:
        if all(walk.tally.is_all(first, count, 1) for first, count in seen.scan.runs):
            return [], 0
    if seen is not None and seen.scan.scattered is not None and not exam.unreadable:
        if set(walk.tally.each(seen.scan.scattered)) == {1}:
            return [], 0
    data = walk.read(host, walk.size, F.L2_UNREADABLE_AGAIN)
    if not exam.unreadable and walk.scanner.flags_sound(data):
        return [], 0
    if exam.room < 0:
        from cowhand.block.formats.qcow2.check import odd_tables

        wrong = odd_tables.wrong_flags(exam, data)
        if mend and wrong:
            _put_right(exam, host, data, [(at, entry ^ L.COPIED) for at, entry in wrong])
        return [], len(wrong)
    stride = 2 if walk.extended else 1
    words = words_of(data)
    found = []
    owner = f"L2 table at {host:#x}"
    changed = []
    for index in range(0, len(words), stride):
        entry = words[index]
        if (
            not entry
            or entry & L.ENTRY_COMPRESSED
            or not (entry & L.L2_OFFSET_MASK or (walk.external and entry & L.COPIED))
        ):
            continue
        cluster = (entry & L.L2_OFFSET_MASK) >> walk.bits
        count = 1 if walk.external else exam.disk_count(cluster)
        if count is None or (count == 1) == bool(entry & L.COPIED):
            continue
        at = host + index * L.ENTRY_SIZE
        status = REPAIRED if mend else ERROR
        found.append(
            Finding(F.COPIED_DATA, status, cluster=cluster, offset=at, owner=owner, entry=entry, refcount=count)
        )
        changed.append((index * 8, entry ^ L.COPIED))
    if mend and changed:
        for finding in found:
            exam.say(finding)
        _put_right(exam, host, data, changed)
    return found, 0


def _put_right(exam: Examination, host: int, data: bytes, changed: list[tuple[int, int]]) -> None:
    """Write the entries *changed* of the table *data* at *host*, (byte in the table, entry) each, and count them."""
    from cowhand.block.formats.qcow2.check.repair import flag_l2

    exam.counters.corruptions += len(changed)
    flag_l2(exam, host, data, changed)
    exam.counters.corruptions -= len(changed)
    exam.counters.corruptions_fixed += len(changed)
