"""The qed format: QEMU's enhanced disk (QEMU ``docs/interop/qed_spec``): clusters in two levels of tables, over a backing file or none.

All numbers are little-endian. An image that was not closed has NEED_CHECK set: before it is written, its tables are looked through.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.format_io.block_table import UNALLOCATED, ZEROED
from cowhand.block.format_io.mapped import RECORDED
from cowhand.block.format_io.two_level import TwoLevelFormat
from cowhand.block.node.create_options import CreateOption
from cowhand.core.errors import ImageCorrupt, InvalidArgument, NotSupported, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.opening import Opening

MAGIC = b"QED\0"
#: magic, cluster bytes, table clusters, header clusters, features, compatible features, autoclear features, first table, disk bytes, backing name
_HEADER = struct.Struct("<4sIIIQQQQQII")
BACKING_FILE, NEED_CHECK, NO_PROBE = 1, 2, 4
MIN_CLUSTER, MAX_CLUSTER, MAX_TABLE = 1 << 12, 1 << 26, 16
MAX_NAME = 1023  #: bytes of the backing file's name; QEMU
_FEATURES_AT, _AUTOCLEAR_AT, _SIZE_AT = 16, 32, 48
#: Two places for the backing file's name: a header has 4 KiB at least.
_NAMES = (_HEADER.size, 2048)
_HEADER_SECTOR = 512


class QedNode(TwoLevelFormat):
    """An image of QEMU's enhanced disk format. What it does not store shows the backing file, or zeroes."""

    driver: ClassVar[str] = "qed"
    supports_backing: ClassVar[bool] = True
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption("backing_file", "str", help="File name of a base image"),
        CreateOption("backing_fmt", "str", help="Image format of the base image"),
        CreateOption("cluster_size", "size", 65536, help="Cluster size (in bytes)"),
        CreateOption("table_size", "size", help="L1/L2 table size (in clusters)"),
    )

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        raw = bytearray(_HEADER.size)
        self.file.read_into(0, raw)
        magic, cluster, table, header, features, _, autoclear, first, size, name_at, name_size = _HEADER.unpack_from(
            raw
        )
        if magic != MAGIC:
            raise self.wrong("Image not in QED format")
        if unknown := features & ~(BACKING_FILE | NEED_CHECK | NO_PROBE):
            text = f"Unsupported QED features: {unknown:x}"
            raise UnsupportedFeature(f"qed: {text}", qemu=text, path=self.filename, offset=_FEATURES_AT)
        if not MIN_CLUSTER <= cluster <= MAX_CLUSTER or cluster & (cluster - 1):
            raise self.wrong(f"clusters of {cluster} bytes", 4, "QED cluster size is invalid")
        if not 1 <= table <= MAX_TABLE or table & (table - 1):
            raise self.wrong(f"tables of {table} clusters", 8, "QED table size is invalid")
        entries = table * cluster // 8
        if size % 512 or size > entries * entries * cluster:
            raise self.wrong(f"a disk of {size} bytes", 48, "QED image size is invalid")
        if first % cluster or not header or first < header * cluster or first + table * cluster > self.file.node.size:
            raise self.wrong(f"a first table at {first:#x}", 40, "QED table offset is invalid")
        self._size = size
        self.features, self.autoclear = features, autoclear
        self.allocation_unit = self.copy_unit = self.table_alignment = cluster
        self.data_from = header * cluster
        self.special, self.zero_entry = {0: UNALLOCATED, 1: ZEROED}, 1
        if features & BACKING_FILE:
            if name_size > MAX_NAME or name_at + name_size > header * cluster:
                raise self.wrong(
                    f"a backing name of {name_size} bytes at {name_at}", 56, "QED backing filename offset is invalid"
                )
            name = bytearray(name_size)
            self.file.read_into(name_at, name)
            self.backing_name = name.decode("utf-8", "surrogateescape")
        self.backing_format = "raw" if features & NO_PROBE else None
        self.read_first(first, entries)
        self.open_backing(opening, given.pop("backing", RECORDED))
        self.set_capabilities()
        self.capabilities = self.capabilities._replace(resizable=self.writable)

    @property
    def size(self) -> int:
        return int(self._size)

    def _check_place(self, place: int, number: int) -> None:
        super()._check_place(place, number)
        if place > ZEROED and place % self.allocation_unit:
            raise self.wrong(
                f"cluster {number} of the disk lies at {place:#x}, which is no multiple of a cluster", place
            )

    # -- changes

    def begin_writing(self) -> None:
        super().begin_writing()
        features = self.features
        if features & NEED_CHECK:
            self._look_through()
            features &= ~NEED_CHECK
        if features != self.features or self.autoclear:
            # No autoclear feature is known, so none can be kept.
            fields = features.to_bytes(8, "little"), (0).to_bytes(8, "little")
            self.file.write(_FEATURES_AT, (fields[0],))
            self.file.write(_AUTOCLEAR_AT, (fields[1],))
            self.features, self.autoclear = features, 0

    def _look_through(self) -> None:
        """Raise ImageCorrupt when a cluster is used twice, or lies outside of the file."""
        unit, size = self.allocation_unit, self.file.node.size
        seen = bytearray(-(-size // unit))
        tables = -(-self._table_entries * 8 // unit)

        def use(place: int, count: int) -> None:
            first = place // unit
            if place % unit or place + count * unit > len(seen) * unit or any(seen[first : first + count]):
                raise ImageCorrupt(
                    f"qed: the cluster at {place:#x} is used twice, or lies outside of the file", qemu="Image corrupted",
                    path=self.filename, offset=place, hint="Copy what can be read of it: cowhand convert.",
                )  # fmt: skip
            seen[first : first + count] = b"\1" * count

        use(0, self.data_from // unit)
        use(self._first_host, tables)
        for host in self.tables():
            use(host, tables)
        for index in range(-(-self.entry_count // self.per_page)):
            for place in self.page(index).entries or ():
                if place > ZEROED:
                    use(place, 1)

    def change_backing(self, name: str | None, format: str | None) -> None:
        """Record another backing file in the header (None: none any more). Raises InvalidArgument when the name is too long."""
        self.check_writable()
        data = (name or "").encode("utf-8", "surrogateescape")
        if len(data) > MAX_NAME:
            raise InvalidArgument(
                f"the backing file's name has {len(data)} bytes, more than {MAX_NAME}", path=self.filename
            )
        raw = bytearray(_HEADER_SECTOR)
        self.file.read_into(0, raw)
        # Beside the old name: the header names one or the other.
        before = int.from_bytes(raw[56:60], "little")
        place = _NAMES[1] if before < _NAMES[1] else _NAMES[0]
        if data:
            self.file.write(place, (data,))
            self.file.flush()
        self.features &= ~(BACKING_FILE | NO_PROBE)
        if data:
            self.features |= BACKING_FILE | (NO_PROBE if format == "raw" else 0)
        raw[_FEATURES_AT : _FEATURES_AT + 8] = self.features.to_bytes(8, "little")
        raw[56:64] = struct.pack("<II", place if data else 0, len(data))
        self.file.write(0, (raw[: _HEADER.size],))
        self.file.flush()
        self.backing_name, self.backing_format = name or None, "raw" if data and format == "raw" else None

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'", path=self.filename)
        if size % 512 or size > self._table_entries**2 * self.allocation_unit:
            raise InvalidArgument("Invalid image size specified", path=self.filename)
        if size < self._size:
            raise NotSupported("Shrinking images is currently not supported", path=self.filename)
        self.check_writable()
        self.flush()
        before = self._size
        with self.lock:
            self._set_size(size)
        try:
            below = self.backing
            if below is not None and below.node.size > before:
                # What the backing file has there must not appear.
                self.write_zeroes(before, min(size, below.node.size) - before)
            self.flush()
            self.file.write(_SIZE_AT, (size.to_bytes(8, "little"),))
            self.file.flush()
        except BaseException:
            with self.lock:
                self._set_size(before)
            raise

    def _set_size(self, size: int) -> None:
        """Have the disk end at *size*; the last page of the table is read anew. With the lock held, after a flush."""
        self.pages.pop(max(0, self.entry_count - 1) // self.per_page, None)
        self._size = size
        self.entry_count = -(-size // self.allocation_unit)
        self.pages.pop(max(0, self.entry_count - 1) // self.per_page, None)
        missing = -(-self.entry_count // self._table_entries) - len(self.first)
        if missing > 0:
            self.first.frombytes(bytes(missing * 8))  # none is in use behind the disk's end

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        cluster, table = _shape(options)
        if not MIN_CLUSTER <= cluster <= MAX_CLUSTER or cluster & (cluster - 1):
            raise InvalidArgument(
                f"QED cluster size must be within range [{MIN_CLUSTER}, {MAX_CLUSTER}] and power of 2"
            )
        if not 1 <= table <= MAX_TABLE or table & (table - 1):
            raise InvalidArgument(f"QED table size must be within range [1, {MAX_TABLE}] and power of 2")
        most = (table * cluster // 8) ** 2 * cluster
        if size > most:
            raise InvalidArgument(
                f"QED image size must be a non-zero multiple of cluster size and less than {most} bytes"
            )

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* an image of *size* bytes."""
        cls.check_creation(size, options)
        cluster, table = _shape(options)
        name = str(options.get("backing_file") or "").encode("utf-8", "surrogateescape")
        features = (BACKING_FILE if name else 0) | (NO_PROBE if name and options.get("backing_fmt") == "raw" else 0)
        if len(name) > MAX_NAME:
            raise InvalidArgument(f"the backing file's name has {len(name)} bytes, more than {MAX_NAME}")
        make_empty(file, cluster + table * cluster)
        header = _HEADER.pack(
            MAGIC, cluster, table, 1, features, 0, 0, cluster, size, _HEADER.size if name else 0, len(name)
        )
        file.write(0, ((header + name).ljust(_HEADER_SECTOR * 4, b"\0"),))
        file.flush()


def _shape(options: Mapping[str, Any]) -> tuple[int, int]:
    return options.get("cluster_size") or 65536, options.get("table_size") or 4
