"""The vpc format: Connectix' and Microsoft's virtual hard disk ("Virtual Hard Disk Image Format Specification" 1.0, 2006), fixed and dynamic.

A footer of 512 bytes ends the file; a dynamic image begins with its copy, then has a header and a table with a 32-bit sector number for each block. A
block is a bitmap of its sectors, then the sectors. All numbers are big-endian. How large the disk is depends on the program that made it: some
mean the geometry in the footer, some its size.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.format_io.block_table import UNALLOCATED, BlockTableFormat
from cowhand.block.format_io.reservations import Kind, Reservation, Unprepared
from cowhand.block.node.create_options import CreateOption
from cowhand.block.node.options import NodeOptions, option
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument, UnsupportedFeature
from cowhand.core.extents import ALLOCATED, DATA, IN_PLACE, OFFSET, RECURSE, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode, Child
    from cowhand.block.opening.opening import Opening

SECTOR = 512
COOKIE, SPARSE_COOKIE = b"conectix", b"cxsparse"
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
#: cookie, features, version, header, time, program, its version, system, original size, size, cylinders, heads, sectors, type, checksum, id, state
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB")
#: cookie, next, table, version, entries, block bytes, checksum, parent's id and time
_DYNAMIC = struct.Struct(">8sQQIIII16sI")
_FOOTER_SUM, _DYNAMIC_SUM = 64, 36
_NO_HEADER, _NO_BLOCK = 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF
_SINCE = 946684800  #: 2000-01-01, in seconds of Unix
#: Programs whose images are as long as the footer says; all others mean the geometry (the list is QEMU's, and Azure's own).
_EXACT = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0")
MAX_GEOMETRY = 65535 * 16 * 255  #: sectors
MAX_SECTORS = 0xFF000000  #: of a dynamic image: 2040 GiB; the specification
BLOCK_SIZE = 2 << 20
MAX_BLOCK = 256 << 20  #: this driver's
MAX_ENTRIES = 0x7FFFFFFF // 4  #: QEMU


class VpcOptions(NodeOptions):
    """Options of a VHD (QEMU's ``block/vpc.c``)."""

    force_size_calc: str | None = option(
        help="where the disk's size is taken from", choices=("chs", "current_size"), name="force_size_calc"
    )


def checksum(data: bytes | bytearray, at: int) -> int:
    """Return the complement of the sum of *data*'s bytes, those of the checksum itself, at *at*, left out."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def geometry(sectors: int) -> tuple[int, int, int]:
    """Return (cylinders, heads, sectors of a track) for a disk: the specification's appendix."""
    sectors = min(sectors, MAX_GEOMETRY)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    track = 17
    tracks = sectors // track
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        tracks = sectors // track
    if tracks >= heads * 1024:
        track, heads = 63, 16
        tracks = sectors // track
    return tracks // heads, heads, track


class VpcNode(BlockTableFormat):
    """A virtual hard disk (VHD), fixed or dynamic. What it does not store reads as zeroes."""

    driver: ClassVar[str] = "vpc"
    options_class: ClassVar[type[NodeOptions]] = VpcOptions
    big_endian: ClassVar[bool] = True
    checked: ClassVar[bool] = False
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption(
            "subformat",
            "str",
            help="Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
        ),
        CreateOption(
            "force_size",
            "bool",
            help="Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation",
        ),
    )
    options: VpcOptions

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        file_size = self.file.node.size
        footer = bytearray(SECTOR)
        self.file.read_into(0, footer)
        self._size = 0
        self.fixed = footer[:8] != COOKIE
        if self.fixed:
            if file_size < SECTOR:
                raise self.wrong("File too small for a VHD header")
            self.file.read_into(file_size - SECTOR, footer)
            if footer[:8] != COOKIE:
                raise self.wrong("invalid VPC image")
        if int.from_bytes(footer[_FOOTER_SUM : _FOOTER_SUM + 4], "big") != checksum(footer, _FOOTER_SUM):
            raise self.wrong("Incorrect header checksum", _FOOTER_SUM)
        self.footer = bytes(footer)
        fields = _FOOTER.unpack_from(footer)
        header, program, current, kind = (fields[n] for n in (3, 5, 9, 13))
        self.program = bytes(program)
        sectors = fields[10] * fields[11] * fields[12]
        exact = self.program in _EXACT
        if self.options.force_size_calc is not None:
            exact = self.options.force_size_calc == "current_size"
        if exact or sectors == MAX_GEOMETRY:
            sectors = current // SECTOR
        self._size = int(sectors) * SECTOR
        if kind == DIFFERENCING:
            raise UnsupportedFeature(
                "vpc: a differencing disk, which holds only what differs from its parent", path=self.filename, offset=60,
                qemu="Differencing VHDs are not supported",
            )  # fmt: skip
        if self.fixed:
            self._start_fixed(file_size)
        else:
            self._start_dynamic(int(header), sectors, file_size)
        self.set_capabilities()

    def _start_fixed(self, file_size: int) -> None:
        if self._size > file_size - SECTOR:
            text = f"the footer tells of {self._size} bytes, and the file has {file_size - SECTOR} before it"
            raise self.wrong(text, file_size - SECTOR)
        self.allocation_unit = self.copy_unit = self.stride = 65536
        self.special, self.per_page, self.entry_count = {}, 1, 0
        self.tells_cluster_size = False

    def _start_dynamic(self, at: int, sectors: int, file_size: int) -> None:
        if sectors > MAX_SECTORS:
            raise self.wrong(f"a dynamic disk of {self._size} bytes", 48, "File too large")
        header = bytearray(2 * SECTOR)
        if at > file_size:
            raise self.wrong(
                f"the dynamic header lies at {at:#x}, behind the end of the file", 16, "Invalid header magic"
            )
        self.file.read_into(at, header)
        magic, _, table, _, entries, block, *_ = _DYNAMIC.unpack_from(header)
        if magic != SPARSE_COOKIE:
            raise self.wrong("Invalid header magic", at)
        if block < SECTOR or block & (block - 1) or block > MAX_BLOCK:
            raise self.wrong(f"Invalid block size {block}", at + 32)
        if entries > MAX_ENTRIES:
            raise self.wrong(f"Max Table Entries too large ({entries})", at + 28)
        if entries * block < self._size:
            raise self.wrong("Page table too small", at + 28)
        if table + entries * 4 > file_size:
            raise self.wrong(f"the table of {entries} blocks at {table:#x} does not end inside the file", at + 16)
        bitmap = -(-block // SECTOR // 8 // SECTOR) * SECTOR
        self._table, self.base = table, bitmap
        self.allocation_unit = self.copy_unit = block
        self.stride = block + bitmap
        self.special = {_NO_BLOCK: UNALLOCATED}
        self.per_page, self.entry_count = 1 << 14, -(-self._size // block)
        self.data_from = max(at + 2 * SECTOR, table + -(-entries * 4 // SECTOR) * SECTOR) if table >= at else SECTOR
        self._whole: set[int] = set()  #: blocks all of whose sectors are marked as written
        self._new: list[int] = []  #: blocks whose bitmaps have to be written

    @property
    def size(self) -> int:
        return self._size

    def page_host(self, index: int) -> int | None:
        return int(self._table) + index * self.per_page * 4

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        if self.fixed:
            return length, DATA | ALLOCATED | OFFSET | RECURSE | (IN_PLACE if self.writable else 0), self.file, offset
        run = super().map(offset, length)
        if run[1] & IN_PLACE and offset // self.allocation_unit not in self._whole:
            return run[0], run[1] & ~IN_PLACE, run[2], run[3]
        return run

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        if not self.fixed:
            return super().map_batch(offset, length)
        batch = ExtentBatch()
        batch.add(offset, length, DATA | ALLOCATED | OFFSET | RECURSE, offset, self.file.node)
        return batch

    # -- changes

    def free_from(self) -> int:
        if self.fixed:
            return self.file.node.size
        return max(-(-self.data_from // SECTOR) * SECTOR, self.end_of_blocks())

    def reserve(self, offset: int, length: int, kind: Kind, nbytes: int = 0) -> Reservation | None:
        if self.fixed:
            return None
        reservation = super().reserve(offset, length, kind, nbytes)
        number = offset // self.allocation_unit
        if reservation is None and number not in self._whole:
            raise Unprepared(partial(self._mark_written, number))
        return reservation

    def _mark_written(self, number: int) -> None:
        """Mark all sectors of a block as written: programs may take for zeroes what is not."""
        page = self.page(number // self.per_page)
        assert page.entries is not None
        at = page.entries[number % self.per_page] * SECTOR
        self.file.write(at, (b"\xff" * self.base,))
        self._whole.add(number)
        self.changed = True

    def link(self, reservation: Reservation) -> None:
        super().link(reservation)
        if reservation.kind is Kind.DATA:
            self._new.append(reservation.host - self.base)
            self._whole.add(reservation.offset // self.allocation_unit)

    def before_barrier(self) -> None:
        new, self._new = self._new, []
        for host in new:
            self.file.write(host, (b"\xff" * self.base,))
        self.file.write(self._end, (self.footer,))

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        kind = options.get("subformat") or "dynamic"
        if kind not in ("dynamic", "fixed"):
            raise InvalidArgument(f"Invalid parameter '{kind}'", hint="Known sub-formats: dynamic, fixed.")
        _shape(size, options)

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* an image of *size* bytes, or of the next geometry above it."""
        cls.check_creation(size, options)
        fixed = options.get("subformat") == "fixed"
        sectors, shape = _shape(size, options)
        program = b"qem2" if options.get("force_size") else b"cowh"
        seconds = max(0, int(clock.now()) - _SINCE) & 0xFFFFFFFF
        footer = bytearray(SECTOR)
        _FOOTER.pack_into(
            footer, 0, COOKIE, 2, 0x10000, _NO_HEADER if fixed else SECTOR, seconds, program, 0x50003, b"Wi2k", sectors * SECTOR,
            sectors * SECTOR, *shape, FIXED if fixed else DYNAMIC, 0, clock.random_bytes(16), 0,
        )  # fmt: skip
        footer[_FOOTER_SUM : _FOOTER_SUM + 4] = checksum(footer, _FOOTER_SUM).to_bytes(4, "big")
        if fixed:
            make_empty(file, sectors * SECTOR + SECTOR)
            file.write(sectors * SECTOR, (footer,))
            file.flush()
            return
        entries = -(-sectors * SECTOR // BLOCK_SIZE)
        header = bytearray(2 * SECTOR)
        _DYNAMIC.pack_into(header, 0, SPARSE_COOKIE, _NO_HEADER, 3 * SECTOR, 0x10000, entries, BLOCK_SIZE, 0, b"", 0)
        header[_DYNAMIC_SUM : _DYNAMIC_SUM + 4] = checksum(header, _DYNAMIC_SUM).to_bytes(4, "big")
        table = array("I", [_NO_BLOCK]) * (-(-entries * 4 // SECTOR) * SECTOR // 4)
        make_empty(file, 3 * SECTOR + len(table) * 4 + SECTOR)
        file.write(SECTOR, (header, table.tobytes(), footer))
        file.write(0, (footer,))
        file.flush()


def _shape(size: int, options: Mapping[str, Any]) -> tuple[int, tuple[int, int, int]]:
    """Return (sectors, geometry) of a disk of at least *size* bytes. Raises InvalidArgument."""
    wanted = -(-size // SECTOR)
    limit = f"Disk size is too large, max size is {MAX_SECTORS * SECTOR >> 30} GiB"
    if options.get("force_size"):
        if wanted > MAX_SECTORS:
            raise InvalidArgument(limit)
        # The largest geometry: programs that mean the geometry then look at the size.
        return wanted, (65535, 16, 255)
    shape = geometry(wanted)
    trial = wanted
    while (sectors := shape[0] * shape[1] * shape[2]) < min(wanted, MAX_GEOMETRY):
        trial += 1
        shape = geometry(trial)
    if sectors == MAX_GEOMETRY:
        if wanted > MAX_SECTORS:
            raise InvalidArgument(limit)
        sectors = wanted
    return sectors, shape
