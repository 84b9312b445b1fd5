"""The dmg format: Apple's Universal Disk Image Format, to read ("Demystifying the DMG File Format", J. Levin 2013; ``libdmg-hfsplus``).

A trailer of 512 bytes says where the tables of chunks lie: in a property list, or, in old images, in a resource fork. A chunk is a stretch of the
disk that is zero, stored as it is, or compressed. All numbers are big-endian.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.mapped import ReadOnlyFormat
from cowhand.block.formats.dmg import codecs
from cowhand.core.errors import UnsupportedFeature
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, NO_HOST, OFFSET, ZERO

if TYPE_CHECKING:
    from cowhand.block.node.node import Child
    from cowhand.block.opening.opening import Opening

SECTOR = 512
TRAILER, TABLE = b"koly", b"mish"
#: data fork, its length, resource fork, its length: after 24 bytes; property list, its length: at 216
_FORKS, _LIST = struct.Struct(">QQQQ"), struct.Struct(">QQ")
_FORKS_AT, _LIST_AT = 24, 216
#: first sector, sectors, offset of data: after 8 bytes; then at 200 the number of chunks
_TABLE_HEAD = struct.Struct(">QQQ")
_TABLE_SIZE = 204
#: kind, comment, first sector, sectors, offset, bytes
_CHUNK = struct.Struct(">IIQQQQ")
_COMMENT, _END = 0x7FFFFFFE, 0xFFFFFFFF
MAX_LIST = 16 << 20  #: bytes of the property list or the resource fork; QEMU
MAX_CHUNK = 64 << 20  #: bytes of a chunk, stored and on the disk; QEMU
MAX_CHUNKS = 1 << 20
MAX_SECTORS = 1 << 54
#: Where the trailer is looked for: some images have something behind it.
_LOOK_BACK = 512
_DATA = re.compile(rb"<data>([^<]*)</data>")


class DmgNode(ReadOnlyFormat):
    """A disk image of Apple (UDIF). What no chunk tells of reads as zeroes."""

    driver: ClassVar[str] = "dmg"

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        trailer, at = self._trailer()
        fork, _, resources, resources_size = _FORKS.unpack_from(trailer, _FORKS_AT)
        plist, plist_size = _LIST.unpack_from(trailer, _LIST_AT)
        self._rows: list[tuple[int, int, int, int, int]] = []
        if resources_size:
            self._read_fork(self._part(resources, resources_size, at), fork)
        elif plist_size:
            self._read_list(self._part(plist, plist_size, at), fork)
        else:
            raise self.wrong("the trailer names no table of chunks", at, "Invalid argument")
        self._rows.sort()
        columns = list(zip(*self._rows, strict=True)) or [()] * 5
        self._starts, self._counts, self._kinds, self._offsets, self._lengths = (
            array("Q", column) for column in columns
        )
        self._size = max((start + count for start, count, *_ in self._rows), default=0) * SECTOR
        del self._rows
        self._last: tuple[int, bytes] = (-1, b"")

    def _trailer(self) -> tuple[bytes, int]:
        size = self.file.node.size
        if size < SECTOR:
            raise self.wrong("dmg file must be at least 512 bytes long")
        begin = max(0, size - SECTOR - _LOOK_BACK)
        tail = bytearray(size - begin)
        self.file.read_into(begin, tail)
        at = tail.rfind(TRAILER, 0, len(tail) - SECTOR + 4)
        if at < 0:
            raise self.wrong("Could not locate UDIF trailer in dmg file", begin)
        return bytes(tail[at : at + SECTOR]), begin + at

    def _part(self, offset: int, size: int, end: int) -> bytes:
        if size > MAX_LIST or offset + size > end:
            raise self.wrong(f"a table of {size} bytes at {offset:#x}", end, "Invalid argument")
        data = bytearray(size)
        self.file.read_into(offset, data)
        return bytes(data)

    def _read_list(self, text: bytes, fork: int) -> None:
        for found in _DATA.finditer(text):
            try:
                self._read_table(base64.b64decode(b"".join(found[1].split())), fork)
            except binascii.Error:
                continue  # not what chunks are listed in

    def _read_fork(self, data: bytes, fork: int) -> None:
        at, size = (int.from_bytes(data[place : place + 4], "big") for place in (0, 8))
        end = min(len(data), at + size)
        while at + 4 <= end:
            count = int.from_bytes(data[at : at + 4], "big")
            if not count or at + 4 + count > end:
                raise self.wrong("the resource fork is damaged", at, "Invalid argument")
            self._read_table(data[at + 4 : at + 4 + count], fork)
            at += 4 + count

    def _read_table(self, data: bytes, fork: int) -> None:
        if data[:4] != TABLE or len(data) < _TABLE_SIZE:
            return
        first, _, base = _TABLE_HEAD.unpack_from(data, 8)
        for kind, _, start, count, offset, length in _CHUNK.iter_unpack(
            data[_TABLE_SIZE : len(data) - (len(data) - _TABLE_SIZE) % 40]
        ):
            if kind in (_COMMENT, _END) or not count:
                continue
            if kind not in (codecs.ZEROES, codecs.RAW, codecs.IGNORED) and kind not in codecs.DECODERS:
                raise UnsupportedFeature(
                    f"dmg: a chunk is compressed by method {kind:#x}, which is not known",
                    path=self.filename,
                    qemu="Invalid argument",
                )
            if first + start + count > MAX_SECTORS:
                raise self.wrong(f"a chunk ends at sector {first + start + count}", qemu="Invalid argument")
            if kind in codecs.DECODERS and count * SECTOR > MAX_CHUNK:
                text = f"sector count {count} for chunk {len(self._rows)} is larger than max ({MAX_CHUNK // SECTOR})"
                raise self.wrong(text, qemu="Invalid argument")
            if kind in codecs.DECODERS and length > MAX_CHUNK:
                text = f"length {length} for chunk {len(self._rows)} is larger than max ({MAX_CHUNK})"
                raise self.wrong(text, qemu="Invalid argument")
            if len(self._rows) >= MAX_CHUNKS:
                raise self.wrong(f"more than {MAX_CHUNKS} chunks", qemu="Invalid argument")
            place = fork + base + offset
            if kind not in (codecs.ZEROES, codecs.IGNORED) and place + length > self.file.node.size:
                raise self.wrong(
                    f"a chunk of {length} bytes at {place:#x} does not end inside the file", place, "Invalid argument"
                )
            if kind == codecs.RAW and length < count * SECTOR:
                raise self.wrong(f"a chunk of {count} sectors is stored in {length} bytes", place, "Invalid argument")
            self._rows.append((first + start, count, kind, place if kind >= codecs.RAW else 0, length))

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        sector = offset // SECTOR
        index = bisect_right(self._starts, sector) - 1
        following = self._starts[index + 1] * SECTOR if index + 1 < len(self._starts) else self._size
        length = min(length, following - offset)
        end = (self._starts[index] + self._counts[index]) * SECTOR if index >= 0 else 0
        if index < 0 or offset >= end:
            return length, ZERO | ALLOCATED, None, NO_HOST
        length = min(length, end - offset)
        kind = self._kinds[index]
        if kind in (codecs.ZEROES, codecs.IGNORED):
            return length, ZERO | ALLOCATED, None, NO_HOST
        if kind == codecs.RAW:
            return (
                length,
                DATA | ALLOCATED | OFFSET,
                self.file,
                self._offsets[index] + offset - self._starts[index] * SECTOR,
            )
        return length, DATA | ALLOCATED | COMPRESSED, self.file, index

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        within = offset - self._starts[run[3]] * SECTOR
        view[:] = self._unpacked(run[3])[within : within + len(view)]

    def _unpacked(self, index: int) -> bytes:
        last = self._last
        if last[0] == index:
            return last[1]
        name, decode = codecs.DECODERS[self._kinds[index]]
        packed, size = bytearray(self._lengths[index]), self._counts[index] * SECTOR
        self.file.read_into(self._offsets[index], packed)
        try:
            data = decode(packed, size)
        except codecs.Damaged as error:
            text = f"chunk {index} cannot be unpacked ({name}): {error}"
            raise self.wrong(text, self._offsets[index], "Input/output error") from None
        if len(data) != size:
            text = f"chunk {index} holds {len(data)} bytes, not {size}"
            raise self.wrong(text, self._offsets[index], "Input/output error")
        self._last = index, data
        return data
