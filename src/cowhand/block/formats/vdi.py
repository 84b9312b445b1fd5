"""The vdi format: VirtualBox's disk image, version 1.1 (VirtualBox ``VDICore.h``; "All about VDIs" in VirtualBox's forum).

A header of 512 bytes, a map with a 32-bit word for each block of the disk, then the blocks in the order in which they were first written. All
numbers are little-endian. A static image has all its blocks from the beginning. Differencing images name their parent by an id alone, and are
refused.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.format_io.block_table import UNALLOCATED, ZEROED, BlockTableFormat
from cowhand.block.node.create_options import CreateOption
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument
from cowhand.core.extents import DATA, RECURSE

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.opening import Opening

SECTOR = 512
HEADER_SIZE = 512
SIGNATURE = 0xBEDA107F
VERSION = 0x00010001
DYNAMIC, STATIC = 1, 2
BLOCK_SIZE = 1 << 20  #: of all images that are made today
MIN_BLOCK, MAX_BLOCK = 4096, 64 << 20  #: this driver's
_UNALLOCATED, _DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
MAX_BLOCKS = ((1 << 31) - SECTOR) // 4  #: QEMU
MAX_SIZE = MAX_BLOCKS * BLOCK_SIZE  #: QEMU
_TEXT = b"<<< cowhand VM Virtual Disk Image >>>\n"
#: text, signature, version, header bytes, type, flags, description, map, data, cylinders, heads, sectors, sector bytes, unused, disk bytes,
#: block bytes, extra bytes of a block, blocks, allocated blocks, ids of image, snapshot, link and parent
_HEADER = struct.Struct("<64sIIIII256sIIIIIIIQIIII16s16s16s16s")
_ALLOCATED_AT = 0x184


class VdiNode(BlockTableFormat):
    """A disk image of VirtualBox, dynamic or static. What it does not store reads as zeroes."""

    driver: ClassVar[str] = "vdi"
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption("static", "bool", False, help="VDI static (pre-allocated) image"),
    )

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        raw = bytearray(HEADER_SIZE)
        self.file.read_into(0, raw)
        fields = _HEADER.unpack_from(raw)
        signature, version, kind, table, data = (int(fields[n]) for n in (1, 2, 4, 7, 8))
        sector, disk, block, extra, blocks = (int(fields[n]) for n in (12, 14, 15, 16, 17))
        unsupported = "unsupported VDI image"
        if signature != SIGNATURE:
            text = f"Image not in VDI format (bad signature {signature:08x})"
            raise self.wrong(text, 64)
        if version != VERSION:
            raise self.wrong(f"{unsupported} (version {version >> 16}.{version & 0xFFFF})", 68)
        for offset, at, name in ((table, 0x154, "block map"), (data, 0x158, "data")):
            if offset % SECTOR or offset < HEADER_SIZE:
                raise self.wrong(f"{unsupported} (unaligned {name} offset 0x{offset:x})", at)
        if sector != SECTOR:
            raise self.wrong(f"{unsupported} (sector size {sector} is not {SECTOR})", 0x168)
        if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1) or extra:
            raise self.wrong(f"{unsupported} (block size {block} is not {BLOCK_SIZE})", 0x178)
        if disk > MAX_SIZE:
            text = f"Unsupported VDI image size (size is 0x{disk:x}, max supported is 0x{MAX_SIZE:x})"
            raise self.wrong(text, 0x170)
        self._size = (
            -(-disk // SECTOR) * SECTOR
        )  # images of old programs are not whole sectors; the last one is stored whole
        if blocks > MAX_BLOCKS:
            raise self.wrong(f"{unsupported} (too many blocks {blocks}, max is {MAX_BLOCKS})", 0x180)
        if self._size > blocks * block:
            text = f"{unsupported} (disk size {self._size}, image bitmap has room for {blocks * block})"
            raise self.wrong(text, 0x170)
        for identity, name in ((fields[21], "link"), (fields[22], "parent")):
            if any(identity):
                raise self.wrong(f"{unsupported} (non-NULL {name} UUID)", 0x1A8)
        self._table, self._kind = table, kind
        self.allocation_unit = self.copy_unit = self.stride = self.scale = block
        self.base = self.data_from = data
        self.special = {_UNALLOCATED: UNALLOCATED, _DISCARDED: ZEROED}
        self.per_page, self.entry_count = 1 << 14, blocks
        self.set_capabilities()

    @property
    def size(self) -> int:
        return self._size

    def page_host(self, index: int) -> int | None:
        host = int(self._table) + index * self.per_page * 4
        end = host + min(self.per_page, self.entry_count - index * self.per_page) * 4
        if end > self.data_from or end > self.file.node.size:
            raise self.wrong(f"the block map goes on to {end:#x}, where blocks lie or the file has ended", host)
        return host

    def _flags(self, place: int) -> int:
        flags = super()._flags(place)
        return flags | RECURSE if self._kind == STATIC and flags & DATA else flags

    def free_from(self) -> int:
        return max(self.base, self.end_of_blocks())

    def before_barrier(self) -> None:
        # Programs take a new block where this counter says: it must never be less than what the map uses.
        count = (self._end - self.base) // self.stride
        self.file.write(_ALLOCATED_AT, (count.to_bytes(4, "little"),))

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for a *size* that the format cannot have."""
        if size > MAX_SIZE:
            raise InvalidArgument(f"Unsupported VDI image size (size is 0x{size:x}, max supported is 0x{MAX_SIZE:x})")

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* an image of *size* bytes."""
        cls.check_creation(size, options)
        static = bool(options.get("static"))
        blocks = -(-size // BLOCK_SIZE)
        table = -(-blocks * 4 // SECTOR) * SECTOR
        data = HEADER_SIZE + table
        fields: list[Any] = [_TEXT, SIGNATURE, VERSION, 0x180, STATIC if static else DYNAMIC, 0, b"", HEADER_SIZE, data]
        fields += [0, 0, 0, SECTOR, 0, size, BLOCK_SIZE, 0, blocks, blocks if static else 0]
        fields += [clock.random_bytes(16), clock.random_bytes(16), b"", b""]
        make_empty(file, data + (blocks * BLOCK_SIZE if static else 0))
        step = 1 << 20
        for first in range(0, blocks, step):
            count = min(step, blocks - first)
            words = array("I", range(first, first + count)) if static else array("I", [_UNALLOCATED]) * count
            file.write(HEADER_SIZE + first * 4, (words.tobytes(),))
        file.write(0, (_HEADER.pack(*fields).ljust(HEADER_SIZE, b"\0"),))
        file.flush()
