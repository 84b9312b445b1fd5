"""The growing images of the Bochs emulator, to read (Bochs user manual, "Growing hard disk images"; ``hdimage.h``: redolog).

A header of 512 bytes, a catalog with a 32-bit word for each extent of the disk, then the extents that exist, in the order in which they were first
written: a bitmap of its sectors, then the sectors. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.mapped import ReadOnlyFormat
from cowhand.core.extents import ALLOCATED, DATA, NO_HOST, OFFSET, ZERO

if TYPE_CHECKING:
    from cowhand.block.node.node import Child
    from cowhand.block.opening.opening import Opening

SECTOR = HEADER_SIZE = 512
MAGIC, TYPE, SUBTYPE = b"Bochs Virtual HD Image", b"Redolog", b"Growing"
#: magic, type, subtype, version, header bytes, catalog words, bitmap bytes, extent bytes
_COMMON = struct.Struct("<32s16s16s5I")
#: Where the disk's bytes are counted: version 2 has a reserved word before them.
_DISK_AT = {0x10000: 84, 0x20000: 88}
_NO_EXTENT = b"\xff\xff\xff\xff"
MAX_CATALOG = 0x100000  #: words; QEMU
MAX_EXTENT = 0x800000  #: bytes; QEMU
#: Bitmaps of extents in memory; each has at most MAX_EXTENT / SECTOR bits.
_KEPT_BITMAPS = 256
#: Extents that one run looks at for whether they were ever written.
_LOOK_AHEAD = 4096


class BochsNode(ReadOnlyFormat):
    """A growing image of Bochs. What it does not store reads as zeroes: the format has no backing files."""

    driver: ClassVar[str] = "bochs"

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        header = bytearray(HEADER_SIZE)
        self.file.read_into(0, header)
        magic, kind, subtype, version, size, words, bitmap, extent = _COMMON.unpack_from(header)
        known = [(magic, MAGIC), (kind, TYPE), (subtype, SUBTYPE)]
        if any(found.rstrip(b"\0") != expected for found, expected in known) or version not in _DISK_AT:
            raise self.wrong("no growing image of version 0x10000 or 0x20000", qemu="Image not in Bochs format")
        if words > MAX_CATALOG:
            raise self.wrong(f"a catalog of {words} words", 72, "Catalog size is too large")
        if extent < SECTOR:
            raise self.wrong(f"extents of {extent} bytes", 80, "Extent size must be at least 512")
        if extent & (extent - 1):
            raise self.wrong(f"extents of {extent} bytes", 80, f"Extent size {extent} is not a power of two")
        if extent > MAX_EXTENT:
            raise self.wrong(f"extents of {extent} bytes", 80, f"Extent size {extent} is too large")
        self._size: int = struct.unpack_from("<Q", header, _DISK_AT[version])[0] // SECTOR * SECTOR
        if words < -(-self._size // extent):
            text = f"a catalog of {words} words for {self._size} bytes in extents of {extent}"
            raise self.wrong(text, 72, "Catalog size is too small for this disk size")
        self._extent, self._sectors = extent, extent // SECTOR
        if bitmap * 8 < self._sectors:
            raise self.wrong(f"bitmaps of {bitmap} bytes for {self._sectors} sectors", 76)
        #: Bytes from an extent's bitmap to its first sector.
        self._bitmap_bytes = -(-bitmap // SECTOR) * SECTOR
        self._stored_from = size + words * 4
        if self._stored_from > self.file.node.size:
            raise self.wrong(f"the catalog ends at {self._stored_from:#x}, behind the end of the file", size)
        catalog = bytearray(words * 4)
        self.file.read_into(size, catalog)
        self._catalog = bytes(catalog)
        self._bitmaps: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        index, inside = divmod(offset, self._extent)
        ahead = self._catalog[index * 4 : (index + _LOOK_AHEAD) * 4]
        unwritten = (len(ahead) - len(ahead.lstrip(b"\xff"))) // 4
        if unwritten:
            return min(length, unwritten * self._extent - inside), ZERO | ALLOCATED, None, NO_HOST
        place = self._stored_from + int.from_bytes(ahead[:4], "little") * (self._bitmap_bytes + self._extent)
        end = self.file.node.size
        if place + self._bitmap_bytes > end:
            raise self.wrong(f"extent {index} of the disk lies at {place:#x}, behind the end of the file", place)
        sector = inside // SECTOR
        until, stored = self._alike(index, place, sector)
        count = min(length, (until - sector) * SECTOR - inside % SECTOR)
        if not stored:
            return count, ZERO | ALLOCATED, None, NO_HOST
        host = place + self._bitmap_bytes + inside
        if host + count > end:
            raise self.wrong(f"the sectors at {host:#x} lie behind the end of the file", host)
        return count, DATA | ALLOCATED | OFFSET, self.file, host

    def _alike(self, index: int, place: int, sector: int) -> tuple[int, bool]:
        """Return up to where the sectors of extent *index* from *sector* on are all stored, or all not, and which of both."""
        bits = self._bitmaps.get(index)
        if bits is None:
            data = bytearray(-(-self._sectors // 8))
            self.file.read_into(place, data)
            if len(self._bitmaps) >= _KEPT_BITMAPS:
                self._bitmaps.clear()
            bits = self._bitmaps[index] = bytes(data)
        stored = bits[sector >> 3] >> (sector & 7) & 1
        sector += 1
        while sector < self._sectors and bits[sector >> 3] >> (sector & 7) & 1 == stored:
            if sector & 7 == 0:  # bytes of one kind at once: few bytes of a file can make a disk of terabytes
                rest = bits[sector >> 3 : self._sectors >> 3]
                sector += 8 * (len(rest) - len(rest.lstrip(b"\xff" if stored else b"\0"))) or 1
            else:
                sector += 1
        return sector, bool(stored)
