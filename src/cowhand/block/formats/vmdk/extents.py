"""Extents of a VMware disk: flat ones, and tables of grains with a directory above ("Virtual Disk Format 5.0", Hosted Sparse Extents)."""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.block_table import PACKED, UNALLOCATED, ZEROED, BlockTableFormat, Piece
from cowhand.block.formats.vmdk.layout import (
    COWD,
    DIRECTORY_AT_END,
    FLAG_COMPRESSED,
    FLAG_LINE_CHECK,
    FLAG_MARKERS,
    FLAG_REDUNDANT,
    FLAG_ZERO_GRAIN,
    MAX_DIRECTORY,
    MAX_EXTENT_SECTORS,
    MAX_GRAIN,
    MAX_TABLE,
    SE_CONST,
    SE_GRAIN,
    SE_MAGIC,
    SE_TABLE,
    SE_VERSION,
    SE_VOLATILE,
    SECTOR,
    SPARSE,
    SPARSE_MAGIC,
    TRANSFER_CHECK,
    se_place,
)
from cowhand.core.extents import ALLOCATED, DATA, IN_PLACE, NO_HOST, OFFSET, RECURSE, ZERO, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.formats.vmdk.driver import VmdkNode
    from cowhand.block.node.node import Child

_NATIVE = sys.byteorder == "little"
#: lba, bytes of the compressed grain
_GRAIN_MARKER = struct.Struct("<QI")


class FlatExtent:
    """An extent whose bytes lie in their places in *child* from *offset* on; without a child all are zeroes."""

    def __init__(self, child: Child | None, size: int, offset: int, writable: bool) -> None:
        self.child, self.size, self.offset = child, size, offset
        self.allocation_unit = 0
        self._flags = DATA | ALLOCATED | OFFSET | RECURSE | (IN_PLACE if writable else 0)

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        """See :meth:`MappedFormat.map`."""
        if self.child is None:
            return length, ZERO | ALLOCATED, None, NO_HOST
        return length, self._flags, self.child, self.offset + offset

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        """See :meth:`MappedFormat.map_batch`."""
        batch = ExtentBatch()
        _, flags, child, host = self.map(offset, length)
        batch.add(offset, length, flags, host, child.node if child is not None else None)
        return batch

    def flush(self) -> None:
        """Make what was written stable."""
        if self.child is not None:
            self.child.flush()


