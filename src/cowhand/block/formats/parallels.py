"""The parallels format: the expandable image of Parallels' products (QEMU ``docs/interop/parallels``).

A header of 64 bytes, a table with a 32-bit word for each cluster, then the clusters. All numbers are little-endian. Words are sectors in images
of the first kind, clusters in those of the second.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.format_io.block_table import UNALLOCATED, BlockTableFormat
from cowhand.block.format_io.mapped import RECORDED
from cowhand.block.node.create_options import CreateOption
from cowhand.block.node.records import ERROR, REPAIRED, CheckResult, Finding, Kind, Say
from cowhand.core.errors import ImageCorrupt, InvalidArgument, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.opening import Opening

SECTOR = 512
MAGIC, MAGIC_EXTENDED = b"WithoutFreeSpace", b"WithouFreSpacExt"
#: magic, version, heads, cylinders, cluster's sectors, entries, disk's sectors, in use, first data sector, flags, extension
_HEADER = struct.Struct("<16sIIIIIQIIIQ")
VERSION = 2
IN_USE, CLOSED = 0x746F6E59, 0x312E3276
_IN_USE_AT = 44
EMPTY_IMAGE = 1
CLUSTER = 1 << 20
MAX_CLUSTER_SECTORS = 0x7FFFFFFF // SECTOR  #: QEMU
MAX_CLUSTER = 256 << 20  #: this driver's
NOT_CLOSED = Kind("image-not-closed", "{verb} image was not closed correctly")
MAX_ENTRIES = 0x7FFFFFFF // 4  #: QEMU


class ParallelsNode(BlockTableFormat):
    """An expandable image of Parallels. What it does not store reads as zeroes."""

    driver: ClassVar[str] = "parallels"
    supports_backing: ClassVar[bool] = True  # of the user's naming; the format itself knows none
    tells_cluster_size = False
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption("cluster_size", "size", CLUSTER, help="Parallels image cluster size"),
    )

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        raw = bytearray(_HEADER.size)
        self.file.read_into(0, raw)
        magic, version, _, _, tracks, entries, sectors, in_use, data, flags, extension = _HEADER.unpack_from(raw)
        if magic not in (MAGIC, MAGIC_EXTENDED) or version != VERSION:
            raise self.wrong("Image not in Parallels format")
        if not tracks:
            raise self.wrong("Invalid image: Zero sectors per track", 28)
        if tracks > MAX_CLUSTER_SECTORS or tracks * SECTOR > MAX_CLUSTER:
            raise self.wrong(f"clusters of {tracks} sectors", 28, "Invalid image: Too big cluster")
        if entries > MAX_ENTRIES:
            raise self.wrong(f"a table of {entries} entries", 32, "Catalog too large")
        extended = magic == MAGIC_EXTENDED
        if not extended:
            sectors &= 0xFFFFFFFF
        self._size = sectors * SECTOR
        cluster = tracks * SECTOR
        if sectors > entries * tracks:
            raise self.wrong(f"a table of {entries} entries for {sectors} sectors", 36)
        if _HEADER.size + entries * 4 > self.file.node.size:
            raise self.wrong(f"the table of {entries} entries does not end inside the file", 32)
        self.unclean = in_use == IN_USE
        if self.writable:
            self._check_writable_state(extension, for_repair=opening.for_repair)
        self.allocation_unit = self.copy_unit = self.stride = cluster
        self.scale = cluster if extended else SECTOR
        self.special = {0: UNALLOCATED}
        self.empty = bool(flags & EMPTY_IMAGE)
        self.per_page, self.entry_count = 1 << 14, -(-self._size // cluster)
        table_end = -(-(_HEADER.size + entries * 4) // SECTOR) * SECTOR
        # Old programs did not say where data begin.
        self.data_from = data * SECTOR if data else table_end
        if self.data_from < min(table_end, SECTOR):
            raise self.wrong(f"data begin at {self.data_from:#x}, before the table ends", 48)
        self.open_backing(opening, given.pop("backing", RECORDED))
        self.set_capabilities()

    def _check_writable_state(self, extension: int, *, for_repair: bool) -> None:
        if self.unclean and not for_repair:
            raise ImageCorrupt(
                "parallels: the image was not closed", path=self.filename, offset=_IN_USE_AT,
                qemu="parallels: Image was not closed correctly; cannot be opened read/write",
                hint="Look at it with 'qemu-img check', and repair it, before it is written; reading is possible.",
            )  # fmt: skip
        if extension:
            raise UnsupportedFeature(
                "parallels: the image has an extension (dirty bitmaps), which writing would make wrong", path=self.filename, offset=56,
                hint="Open it for reading only.",
            )  # fmt: skip

    @property
    def size(self) -> int:
        return int(self._size)

    def page_host(self, index: int) -> int | None:
        return _HEADER.size + index * self.per_page * 4

    def free_from(self) -> int:
        # Clusters begin at multiples of their size from the first one, or from the file's beginning where words count clusters.
        base = self.data_from if self.scale == SECTOR else 0
        end = max(self.data_from, self.end_of_blocks())
        return base + -(-(end - base) // self.stride) * self.stride

    def begin_writing(self) -> None:
        super().begin_writing()
        self.file.write(_IN_USE_AT, (IN_USE.to_bytes(4, "little"),))
        self.file.flush()

    def end_writing(self) -> None:
        self.file.write(_IN_USE_AT, (CLOSED.to_bytes(4, "little"),))
        self.file.flush()

    def check(self, repair: str | None, say: Say) -> CheckResult:
        fix = repair == "all" and self.unclean
        if self.unclean:
            say(Finding(NOT_CLOSED, REPAIRED if fix else ERROR, offset=_IN_USE_AT))
        result = super().check(repair, say)
        if self.unclean:
            result.corruptions += 1
        if fix and result.corruptions == 1:  # nothing else is wrong
            result.corruptions_fixed = 1
            result.corruptions = 0
            self.end_writing()
            self.unclean = False
        return result

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        cluster = options.get("cluster_size") or CLUSTER
        if cluster % SECTOR:
            raise InvalidArgument("Cluster size must be a multiple of 512 bytes")
        if cluster > MAX_CLUSTER:
            raise InvalidArgument("Cluster size is too large")
        if size >= (1 << 32) * cluster:
            raise InvalidArgument("Image size is too large for this cluster size")

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* an image of *size* bytes."""
        cls.check_creation(size, options)
        cluster = options.get("cluster_size") or CLUSTER
        entries = -(-size // cluster)
        data = -(-(_HEADER.size + entries * 4) // cluster) * cluster
        sectors = size // SECTOR
        cylinders = min(sectors // 16 // 32, 0xFFFFFFFF)
        header = _HEADER.pack(
            MAGIC_EXTENDED, VERSION, 16, cylinders, cluster // SECTOR, entries, sectors, CLOSED, data // SECTOR, 0, 0
        )
        make_empty(file, data)
        file.write(0, (header.ljust(SECTOR, b"\0")[: min(SECTOR, data)],))
        file.flush()
