"""Structure-aware changes of qcow2 images: header fields, entries of tables and counts get values that mean something in this very image.

Random bytes hardly ever make a pointer that names another table; these do. Source: QEMU ``docs/interop/qcow2``.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.hostile.layout import FIELDS
from tests.hostile.walk import Region, metadata

_EXTENSIONS = (0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441)
#: Flags of table entries: COPIED, compressed, reads as zeroes, and bits that are reserved.
_FLAGS = (0, 1 << 63, 1 << 62, (1 << 63) | 1, 1, 1 << 57, 2)


def regions_of(data: bytes) -> list[Region]:
    """Return the regions of tables that lie inside the file, by its own header."""

    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length].ljust(length, b"\0") if offset < len(data) else bytes(length)

    return [region for region in metadata(read) if region.begin < len(data)]


def mutate(data: bytes, seed: int, size: int, otherwise: Callable[[bytes], bytes] | None = None) -> bytes:
    """Return *data* after one to four changes, at most *size* bytes. *otherwise* changes bytes without knowing what they are.

    The same arguments give the same result, as far as *otherwise* does.
    """
    chance = random.Random(seed)
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        kind = chance.randrange(8)
        if len(out) < 112 or (kind == 0 and otherwise is not None):
            out = bytearray(otherwise(bytes(out)) if otherwise is not None else bytes(out) + bytes(112))
        elif kind <= 2:
            _header_field(out, chance)
        elif kind <= 5:
            _table_entry(out, chance)
        elif kind == 6:
            _extension(out, chance)
        else:
            _piece(out, chance)
    return bytes(out[:size])


def edge(bits: int, chance: random.Random) -> int:
    """Return a number of so many bits that lies where mistakes are made: zero, one, a power of two and beside it, the largest."""
    power = 1 << chance.randrange(bits)
    return chance.choice((0, 1, power, power - 1, power + 1, (1 << bits) - 1)) & ((1 << bits) - 1)


def _offset(data: bytearray, chance: random.Random) -> int:
    """Return a host offset that names something: a table, a cluster, the end, or a place that no table may have."""
    regions = regions_of(bytes(data))
    cluster = 1 << min(21, max(9, int.from_bytes(data[20:24], "big")))
    places = [region.begin for region in regions] or [0]
    choices = (
        chance.choice(places),
        chance.randrange(len(data) // cluster + 2) * cluster,
        chance.randrange(len(data) + cluster),
        len(data) // cluster * cluster,
        edge(56, chance),
    )
    return chance.choice(choices)


def _header_field(out: bytearray, chance: random.Random) -> None:
    name = chance.choice(list(FIELDS)[1:])
    offset, width = FIELDS[name]
    old = int.from_bytes(out[offset : offset + width], "big")
    limit = (1 << 8 * width) - 1
    if name.endswith("offset"):
        value = _offset(out, chance)
    elif name.endswith("features"):
        value = old ^ 1 << chance.randrange(8)
    else:
        value = chance.choice((old + 1, old - 1, old * 2, chance.randrange(24), edge(8 * width, chance)))
    out[offset : offset + width] = (value & limit).to_bytes(width, "big")


def _table_entry(out: bytearray, chance: random.Random) -> None:
    regions = regions_of(bytes(out))
    if not regions:
        return
    region = chance.choice(regions)
    end = min(region.end, len(out))
    width = 2 if region.name == "refcount block" else 8
    if end - region.begin < width:
        return
    at = region.begin + chance.randrange((end - region.begin) // width) * width
    if width == 2:
        value = chance.choice((0, 1, 2, 3, 0xFFFF, chance.randrange(1 << 16)))
    elif chance.random() < 0.2:
        value = struct.unpack_from(">Q", out, at)[0] ^ 1 << chance.randrange(64)
    else:
        value = (_offset(out, chance) | chance.choice(_FLAGS)) & ((1 << 64) - 1)
    out[at : at + width] = value.to_bytes(width, "big")


def _extension(out: bytearray, chance: random.Random) -> None:
    begin = int.from_bytes(out[100:104], "big") if out[7] >= 3 else 72
    begin = begin if 72 <= begin < len(out) - 16 else 112
    at = min(begin + chance.choice((0, 0, 8, 16, 24)), len(out) - 16)
    length = chance.choice((0, 8, 24, 48, 65536, edge(32, chance)))
    out[at : at + 8] = struct.pack(">II", chance.choice(_EXTENSIONS), length)


def _piece(out: bytearray, chance: random.Random) -> None:
    """Cut the end off, or copy one piece of the image over another."""
    if chance.random() < 0.3:
        del out[max(112, chance.randrange(len(out)) // 512 * 512) :]
        return
    length = chance.choice((8, 64, 512))
    source, target = (chance.randrange(max(1, len(out) - length)) // 8 * 8 for _ in range(2))
    out[target : target + length] = out[source : source + length]
