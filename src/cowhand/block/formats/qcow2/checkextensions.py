"""Checking qcow2: the clusters that header extensions name (QEMU ``docs/interop/qcow2``, "Bitmaps extension", "Full disk encryption header").

A check that did not know them would call them leaked, and a repair would free them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cowhand.block.formats.qcow2 import layout as L
from cowhand.core.errors import InvalidFormat

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.checkwalk import Walk

_CRYPTO_LENGTH = 16
_MAX_DIRECTORY_BYTES = L.MAX_BITMAPS * (L.BITMAP_DIRECTORY_ENTRY.size + 1023)
_MAX_NAME = 1023
_MAX_TABLE_ENTRIES = 0x8000000
_MAX_BITMAP_BYTES = 0x20000000
_RESERVED_FLAGS = 0xFFFFFFFC
_IN_USE = 1
_TABLE_RESERVED = 0xFF000000000001FE
_ALL_ONES = 1


class _Bitmap(NamedTuple):
    """Where a bitmap's table is."""

    offset: int
    entries: int


def count_extensions(walk: Walk) -> None:
    """Count what the encryption header and the persistent bitmaps of *walk*'s image occupy."""
    header = walk.node.header
    crypto = header.find(L.EXT_CRYPTO)
    if crypto is not None and header.crypt_method == L.CRYPT_LUKS and len(crypto) >= _CRYPTO_LENGTH:
        walk.region(L.U64.unpack_from(crypto)[0], L.U64.unpack_from(crypto, 8)[0])
    bitmaps = header.find(L.EXT_BITMAPS)
    # Without the autoclear bit somebody wrote who does not know bitmaps: they count for nothing.
    if bitmaps is not None and header.autoclear & L.AUTOCLEAR_BITMAPS and len(bitmaps) == L.BITMAP_EXTENSION.size:
        _count_bitmaps(walk, *L.BITMAP_EXTENSION.unpack(bitmaps))


def _count_bitmaps(walk: Walk, count: int, _reserved: int, size: int, offset: int) -> None:
    walk.region(offset, size)
    # A hostile directory can name one table over and over: it is read once, and counts for all.
    times: dict[_Bitmap, int] = {}
    for bitmap in _directory(walk, count, size, offset):
        times[bitmap] = times.get(bitmap, 0) + 1
    for bitmap, named in times.items():
        walk.region(bitmap.offset, bitmap.entries * 8, named)
        _count_table(walk, bitmap, named)


def _stop(walk: Walk, message: str, offset: int) -> Exception:
    from cowhand.block.formats.qcow2.checkwalk import Stopped

    walk.counters.corruptions += 1
    return Stopped(InvalidFormat(message, qemu="Invalid argument", path=walk.node.filename, offset=offset))


def _directory(walk: Walk, count: int, size: int, offset: int) -> list[_Bitmap]:
    """Return the bitmaps that the directory lists; one that is wrong ends the check, since nothing behind it can be found."""
    if not 0 < size <= _MAX_DIRECTORY_BYTES:
        raise _stop(walk, f"a bitmap directory of {size} bytes is not possible", offset)
    data = walk.read(offset, size, "ERROR: I/O error in the bitmap directory")
    found: list[_Bitmap] = []
    at = 0
    while at < size:
        if at + L.BITMAP_DIRECTORY_ENTRY.size > size or len(found) == count:
            raise _stop(walk, "the bitmap directory is broken", offset + at)
        table, entries, flags, kind, granularity, name, extra = L.BITMAP_DIRECTORY_ENTRY.unpack_from(data, at)
        length = L.BITMAP_DIRECTORY_ENTRY.size + name + extra
        length += -length % 8
        stored = entries * walk.size
        bad = (
            at + length > size or extra or not entries or not table or table % walk.size or entries > _MAX_TABLE_ENTRIES
            or not 9 <= granularity <= 31 or flags & _RESERVED_FLAGS or name > _MAX_NAME or kind != 1 or stored > _MAX_BITMAP_BYTES
            or (not flags & _IN_USE and walk.node.header.size > stored * 8 << granularity)
        )  # fmt: skip
        if bad:
            raise _stop(walk, f"entry {len(found)} of the bitmap directory is not possible", offset + at)
        found.append(_Bitmap(table, entries))
        at += length
    if len(found) != count:
        raise _stop(walk, f"the bitmap directory lists {len(found)} bitmaps, and the header says {count}", offset)
    return found


def _count_table(walk: Walk, bitmap: _Bitmap, times: int) -> None:
    from cowhand.block.formats.qcow2.checkwalk import words_of

    words = words_of(walk.read(bitmap.offset, bitmap.entries * 8, "ERROR: I/O error in a bitmap table"))
    for entry in words:
        offset = entry & L.BITMAP_TABLE_OFFSET_MASK
        if entry & _TABLE_RESERVED or (offset and (entry & _ALL_ONES or offset % walk.size)):
            raise _stop(walk, f"entry {entry:#x} of a bitmap table is not possible", bitmap.offset)
    for entry in words:
        offset = entry & L.BITMAP_TABLE_OFFSET_MASK
        if offset:
            walk.region(offset, walk.size, times)
