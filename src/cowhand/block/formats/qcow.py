"""The qcow format, version 1, from which qcow2 came ("The QCOW Image Format", M. McLoughlin 2006; QEMU ``block/qcow.c``).

A header, a first table of second tables, clusters; a cluster may be compressed by deflate. All numbers are big-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.format_io.block_table import UNALLOCATED
from cowhand.block.format_io.mapped import RECORDED
from cowhand.block.format_io.two_level import TwoLevelFormat
from cowhand.block.node.create_options import CreateOption
from cowhand.core.errors import InvalidArgument, NotSupported, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode, Child
    from cowhand.block.opening.opening import Opening

MAGIC, VERSION = b"QFI\xfb", 1
#: magic, version, backing name and its size, time of the backing file, disk bytes, bits of a cluster and of a second table, encryption, table
_HEADER = struct.Struct(">4sIQIIQBB2xIQ")
MAX_NAME = 1023  #: bytes of the backing file's name; QEMU
MAX_FIRST = (1 << 31) // 8  #: entries of the first table; QEMU
#: Bits of a cluster, and of a second table's entries.
_CLUSTER, _SMALL_CLUSTER, _TABLE, _LARGE_TABLE = 12, 9, 9, 12


class QcowNode(TwoLevelFormat):
    """A qcow image of version 1. What it does not store shows the backing file, or zeroes."""

    driver: ClassVar[str] = "qcow"
    supports_backing: ClassVar[bool] = True
    big_endian: ClassVar[bool] = True
    checked: ClassVar[bool] = False
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption("backing_file", "str", help="File name of a base image"),
        CreateOption("backing_fmt", "str", help="Format of the backing image"),
        CreateOption(
            "encryption",
            "bool",
            help="Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        ),
        CreateOption("encrypt.format", "str", help="Encrypt the image, format choices: 'aes'"),
        CreateOption("encrypt.key-secret", "str", help="ID of secret providing qcow AES key or LUKS passphrase"),
    )

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        raw = bytearray(_HEADER.size)
        self.file.read_into(0, raw)
        magic, version, name_at, name_size, _, size, bits, table_bits, method, first = _HEADER.unpack_from(raw)
        if magic != MAGIC:
            raise self.wrong("Image not in qcow format")
        if version != VERSION:
            raise self.wrong(f"qcow (v{VERSION}) does not support qcow version {version}", 4)
        if size <= 1:
            raise self.wrong("Image size is too small (must be at least 2 bytes)", 24)
        if not 9 <= bits <= 16:
            raise self.wrong(f"clusters of 2^{bits} bytes", 32, "Cluster size must be between 512 and 64k")
        if not 6 <= table_bits <= 13:
            raise self.wrong(f"tables of 2^{table_bits} entries", 33, "L2 table size must be between 512 and 64k")
        if method:
            if method != 1:
                raise self.wrong(f"encryption of kind {method}", 36, "invalid encryption method in qcow header")
            raise UnsupportedFeature(
                "qcow: an image that is encrypted", path=self.filename, offset=36,
                qemu="Use of AES-CBC encrypted qcow images is no longer supported in system emulators",
                hint="Convert it with qemu-img first.",
            )  # fmt: skip
        if -(-size // (1 << (bits + table_bits))) > MAX_FIRST or size >= 1 << 63:
            raise self.wrong(f"a disk of {size} bytes", 24, "Image too large")
        self._bits = bits
        self._size = size // 512 * 512
        self.allocation_unit = self.copy_unit = 1 << bits
        self.data_from = _HEADER.size
        self.special = {0: UNALLOCATED}
        if name_at:
            if name_size > MAX_NAME:
                raise self.wrong(f"a backing name of {name_size} bytes", 16, "Backing file name too long")
            name = bytearray(name_size)
            self.file.read_into(name_at, name)
            self.backing_name = name.decode("utf-8", "surrogateescape")
        self.read_first(first, 1 << table_bits)
        self.open_backing(opening, given.pop("backing", RECORDED))
        self.set_capabilities()

    @property
    def size(self) -> int:
        return int(self._size)

    def place(self, raw: int) -> int:
        if 0 < raw < self.data_from:
            raise self.wrong(f"an entry of a table is {raw:#x}")
        return raw

    def places_of(self, raw: Any) -> Any:
        if ((raw > 0) & (raw < self.data_from)).any():
            raise self.wrong("an entry of a table names the header")
        return raw

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        unit, place = self.allocation_unit, run[3]
        while view:
            within = offset % unit
            count = min(len(view), unit - within)
            view[:count] = self._unpacked(place)[within : within + count]
            view, offset = view[count:], offset + count
            if view:
                place = self.map(offset, 1)[3]

    def _unpacked(self, entry: int) -> bytes:
        """Return the cluster that *entry* says is compressed. It takes no more memory than two clusters."""
        shift = 63 - self._bits
        size, host = entry >> shift & self.allocation_unit - 1, entry & (1 << shift) - 1
        if host + size > self.file.node.size or not size:
            raise self.wrong(f"a compressed cluster of {size} bytes at {host:#x}", host)
        packed = bytearray(size)
        self.file.read_into(host, packed)
        try:
            data = zlib.decompressobj(-12).decompress(packed, self.allocation_unit)
        except zlib.error as error:
            raise self.wrong(f"the compressed cluster at {host:#x} cannot be unpacked: {error}", host) from None
        if len(data) < self.allocation_unit:
            raise self.wrong(f"the compressed cluster at {host:#x} has {len(data)} bytes", host)
        return data

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        if not size:
            raise InvalidArgument("Image size is too small, cannot be zero length")
        if options.get("encryption") or options.get("encrypt.format"):
            raise NotSupported(
                "qcow images that are encrypted are not made", hint="Make a qcow2 image with LUKS instead."
            )

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* an image of *size* bytes. Over a backing file clusters are small: little is copied."""
        cls.check_creation(size, options)
        name = str(options.get("backing_file") or "").encode("utf-8", "surrogateescape")
        if len(name) > MAX_NAME:
            raise InvalidArgument(f"the backing file's name has {len(name)} bytes, more than {MAX_NAME}")
        bits, table_bits = (_SMALL_CLUSTER, _LARGE_TABLE) if name else (_CLUSTER, _TABLE)
        first = -(-(_HEADER.size + len(name)) // 8) * 8
        count = -(-size // (1 << (bits + table_bits)))
        header = _HEADER.pack(
            MAGIC, VERSION, _HEADER.size if name else 0, len(name), 0, size, bits, table_bits, 0, first
        )
        make_empty(file, -(-(first + count * 8) // 512) * 512)
        file.write(0, (header + name,))
        file.flush()
