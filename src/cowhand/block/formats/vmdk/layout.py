"""Structures of VMware's virtual disks ("Virtual Disk Format 5.0", VMware technical note; ESX's COWD and seSparse extents as QEMU's ``block/vmdk.c``
and public readers describe them). No I/O.

A descriptor, a text, names the disk's extents; it stands alone, or inside the one extent of a monolithic image.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

SECTOR = 512
SPARSE_MAGIC, COWD_MAGIC, SE_MAGIC = b"KDMV", b"COWD", 0xCAFEBABE
TEXT_MAGIC = b"# Disk DescriptorFile"
#: version, flags, capacity, grain, descriptor, its size, entries of a grain table, redundant directory, directory, overhead (in sectors),
#: unclean shutdown, four bytes that show a text-mode transfer, compression
SPARSE = struct.Struct("<4sIIQQQQIQQQB4sH")
TRANSFER_CHECK = b"\n \r\n"
DIRECTORY_AT_END = (1 << 64) - 1
FLAG_LINE_CHECK, FLAG_REDUNDANT, FLAG_ZERO_GRAIN, FLAG_COMPRESSED, FLAG_MARKERS = 1, 2, 4, 1 << 16, 1 << 17
#: version, flags, sectors, sectors of a grain, directory, its entries, free sector
COWD = struct.Struct("<4sIIIIIII")
#: magic, version, capacity, grain, grain table, flags, 4 reserved, then (offset, size) of volatile header, journal header, journal, directory,
#: tables, free bitmap, back map, grains; all in sectors
SE_CONST = struct.Struct("<26Q")
SE_VOLATILE = struct.Struct("<4Q")
SE_VERSION, SE_GRAIN, SE_TABLE = 0x0000000200000001, 8, 64

MAX_DESCRIPTOR = 1 << 20  #: bytes; QEMU stops at 20 KiB where it reads, so does no real one
MAX_EXTENTS = 32 << 10  #: 64 TiB in pieces of 2 GiB
MAX_DIRECTORY = 32 << 20  #: entries; QEMU: 512 MiB at most
MAX_TABLE = 512  #: entries of a grain table; QEMU
MIN_GRAIN, MAX_GRAIN = 1, 0x200000  #: sectors; QEMU: 1 GiB
MAX_EXTENT_SECTORS = 1 << 32  #: QEMU
NO_PARENT = 0xFFFFFFFF

_TYPES = ("SPARSE", "FLAT", "VMFS", "VMFSSPARSE", "SESPARSE", "ZERO")
_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)\s+(\d+)\s+(\w+)(?:\s+"([^"\n]*)")?(?:\s+(\d+))?')


class ExtentLine(NamedTuple):
    """One extent as the descriptor names it: *sectors* long; *offset* in sectors, of flat ones."""

    access: str
    sectors: int
    kind: str
    name: str
    offset: int


class Descriptor(NamedTuple):
    """What the text says: keys in the order in which they stand, and extents."""

    values: dict[str, str]
    extents: tuple[ExtentLine, ...]
    wrong: str | None  #: the first line that begins like an extent and is none

    def hexadecimal(self, key: str, default: int) -> int:
        """Return the value of *key*, a number of 32 bits; *default* where there is none."""
        try:
            return int(self.values.get(key, ""), 16) & 0xFFFFFFFF
        except ValueError:
            return default


def parse(text: bytes) -> Descriptor:
    """Return what a descriptor says; what it does not understand is left out."""
    values: dict[str, str] = {}
    extents: list[ExtentLine] = []
    wrong = None
    for line in text.split(b"\0", 1)[0].decode("utf-8", "surrogateescape").splitlines():
        line = line.strip()
        if line.startswith(("RW ", "RDONLY ", "NOACCESS ", "RW\t")):
            found = _EXTENT.match(line)
            kind = found[3].upper() if found else ""
            # Only a flat extent says where in its file it begins, and it has to.
            offset = found is not None and found[5] is not None
            complete = (
                found is not None
                and (kind == "ZERO" or found[4] is not None)
                and (not kind or offset == (kind == "FLAT"))
            )
            if found is None or not complete or len(found[2]) > 20:
                wrong = wrong or line
            else:
                extents.append(ExtentLine(found[1], int(found[2]), kind, found[4] or "", int((found[5] or "0")[:20])))
        elif not line.startswith("#") and "=" in line:
            key, _, value = line.partition("=")
            values.setdefault(key.strip(), value.strip().strip('"'))
    return Descriptor(values, tuple(extents), wrong)


def supported(kind: str) -> bool:
    """Tell whether an extent of *kind* can be read."""
    return kind in _TYPES


def se_place(entry: int, grains: int) -> int:
    """Return where the grain of an entry of a seSparse table, which says that there is one, lies; *grains* is where grains begin."""
    number = (entry & 0x0FFF000000000000) >> 48 | (entry & 0x0000FFFFFFFFFFFF) << 12
    return grains + number * SE_GRAIN * SECTOR
