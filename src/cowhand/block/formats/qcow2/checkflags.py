"""Checking qcow2, last part: the COPIED bits of the active tables (QEMU ``docs/interop/qcow2``, "L1 table entry", "Standard Cluster Descriptor")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2 import layout as L
from cowhand.block.formats.qcow2.checkwalk import words_of

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check import Examination


def check_flags(exam: Examination) -> None:
    """Check that COPIED is set in the active tables where the count on disk is 1, and only there; mend that when it is asked for and safe."""
    node, walk, counters = exam.node, exam.walk, exam.counters
    mend = exam.fix_errors or (
        exam.fix_leaks and not counters.check_errors and not counters.corruptions and not counters.leaks
    )
    if exam.wrote_counts:
        node.flush_file()  # a bit may say "alone" only when the count does
    judged: dict[int, list[str]] = {}
    for index, entry in enumerate(words_of(bytes(node.mapping.l1.data[: node.header.l1_size * 8]))):
        host = entry & L.L1_OFFSET_MASK
        if not host:
            continue
        count = exam.disk_count(host >> walk.bits)
        if count is None:
            continue
        if (count == 1) != bool(entry & L.COPIED):
            exam.say(
                f"{'Repairing' if mend else 'ERROR'} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
            )
            if mend:
                from cowhand.block.formats.qcow2.repair import flag_l1

                flag_l1(exam, index, entry ^ L.COPIED)
                counters.corruptions_fixed += 1
            else:
                counters.corruptions += 1
        lines = judged.get(host)
        if lines is None:
            lines = judged[host] = _judge_flags(exam, host, mend)
        elif mend:
            continue  # mended when it was met first
        counters.corruptions += 0 if mend else len(lines)
        if not mend:
            for line in lines:
                exam.say(line)


def _judge_flags(exam: Examination, host: int, mend: bool) -> list[str]:
    """Return a line for each wrong COPIED bit in the table at *host*; with *mend* they are told, counted and put right."""
    walk = exam.walk
    seen = walk.seen.get(host)
    if seen is not None and seen.scan.runs is not None and not exam.unreadable:
        if all(walk.tally.is_all(first, count, 1) for first, count in seen.scan.runs):
            return []
    data = walk.read(host, walk.size, "ERROR: Could not read L2 table: Input/output error")
    if not exam.unreadable and walk.scanner.flags_sound(data):
        return []
    stride = 2 if walk.extended else 1
    words = words_of(data)
    lines = []
    changed = []
    for index in range(0, len(words), stride):
        entry = words[index]
        if (
            not entry
            or entry & L.ENTRY_COMPRESSED
            or not (entry & L.L2_OFFSET_MASK or (walk.external and entry & L.COPIED))
        ):
            continue
        count = 1 if walk.external else exam.disk_count((entry & L.L2_OFFSET_MASK) >> walk.bits)
        if count is None or (count == 1) == bool(entry & L.COPIED):
            continue
        lines.append(
            f"{'Repairing' if mend else 'ERROR'} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
        )
        changed.append((index * 8, entry ^ L.COPIED))
    if mend and changed:
        from cowhand.block.formats.qcow2.repair import flag_l2

        for line in lines:
            exam.say(line)
        exam.counters.corruptions += len(lines)
        flag_l2(exam, host, data, changed)
        exam.counters.corruptions -= len(lines)
        exam.counters.corruptions_fixed += len(lines)
    return lines
