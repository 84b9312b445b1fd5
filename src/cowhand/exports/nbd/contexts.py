"""Metadata contexts of an export: what block status says of a range.

Sources: NetworkBlockDevice ``doc/proto.md``, "Metadata querying" (base:allocation); QEMU ``docs/interop/nbd.txt`` (qemu:allocation-depth,
qemu:dirty-bitmap:NAME).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from cowhand.core.extents import ALLOCATED, DATA, ZERO
from cowhand.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_QEMU_BITMAP, CONTEXT_QEMU_DEPTH, STATE_HOLE, STATE_ZERO

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

#: (length, state) of a stretch.
Status: TypeAlias = tuple[int, int]
#: Tells (offset, length) of a disk as stretches that begin at offset and go on without gaps.
Context: TypeAlias = Callable[[int, int], Iterator[Status]]
STATE_DIRTY = 1


def first(context: Context, offset: int, length: int, limit: int) -> list[Status]:
    """Return what *context* says of *length* bytes from *offset*: merged, *limit* stretches at most, perhaps of less than was asked."""
    out: list[Status] = []
    current, total = -1, 0
    for count, state in context(offset, length):
        if state == current:
            total += count
            continue
        if current >= 0:
            out.append((total, current))
            if len(out) == limit:
                return out
        current, total = state, count
    out.append((total, current))
    return out


def allocation(disk: Disk) -> Context:
    """Return "base:allocation" of *disk*: holes, and what reads as zeroes."""

    def status(offset: int, length: int) -> Iterator[Status]:
        for batch in disk.extents(offset, length):
            for count, flags in zip(batch.length, batch.flags, strict=True):
                yield count, (0 if flags & DATA else STATE_HOLE) | (STATE_ZERO if flags & ZERO else 0)

    return status


def depth(disk: Disk) -> Context:
    """Return "qemu:allocation-depth" of *disk*: 0 where no layer allocates, 1 for the active one, and so on."""

    def status(offset: int, length: int) -> Iterator[Status]:
        for batch in disk.extents(offset, length):
            for count, flags, level in zip(batch.length, batch.flags, batch.depth, strict=True):
                yield count, level + 1 if flags & ALLOCATED else 0

    return status


def dirty(disk: Disk, name: str) -> Context:
    """Return "qemu:dirty-bitmap:*name*" of *disk*. Raises BitmapNotFound, BitmapUnusable."""
    from cowhand.image.bitmaps import find_bitmap

    find_bitmap(disk, name).check(busy=True, read_only=True)

    def status(offset: int, length: int) -> Iterator[Status]:
        position, end = offset, offset + length
        for begin, count in find_bitmap(disk, name).bits.extents(offset, length):
            if begin > position:
                yield begin - position, 0
            yield count, STATE_DIRTY
            position = begin + count
        if position < end:
            yield end - position, 0

    return status


def contexts_of(disk: Disk, *, allocation_depth: bool, bitmaps: tuple[str, ...]) -> dict[str, Context]:
    """Return {name: context} of an export of *disk*."""
    found = {CONTEXT_ALLOCATION: allocation(disk)}
    if allocation_depth:
        found[CONTEXT_QEMU_DEPTH] = depth(disk)
    for name in bitmaps:
        found[CONTEXT_QEMU_BITMAP + name] = dirty(disk, name)
    return found