class SparseExtent(BlockTableFormat):
    """A table of grains in one file. It is no node of the graph: its disk owns the file, the lock, and what shows through."""

    driver: ClassVar[str] = "vmdk"
    supports_backing: ClassVar[bool] = True

    def __init__(self, disk: VmdkNode, file: Child) -> None:
        super().__init__(disk.options)
        self.disk, self.file, self.lock = disk, file, disk.lock
        self.writable = disk.writable
        self.directory: array[int] = array("I")
        self.second: array[int] = array("I")  #: the redundant directory
        self.compressed = False
        self.descriptor = (0, 0)  #: where the text that stands inside lies, in bytes, and its size

    @property
    def size(self) -> int:
        return self._size

    @property
    def filename(self) -> str:
        return self.file.node.filename

    @property
    def backing(self) -> Child | None:
        return self.disk.backing

    def wrong(self, text: str, offset: int = 0, qemu: str | None = None) -> Any:
        error = super().wrong(text, offset, qemu)
        error.path = self.file.node.filename
        return error

    # -- headers

    def read(self, kind: str) -> SparseExtent:
        """Read the header of an extent of *kind*. Raises InvalidFormat."""
        {"SPARSE": self._hosted, "VMFSSPARSE": self._cowd, "SESPARSE": self._se_sparse}[kind]()
        return self

    def _hosted(self) -> None:
        header = bytearray(SECTOR)
        self.file.read_into(0, header)
        fields = SPARSE.unpack_from(header)
        if fields[8 + 1] == DIRECTORY_AT_END and self.file.node.size >= 3 * SECTOR:
            # The header that a stream ends with says where the directory came to lie.
            footer = bytearray(SECTOR)
            self.file.read_into(self.file.node.size // SECTOR * SECTOR - 2 * SECTOR, footer)
            fields = SPARSE.unpack_from(footer)
            if fields[0] != SPARSE_MAGIC or fields[9] == DIRECTORY_AT_END:
                raise self.wrong("Invalid footer", self.file.node.size - 2 * SECTOR)
        magic, version, flags, capacity, grain, text, text_size, entries, second, first, overhead, _, check, how = (
            fields
        )
        if magic != SPARSE_MAGIC:
            raise self.wrong("Image not in VMDK format")
        self.compressed = bool(flags & FLAG_COMPRESSED) or how == 1
        if not 1 <= version <= 3:
            raise self.wrong(f"Unsupported VMDK version {version}", 4)
        if version == 3 and self.writable and not self.compressed:
            raise self.wrong("VMDK version 3 must be read only", 4)
        if self.compressed and how != 1:
            raise self.wrong(f"grains are compressed by method {how}, which is not deflate", 77)
        if not 0 < entries <= MAX_TABLE:
            raise self.wrong(
                f"grain tables of {entries} entries",
                44,
                "L2 table size too big" if entries else "L1 entry size is invalid",
            )
        self._shape(capacity, grain, entries, -(-capacity // (max(grain, 1) * entries)))
        if overhead * SECTOR > self.file.node.size and not self.compressed:
            text_ = f"File truncated, expecting at least {overhead * SECTOR} bytes"
            raise self.wrong(text_, 64)
        self._read_directory(first * SECTOR, second * SECTOR if flags & FLAG_REDUNDANT and second else None)
        if flags & FLAG_LINE_CHECK and check != TRANSFER_CHECK:
            raise self.wrong("the file was damaged by a transfer as text", 73)
        self.special = {0: UNALLOCATED}
        if flags & FLAG_ZERO_GRAIN:
            self.special[1] = ZEROED
            self.zero_entry = 1
        self.marked = bool(flags & FLAG_MARKERS)
        self.data_from = SECTOR
        if text_size:
            self.descriptor = text * SECTOR, text_size * SECTOR

    def _cowd(self) -> None:
        header = bytearray(SECTOR)
        self.file.read_into(0, header)
        _, version, _, capacity, grain, first, count, _ = COWD.unpack_from(header)
        if version != 1:
            raise self.wrong(f"Unsupported VMDK version {version}", 4)
        self._shape(capacity, grain, 4096, count)
        self._read_directory(first * SECTOR, None)
        self.special = {0: UNALLOCATED}

    def _se_sparse(self) -> None:
        raw = bytearray(SECTOR)
        self.file.read_into(0, raw)
        const = SE_CONST.unpack_from(raw)
        for found, known, at, words in (
            (const[0], SE_MAGIC, 0, f"Bad const header magic: 0x{const[0]:016x}"),
            (const[1], SE_VERSION, 8, f"Unsupported version: 0x{const[1]:016x}"),
            (const[3], SE_GRAIN, 24, f"Unsupported grain size: {const[3]}"),
            (const[4], SE_TABLE, 32, f"Unsupported grain table size: {const[4]}"),
            (const[5], 0, 40, f"Unsupported flags: 0x{const[5]:016x}"),
        ):
            if found != known:
                raise self.wrong(words, at)
        if const[10] * SECTOR + SECTOR > self.file.node.size:
            raise self.wrong("the volatile header lies behind the end of the file", 80)
        self.file.read_into(const[10] * SECTOR, raw)
        volatile = SE_VOLATILE.unpack_from(raw)
        if volatile[0] != 0xCAFECAFE:
            raise self.wrong(f"Bad volatile header magic: 0x{volatile[0]:016x}", const[10] * SECTOR)
        if volatile[3]:
            raise self.wrong("Image is dirty, Replaying journal not supported", const[10] * SECTOR + 24)
        if self.writable:
            raise self.wrong(
                "a seSparse extent can only be read", qemu="No write support for seSparse images available"
            )
        self.word = "Q"  # type: ignore[misc]  # of this extent, not of the class
        entries = SE_TABLE * SECTOR // 8
        self._shape(const[2], const[3], entries, const[17] * SECTOR // 8)
        self._se_tables, self._se_grains = const[18] * SECTOR, const[24] * SECTOR
        self.directory = array("Q")
        self._read_directory(const[16] * SECTOR, None)
        self.special = {0: UNALLOCATED}
        self.data_from = self._se_grains

    def _shape(self, capacity: int, grain: int, entries: int, tables: int) -> None:
        if not 0 < grain <= MAX_GRAIN or grain & (grain - 1):
            raise self.wrong(f"grains of {grain} sectors", 20, "Invalid granularity, image may be corrupt")
        if capacity > MAX_EXTENT_SECTORS * 4096:
            raise self.wrong(f"an extent of {capacity} sectors", 12, "L1 size too big")
        needed = -(-capacity // (grain * entries))
        if not needed <= tables or needed > MAX_DIRECTORY:
            raise self.wrong(f"a directory of {tables} entries for {capacity} sectors", 12, "L1 size too big")
        self._size = capacity * SECTOR
        self.allocation_unit = self.copy_unit = self.stride = grain * SECTOR
        self.per_page, self.entry_count, self._tables = entries, -(-capacity // grain), needed

    def _read_directory(self, host: int, second: int | None) -> None:
        for name, place in (("directory", host), ("second", second)):
            if place is None:
                continue
            words = array(self.directory.typecode)
            if place + self._tables * words.itemsize > self.file.node.size:
                raise self.wrong(
                    f"the grain directory of {self._tables} entries at {place:#x} does not end inside the file", 56,
                    f"Could not read l1 table from extent '{self.filename}'",
                )  # fmt: skip
            words.frombytes(bytes(self._tables * words.itemsize))
            self.file.read_into(place, memoryview(words).cast("B"))
            if not _NATIVE:
                words.byteswap()
            setattr(self, name, words)

    # -- the table

    def page_host(self, index: int) -> int | None:
        found = self.directory[index]
        if not found:
            return None
        if self.word == "Q":
            if found >> 32 != 0x10000000:
                raise self.wrong(f"entry {index} of the grain directory is {found:#018x}")
            return int(self._se_tables) + (found & 0xFFFFFFFF) * SE_TABLE * SECTOR
        if found * SECTOR >= self.file.node.size:
            raise self.wrong(
                f"grain table {index} lies at {found * SECTOR:#x}, behind the end of the file", found * SECTOR
            )
        return int(found * SECTOR)

    def place(self, raw: int) -> int:
        if self.word == "Q":
            kind = raw >> 60
            if kind == 3:
                return se_place(raw, self._se_grains)
            if kind in (1, 2) or not raw:
                return ZEROED if raw else UNALLOCATED
            raise self.wrong(f"an entry of a grain table is {raw:#018x}")
        place = super().place(raw)
        return place | PACKED if self.compressed and place > ZEROED else place

    def places_of(self, raw: Any) -> Any:
        import numpy

        if self.word == "Q":
            return numpy.array([self.place(entry) for entry in raw.tolist()], dtype=numpy.uint64)
        places = super().places_of(raw)
        return numpy.where(places > ZEROED, places | numpy.uint64(PACKED), places) if self.compressed else places

    def _step(self, place: int) -> int | None:
        return None if self.word == "Q" else super()._step(place)

    def write_entries(self, pieces: list[Piece]) -> None:
        super().write_entries(pieces)
        for piece in pieces:
            if self.second and self.second[piece.page]:
                offset = piece.host - self.directory[piece.page] * SECTOR
                self.file.write(self.second[piece.page] * SECTOR + offset, (piece.data,))

    def unpack(self, place: int, offset: int, view: memoryview) -> None:
        """Fill *view* with what lies at *offset* of the compressed grain at *place*. Bounded by the size of a grain."""
        host, unit = place & ~PACKED, self.allocation_unit
        header = _GRAIN_MARKER.size if self.marked else 0
        if host + header > self.file.node.size:
            raise self.wrong(f"a compressed grain lies at {host:#x}, behind the end of the file", host)
        if header:
            marker = bytearray(header)
            self.file.read_into(host, marker)
            size = _GRAIN_MARKER.unpack(marker)[1]
        else:
            size = min(2 * unit, self.file.node.size - host)
        if not 0 < size <= unit * 2 + 1024 or host + header + size > -(-self.file.node.size // SECTOR) * SECTOR:
            raise self.wrong(f"a compressed grain of {size} bytes at {host:#x}", host)
        packed = bytearray(size)
        self.file.read_into(host + header, packed)
        try:
            data = zlib.decompressobj().decompress(packed, unit)
        except zlib.error as error:
            raise self.wrong(f"the compressed grain at {host:#x} cannot be unpacked: {error}", host) from None
        if len(data) < min(unit, offset + len(view)):
            raise self.wrong(f"the compressed grain at {host:#x} has {len(data)} bytes of {unit}", host)
        view[:] = data[offset : offset + len(view)]

    def begin(self) -> None:
        """Get ready for changes; with the lock held."""
        self.begin_writing()
        self._writing = True
