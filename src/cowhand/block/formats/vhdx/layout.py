"""Structures of VHDX ([MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format", section 2). No I/O. All numbers are little-endian."""

from __future__ import annotations

import struct
import uuid
from typing import NamedTuple

KIB, MIB = 1 << 10, 1 << 20
IDENTIFIER = b"vhdxfile"
HEADERS = (64 * KIB, 128 * KIB)
HEADER_SIZE = 4 * KIB
REGION_TABLES = (192 * KIB, 256 * KIB)
TABLE_SIZE = 64 * KIB  #: of a region table and of the metadata table
#: signature, checksum, sequence number, ids of file writes, data writes and log, versions of log and format, log's length and offset
HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
#: signature, checksum, entries; then (id, offset, length, required)
REGIONS, REGION = struct.Struct("<4sII4x"), struct.Struct("<16sQII")
#: signature, entries; then (id, offset in the region, length, flags)
METADATA, ITEM = struct.Struct("<8s2xH20x"), struct.Struct("<16sIII4x")


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


BAT_REGION = _guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = _guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = _guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = _guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK_ID = _guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = _guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = _guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = _guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
KNOWN_ITEMS = (FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR)
HAS_PARENT, LEAVE_ALLOCATED = 2, 1
IS_VIRTUAL_DISK, IS_REQUIRED = 2, 4
MAX_REGIONS, MAX_ITEMS = 2047, 1023
MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB
MAX_SIZE = 64 << 40
#: States of a payload block, the low bits of its entry; the offset is a multiple of 1 MiB.
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTIAL = 0, 1, 2, 3, 6, 7
STATE, OFFSET = 7, ~(MIB - 1) & 0xFFFFFFFFFFFFFFFF
#: Sectors whose bits one block of a bitmap holds: how many payload blocks come between two entries for bitmaps follows from it.
CHUNK = 1 << 23
MAX_LOG = 16 * MIB  #: this driver's; Hyper-V makes logs of 1 MiB


class Header(NamedTuple):
    """The current header; *at* says which of the two places it came from."""

    at: int
    sequence: int
    file_write: bytes
    data_write: bytes
    log_id: bytes
    log_length: int
    log_offset: int

    def packed(self) -> bytes:
        """Return the 4 KiB of the header."""
        raw = bytearray(HEADER_SIZE)
        HEADER.pack_into(
            raw, 0, b"head", 0, self.sequence, self.file_write, self.data_write, self.log_id, 0, 1, self.log_length, self.log_offset
        )  # fmt: skip
        return seal(raw)


def seal(raw: bytearray) -> bytes:
    """Put the checksum of *raw*, whose own field is zero, at its place after the signature."""
    raw[4:8] = crc32c(raw).to_bytes(4, "little")
    return bytes(raw)


def sealed(raw: bytearray) -> bool:
    """Tell whether the checksum after *raw*'s signature is right."""
    crc = crc32c(raw[8:], crc32c(b"\0" * 4, crc32c(raw[:4])))
    return crc == int.from_bytes(raw[4:8], "little")


def _table() -> list[int]:
    out = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        out.append(value)
    return out


_CRC = _table()


def crc32c(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720 B.4) of *data*, going on from that of what came *before*."""
    crc, table = before ^ 0xFFFFFFFF, _CRC
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
