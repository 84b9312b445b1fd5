"""Where the metadata of a qcow2 image lies, by its own tables as they are on the medium: for any bytes at all, in bounded time.

Source: QEMU ``docs/interop/qcow2``. Shares no code with the driver. What cannot be (unaligned tables, sizes past the limits) is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

_HOST = 0x00FFFFFFFFFFFE00
#: Entries looked at in one table; tests that need more do not ask this walker.
_MAX_ENTRIES = 1 << 14
_MAX_SNAPSHOTS = 64

#: reads (offset, length), zeroes beyond the end
Reader = Callable[[int, int], bytes]


class Region(NamedTuple):
    """Bytes ``[begin, end)`` of the file that a table of kind *name* occupies."""

    name: str
    begin: int
    end: int


def _words(read: Reader, offset: int, count: int) -> tuple[int, ...]:
    count = min(count, _MAX_ENTRIES)
    return struct.unpack(f">{count}Q", read(offset, count * 8))


def _second_level(read: Reader, l1_offset: int, l1_size: int, cluster: int, name: str) -> Iterator[Region]:
    for entry in set(_words(read, l1_offset, l1_size)):
        offset = entry & _HOST
        if offset and offset % cluster == 0:
            yield Region(name, offset, offset + cluster)


def _snapshots(read: Reader, count: int, begin: int, cluster: int) -> Iterator[Region]:
    at = begin
    for _ in range(min(count, _MAX_SNAPSHOTS)):
        l1_offset, l1_size, ident, name, _, _, _, _, extra = struct.unpack(">QIHHIIQII", read(at, 40))
        if extra > 1024:
            break
        if l1_offset % cluster == 0 and l1_offset < 1 << 56 and l1_size <= 1 << 22:
            yield Region("inactive L1 table", l1_offset, l1_offset + l1_size * 8)
            yield from _second_level(read, l1_offset, l1_size, cluster, "inactive L2 table")
        at = -(-(at + 40 + extra + ident + name) // 8) * 8
    if count:
        yield Region("snapshot table", begin, at)


def metadata(read: Reader) -> list[Region]:
    """Return the regions of everything that the image's header, tables and snapshots name as metadata."""
    fields = struct.unpack(">IIQIIQIIQQIIQ", read(0, 72))
    bits, l1_size, l1_offset, table_offset, table_clusters, count, snapshots = fields[4], *fields[7:13]
    if fields[0] != 0x514649FB or not 9 <= bits <= 21:
        return []
    cluster = 1 << bits
    found = [Region("header", 0, cluster), Region("L1 table", l1_offset, l1_offset + l1_size * 8)]
    found.extend(_second_level(read, l1_offset, l1_size, cluster, "L2 table"))
    table_bytes = table_clusters * cluster
    found.append(Region("refcount table", table_offset, table_offset + table_bytes))
    for entry in set(_words(read, table_offset, table_bytes // 8)):
        offset = entry & ~0x1FF
        if offset and offset % cluster == 0:
            found.append(Region("refcount block", offset, offset + cluster))
    found.extend(_snapshots(read, count, snapshots, cluster))
    return [region for region in found if region.begin < region.end]


def touched(regions: list[Region], offset: int, length: int) -> Region | None:
    """Return a region that ``[offset, offset + length)`` overlaps, or None."""
    for region in regions:
        if region.begin < offset + length and offset < region.end:
            return region
    return None
