"""The growing images of the Bochs emulator, to read (Bochs user manual, "Growing hard disk images"; ``hdimage.h``: redolog).

A header of 512 bytes, a catalog with a 32-bit word for each extent of the disk, then the extents that exist, in the order in which they were first
written: a bitmap of its sectors, then the sectors. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, ClassVar

from cowhand.block.format_io.readonly import ReadOnlyFormat
from cowhand.block.node.node import Child
from cowhand.core.buffers import Buffer, fill_zero
from cowhand.core.errors import InvalidFormat
from cowhand.core.extents import ALLOCATED, DATA, MAX_ROWS, OFFSET, ZERO, ExtentBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR = 512
HEADER_SIZE = 512
MAGIC, TYPE, SUBTYPE = b"Bochs Virtual HD Image", b"Redolog", b"Growing"
#: magic, type, subtype, version, header bytes, catalog words, bitmap bytes, extent bytes
_COMMON = struct.Struct("<32s16s16s5I")
_VERSION_1, _VERSION_2 = 0x10000, 0x20000
#: Where the disk's bytes are counted: version 2 has a reserved word before them.
_DISK_AT = {_VERSION_1: 84, _VERSION_2: 88}
_NO_EXTENT = 0xFFFFFFFF
MAX_CATALOG = 0x100000  #: words; QEMU
MAX_EXTENT = 0x800000  #: bytes; QEMU
#: Bitmaps of extents in memory; each has at most MAX_EXTENT / SECTOR bits.
_KEPT_BITMAPS = 256


class BochsNode(ReadOnlyFormat):
    """A growing image of Bochs. What it does not store reads as zeroes: the format has no backing files."""

    driver: ClassVar[str] = "bochs"
    file: Child

    def start(self) -> None:
        lower = self.file.node
        header = bytearray(HEADER_SIZE)
        self.file.read_into(0, header)
        magic, kind, subtype, version, size, words, bitmap, extent = _COMMON.unpack_from(header)
        known = [(magic, MAGIC), (kind, TYPE), (subtype, SUBTYPE)]
        if any(found.rstrip(b"\0") != expected for found, expected in known) or version not in _DISK_AT:
            raise self.wrong(
                f"this is no growing image of Bochs of version {_VERSION_1:#x} or {_VERSION_2:#x}: {version:#x}",
                qemu="Image not in Bochs format",
            )
        if words > MAX_CATALOG:
            raise self.wrong(
                f"a catalog of {words} words, more than {MAX_CATALOG}", 72, f"Catalog size {words} is too large"
            )
        if extent < SECTOR:
            raise self.wrong(f"extents of {extent} bytes", 80, "Extent size must be at least 512")
        if extent & (extent - 1):
            raise self.wrong(f"extents of {extent} bytes", 80, f"Extent size {extent} is not a power of two")
        if extent > MAX_EXTENT:
            raise self.wrong(f"extents of {extent} bytes", 80, f"Extent size {extent} is too large")
        disk: int = struct.unpack_from("<Q", header, _DISK_AT[version])[0] // SECTOR * SECTOR
        if words < -(-disk // extent):
            text = f"a catalog of {words} words for {disk} bytes in extents of {extent}"
            raise self.wrong(text, 72, "Catalog size is too small for this disk size")
        self._extent, self._sectors = extent, extent // SECTOR
        if bitmap * 8 < self._sectors:
            raise self.wrong(f"bitmaps of {bitmap} bytes for {self._sectors} sectors", 76)
        self._disk = disk
        #: Bytes from an extent's bitmap to its first sector.
        self._bitmap_bytes = -(-bitmap // SECTOR) * SECTOR
        self._stored_from = size + words * 4
        if self._stored_from > lower.size:
            raise self.wrong(f"the catalog ends at {self._stored_from:#x}, behind the end of the file", size)
        self._catalog = array("I", [0]) * words
        self.file.read_into(size, memoryview(self._catalog).cast("B"))
        if memoryview(b"\1\0").cast("H")[0] != 1:
            self._catalog.byteswap()
        self._bitmaps: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        return self._disk

    def _place(self, index: int) -> int | None:
        """Return where in the file extent *index*, its bitmap first, begins; None where it was never written."""
        number = self._catalog[index]
        if number == _NO_EXTENT:
            return None
        at: int = self._stored_from + number * (self._bitmap_bytes + self._extent)
        if at + self._bitmap_bytes > self.file.node.size:
            raise self.wrong(f"extent {index} of the disk lies at {at:#x}, behind the end of the file", at)
        return at

    def _bitmap(self, index: int, at: int) -> bytes:
        known = self._bitmaps.get(index)
        if known is None:
            data = bytearray(-(-self._sectors // 8))
            self.file.read_into(at, data)
            known = bytes(data)
            if len(self._bitmaps) >= _KEPT_BITMAPS:
                self._bitmaps.clear()
            self._bitmaps[index] = known
        return known

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield (offset, length, place in the file or None) of what is stored and what is not, in order, down to sectors."""
        end = offset + length
        while offset < end:
            index, inside = divmod(offset, self._extent)
            stop = min(end, (index + 1) * self._extent)
            at = self._place(index)
            if at is None:
                yield offset, stop - offset, None
                offset = stop
                continue
            bits = self._bitmap(index, at)
            first, last = inside // SECTOR, -(-(stop - index * self._extent) // SECTOR)
            here = bits[first >> 3] >> (first & 7) & 1
            sector = first + 1
            while sector < last and bits[sector >> 3] >> (sector & 7) & 1 == here:
                if sector & 7 == 0:  # bytes of one kind at once: few bytes of a file can make a disk of terabytes
                    rest = bits[sector >> 3 : last >> 3]
                    sector += 8 * (len(rest) - len(rest.lstrip(b"\xff" if here else b"\0"))) or 1
                else:
                    sector += 1
            until = min(stop, index * self._extent + sector * SECTOR)
            yield offset, until - offset, at + self._bitmap_bytes + inside if here else None
            offset = until

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        for begin, length, place in self._runs(offset, len(view)):
            part = view[begin - offset : begin - offset + length]
            if place is None:
                fill_zero(part)
            elif place + length > self.file.node.size:
                raise self.wrong(f"the sectors at {place:#x} lie behind the end of the file", place)
            else:
                self.file.read_into(place, part)

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        for begin, count, place in self._runs(offset, length):
            if place is None:
                batch.add(begin, count, ZERO | ALLOCATED)
            else:
                batch.add(begin, count, DATA | ALLOCATED | OFFSET, place, self.file.node)
            if len(batch) >= MAX_ROWS:
                break
        return batch

    def wrong(self, text: str, offset: int = 0, qemu: str | None = None) -> InvalidFormat:
        """Return the error for a header or catalog that cannot be."""
        return InvalidFormat(f"bochs: {text}", qemu=qemu or text, path=self.file.node.filename, offset=offset)
