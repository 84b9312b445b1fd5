"""The vhdx format: Hyper-V's virtual hard disk, version 2 ([MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format"), fixed and dynamic.

Two headers, of which the newer one holds; two copies of a table of regions: the block allocation table, and the metadata. Changes of the table
go through a log, which is replayed: into the file where it may be written, else into what is read of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.block_table import UNALLOCATED, ZEROED, BlockTableFormat, Page, Piece
from cowhand.block.formats.vhdx import layout, log
from cowhand.block.formats.vhdx.layout import MIB, Header
from cowhand.block.node.create_options import CreateOption
from cowhand.core import clock
from cowhand.core.errors import InvalidFormat, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.node.records import CheckResult, Say
    from cowhand.block.opening.opening import Opening

_NO_LOG = bytes(16)


class VhdxNode(BlockTableFormat):
    """A virtual hard disk of Hyper-V (VHDX), fixed or dynamic. What it does not store reads as zeroes."""

    driver: ClassVar[str] = "vhdx"
    word: ClassVar[str] = "Q"
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size; max of 64TB."),
        CreateOption("log_size", "size", 1 << 20, help="Log size; min 1MB."),
        CreateOption(
            "block_size", "size", 0, help="Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size."
        ),
        CreateOption(
            "subformat", "str", help="VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."
        ),
        CreateOption(
            "block_state_zero",
            "bool",
            help="Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when "
            "using 'qemu-img convert' with subformat=dynamic.",
        ),
    )

    # -- opening

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        self._replay: log.Replay | None = None
        self._log: log.Writer | None = None
        head = self.read(0, 8)
        if head != layout.IDENTIFIER:
            raise self.wrong("this is no VHDX file", qemu="Invalid argument")
        self.header = self._current_header()
        self._read_log(as_qemu=opening.policy.as_qemu)
        self._regions()
        self._metadata()
        blocks = -(-self._size // self.allocation_unit)
        self.scale, self.base, self.special = 1, 0, {}
        self.stride = self.allocation_unit
        self.per_page = layout.CHUNK * self.logical_sector // self.allocation_unit
        self.entry_count, self.entry_limit = blocks, 1 << 64
        needed = (blocks + (blocks - 1) // self.per_page if blocks else 0) * 8
        if needed > self._bat[1]:
            raise self.wrong(f"a block allocation table of {self._bat[1]} bytes for {blocks} blocks", self._bat[0])
        if self._bat[0] + needed > self.file.node.size:
            raise self.wrong("the block allocation table does not end inside the file", self._bat[0])
        self.data_from = MIB
        self.zero_entry = layout.ZERO
        self.set_capabilities()

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of metadata, what the log says of them included."""
        raw = bytearray(length)
        self.file.read_into(offset, raw)
        if self._replay is not None:
            self._replay.patch(offset, memoryview(raw))
        return bytes(raw)

    def _current_header(self) -> Header:
        found: list[Header] = []
        for at in layout.HEADERS:
            raw = bytearray(self.read(at, layout.HEADER_SIZE))
            magic, _, sequence, file_write, data_write, identity, _, version, length, offset = (
                layout.HEADER.unpack_from(raw)
            )
            if magic == b"head" and version == 1 and layout.sealed(raw):
                found.append(Header(at, sequence, file_write, data_write, identity, length, offset))
        if not found:
            raise self.wrong("neither of the two headers is whole", layout.HEADERS[0], "No valid VHDX header found")
        header = max(found, key=lambda one: one.sequence)
        if header.log_length % MIB or header.log_offset % MIB or (header.log_length and header.log_offset < MIB):
            raise self.wrong(f"a log of {header.log_length:#x} bytes at {header.log_offset:#x}", header.at + 68)
        return header

    def _read_log(self, *, as_qemu: bool) -> None:
        header = self.header
        self._replayed = False
        if header.log_id == _NO_LOG:
            return
        if header.log_length > layout.MAX_LOG:
            raise self.wrong(f"a log of {header.log_length} bytes, more than {layout.MAX_LOG}", header.at + 68)
        if header.log_offset + header.log_length > self.file.node.size:
            raise self.wrong("the log does not end inside the file", header.at + 72)
        replay = log.read(self.file, header.log_offset, header.log_length, header.log_id, self.wrong)
        if replay is not None and self.writable:
            self._write_back(replay)
            self._replayed = True
        else:
            self._replay = replay
            if replay is not None and as_qemu:
                name = self.file.node.filename
                text = f"VHDX image file '{name}' opened read-only, but contains a log that needs to be replayed"
                raise self.wrong(text, qemu=f"{text}\nTo replay the log, run:\nqemu-img check -r all '{name}'")
        if self.writable:
            self._write_header(log_id=_NO_LOG)

    def _write_back(self, replay: log.Replay) -> None:
        """Make the changes of the log in the file; they are stable when this returns."""
        if replay.last > self.file.node.size:
            self.file.node.resize(replay.last)
        for begin, end in replay.zeroes:
            self.file.write_zeroes(
                begin, min(end, self.file.node.size) - begin
            ) if begin < self.file.node.size else None
        for offset, data in replay.sectors.items():
            self.file.write(offset, (data,))
        self.file.flush()

    def _write_header(self, **changes: Any) -> None:
        """Write a newer header, with *changes*, over the older one; it is stable when this returns."""
        other = layout.HEADERS[1] if self.header.at == layout.HEADERS[0] else layout.HEADERS[0]
        header = self.header._replace(at=other, sequence=self.header.sequence + 1, **changes)
        self.file.write(other, (header.packed(),))
        self.file.flush()
        self.header = header

    def _regions(self) -> None:
        for at in layout.REGION_TABLES:
            raw = bytearray(self.read(at, layout.TABLE_SIZE))
            magic, _, count = layout.REGIONS.unpack_from(raw)
            if magic == b"regi" and count <= layout.MAX_REGIONS and layout.sealed(raw):
                break
        else:
            raise self.wrong(
                "neither of the two tables of regions is whole", layout.REGION_TABLES[0], "Invalid argument"
            )
        found: dict[bytes, tuple[int, int]] = {}
        for number in range(count):
            place = layout.REGIONS.size + number * layout.REGION.size
            identity, offset, length, required = layout.REGION.unpack_from(raw, place)
            if offset % MIB or length % MIB or offset < MIB or identity in found:
                raise self.wrong(f"region {number} has {length:#x} bytes at {offset:#x}", at + place)
            if required & 1 and identity not in (layout.BAT_REGION, layout.METADATA_REGION):
                raise self._unknown(f"region {number} is of a kind that is not known, and required", at + place)
            found[identity] = offset, length
        if layout.BAT_REGION not in found or layout.METADATA_REGION not in found:
            raise self.wrong("there is no block allocation table, or no metadata", at)
        self._bat, self._metadata_at = found[layout.BAT_REGION], found[layout.METADATA_REGION]

    def _metadata(self) -> None:
        begin, size = self._metadata_at
        raw = self.read(begin, layout.TABLE_SIZE)
        magic, count = layout.METADATA.unpack_from(raw)
        if magic != b"metadata" or count > layout.MAX_ITEMS:
            raise self.wrong("the table of metadata is damaged", begin)
        items: dict[bytes, bytes] = {}
        for number in range(count):
            place = layout.METADATA.size + number * layout.ITEM.size
            identity, offset, length, flags = layout.ITEM.unpack_from(raw, place)
            if identity not in layout.KNOWN_ITEMS:
                if flags & layout.IS_REQUIRED:
                    raise self._unknown(f"item {number} of the metadata is not known, and required", begin + place)
                continue
            if length > MIB or offset < layout.TABLE_SIZE or offset + length > size:
                raise self.wrong(f"item {number} of the metadata has {length} bytes at {offset:#x}", begin + place)
            items[identity] = self.read(begin + offset, length) if identity != layout.PARENT_LOCATOR else b""
        for identity, length in (
            (layout.FILE_PARAMETERS, 8), (layout.DISK_SIZE, 8), (layout.LOGICAL_SECTOR, 4), (layout.PHYSICAL_SECTOR, 4),
        ):  # fmt: skip
            if len(items.get(identity, b"")) < length:
                raise self.wrong("an item of the metadata is missing", begin)
        block, flags = (int.from_bytes(items[layout.FILE_PARAMETERS][at : at + 4], "little") for at in (0, 4))
        self._size = int.from_bytes(items[layout.DISK_SIZE][:8], "little")
        self.logical_sector = int.from_bytes(items[layout.LOGICAL_SECTOR][:4], "little")
        if not layout.MIN_BLOCK <= block <= layout.MAX_BLOCK or block & (block - 1):
            raise self.wrong(f"blocks of {block} bytes", begin)
        if self.logical_sector not in (512, 4096):
            raise self.wrong(f"sectors of {self.logical_sector} bytes", begin)
        if self._size > layout.MAX_SIZE or self._size % self.logical_sector:
            raise self.wrong(f"a disk of {self._size} bytes", begin)
        if flags & layout.HAS_PARENT:
            raise UnsupportedFeature(
                "vhdx: a differencing disk, which holds only what differs from its parent", path=self.filename,
                qemu="Differencing files are not supported",
            )  # fmt: skip
        self.allocation_unit = self.copy_unit = block

    def _unknown(self, text: str, offset: int) -> InvalidFormat:
        return UnsupportedFeature(f"vhdx: {text}", path=self.filename, offset=offset, qemu="Operation not supported")

    @property
    def size(self) -> int:
        return self._size

    # -- the table

    def page_host(self, index: int) -> int | None:
        # One entry for the bitmap of a chunk comes after those of its blocks.
        return self._bat[0] + index * (self.per_page + 1) * 8

    def page(self, index: int) -> Page:
        known = self.pages.get(index)
        if known is not None or self._replay is None:
            return known or super().page(index)
        page = super().page(index)
        assert page.entries is not None
        patched = memoryview(page.entries).cast("B")
        self._replay.patch(page.host, patched)
        return page

    def place(self, raw: int) -> int:
        state = raw & layout.STATE
        if state == layout.PRESENT:
            return raw & layout.OFFSET
        if state <= layout.UNMAPPED:
            return UNALLOCATED if state == layout.NOT_PRESENT else ZEROED
        raise self.wrong(f"an entry of the block allocation table is {raw:#018x}", self._bat[0])

    def places_of(self, raw: Any) -> Any:
        import numpy

        state = raw & numpy.uint64(layout.STATE)
        if ((state == 4) | (state == 5) | (state == layout.PARTIAL)).any():
            raise self.wrong("an entry of the block allocation table has a state that cannot be", self._bat[0])
        out = raw & numpy.uint64(layout.OFFSET)
        out[state != layout.PRESENT] = ZEROED
        out[state == layout.NOT_PRESENT] = UNALLOCATED
        return out

    def entry(self, place: int) -> int:
        return place | layout.PRESENT

    def empty_entry(self) -> int:
        return layout.NOT_PRESENT

    def free_from(self) -> int:
        return max(self.data_from, -(-self.file.node.size // MIB) * MIB)

    # -- changes

    def begin_writing(self) -> None:
        super().begin_writing()
        header = self.header
        identity = clock.random_bytes(16)
        changes: dict[str, Any] = {"file_write": clock.random_bytes(16), "data_write": clock.random_bytes(16)}
        if header.log_length:
            changes["log_id"] = identity
            self._log = log.Writer(self.file, header.log_offset, min(header.log_length, layout.MAX_LOG), identity)
        self._write_header(**changes)
        self._write_header()

    def write_entries(self, pieces: list[Piece]) -> None:
        if self._log is None:
            raise self.wrong("there is no log, without which the table cannot be changed", self.header.at + 68)
        sectors: dict[int, bytearray] = {}
        for piece in pieces:
            end = piece.host + len(piece.data)
            for at in range(piece.host - piece.host % log.SECTOR, end, log.SECTOR):
                if at not in sectors:
                    sectors[at] = bytearray(log.SECTOR)
                    self.file.read_into(at, sectors[at])
                low, high = max(at, piece.host), min(at + log.SECTOR, end)
                sectors[at][low - at : high - at] = piece.data[low - piece.host : high - piece.host]
        self._log.change({at: bytes(data) for at, data in sectors.items()}, self.file.node.size)

    def end_writing(self) -> None:
        self._write_header(log_id=_NO_LOG)

    def check(self, repair: str | None, say: Say) -> CheckResult:
        result = super().check(repair, say)
        # As qemu-img, which counts no clusters of this format.
        result.total_clusters = result.allocated_clusters = result.fragmented_clusters = result.image_end_offset = 0
        if self._replayed:
            result.corruptions_fixed += 1  # what the log said was made when the image was opened
            self._replayed = False
        return result

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        from cowhand.block.formats.vhdx.create import check

        check(size, options)

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* an image of *size* bytes."""
        from cowhand.block.formats.vhdx.create import create

        create(file, size, options)
