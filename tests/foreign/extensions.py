"""Headers of drawn images: their length, their extensions in any order, the backing file's name, and bits that nobody knows.

Source: QEMU ``docs/interop/qcow2``, "Header", "Header extensions". Shares no code with the driver.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

from tests.foreign.tables import Shape

UNKNOWN_COMPATIBLE = (1 << 1, 1 << 17, 1 << 63)
UNKNOWN_AUTOCLEAR = (1 << 2, 1 << 40, 1 << 63)


def backing(rng: random.Random, folder: Path, size: int) -> tuple[bytes, str]:
    """Write a backing file, shorter or longer than the disk and not always of whole sectors; return its content and a name for it."""
    length = max(1, rng.choice((size, size // 2, size + 5000, size // 512 * 512 // 2 + 100)))
    content = rng.randbytes(min(length, 5000)) * (length // 5000 + 1)
    content = content[:length]
    (folder / "b").write_bytes(content)
    return content, rng.choice(("b", "b", "b", "./b", "./" * rng.choice((1, 5, rng.randrange(1, 511))) + "b"))


def header(rng: random.Random, shape: Shape, fields: dict[str, Any], odd: set[str]) -> bytes:
    """Return the first cluster of the image."""
    cluster = shape.cluster
    length = 72
    if shape.version > 2:
        length = 112 if shape.zstd else rng.choice((104, 104, 112, 112, 120, 144))
    base: str | None = fields["base"]
    kinds = _extensions(rng, shape, fields, odd)
    while True:
        body = b"".join(extension(rng, kind, data) for kind, data in kinds)
        closed = rng.random() < 0.95 or base is None
        if closed:
            body += struct.pack(">II", 0, 0)
        name = (base or "").encode()
        if length + len(body) + len(name) <= cluster:
            break
        droppable = [k for k in kinds if k[0] not in (0x23852875,)]
        if droppable and (len(droppable) > 1 or len(name) < 10):
            kinds.remove(rng.choice(droppable))
        elif len(name) > 1:
            base = "./" * ((len(name) - 1) // 4) + "b"
        else:
            length = 104
    at = 0
    if name:
        at = length + len(body)
        if closed:
            at = rng.choice((at, cluster - len(name), rng.randint(at, cluster - len(name))))
    out = bytearray(cluster)
    counts, view = fields["counts"], fields["l1"]
    table = fields["table"]
    struct.pack_into(
        ">4sIQIIQIIQQIIQ", out, 0, b"QFI\xfb", shape.version, at, len(name) if name else rng.choice((0, 0, 7)), shape.bits, fields["size"], 0,
        view.entries, view.part.at, counts.table.at, counts.table.clusters, len(fields["snapshots"]), table.at if table else 0,
    )  # fmt: skip
    if shape.version > 2:
        struct.pack_into(">QQQII", out, 72, *_features(rng, shape, fields, odd), shape.order, length)
        if length > 104:
            out[104] = int(shape.zstd)
        if length > 112 and rng.random() < 0.7:
            out[112:length] = rng.randbytes(length - 112)
            odd.add("tail")
    out[length : length + len(body)] = body
    out[at : at + len(name)] = name if name else out[at : at + len(name)]
    return bytes(out)


def extension(rng: random.Random, kind: int, data: bytes) -> bytes:
    """Return one extension; its padding is anything."""
    pad = -len(data) % 8
    return struct.pack(">II", kind, len(data)) + data + (bytes(pad) if rng.random() < 0.7 else rng.randbytes(pad))


def _extensions(rng: random.Random, shape: Shape, fields: dict[str, Any], odd: set[str]) -> list[tuple[int, bytes]]:
    kinds: list[tuple[int, bytes]] = []
    for _ in range(rng.choice((0, 0, 1, 2))):
        kinds.append(
            (
                rng.choice((0x12345678, 0xFFFFFFFF, 1, rng.getrandbits(32) | 2)),
                rng.randbytes(rng.choice((0, 1, 7, 8, 30))),
            )
        )
    if fields["base"] is not None:
        form = rng.choices((b"raw", b"", None, b"RAW", b"nothing", b"raw\0x"), (30, 2, 10, 1, 1, 1))[0]
        if form is not None:
            kinds.append((0xE2792ACA, form))
        if form not in (b"raw", b"", None):
            odd.add("backing format")
    elif rng.random() < 0.1:
        kinds.append((0xE2792ACA, b"raw"))
    if rng.random() < 0.4:
        kinds.append((0x6803F857, _names(rng)))
    if fields["bitmaps"] is not None:
        kinds.append((0x23852875, fields["bitmaps"].extension()))
    if shape.external:
        kinds.append((0x44415441, rng.choice((b"disk.data", b"./disk.data"))))
    rng.shuffle(kinds)
    return kinds


def _names(rng: random.Random) -> bytes:
    """Return a feature name table: names of full length, empty, of bits that do not exist, the last one cut."""
    out = b""
    for _ in range(rng.randrange(4)):
        name = rng.choice((b"dirty bit", b"", b"x" * 46, "größer".encode(), b"a\nb", b"\xff\xfe"))
        out += bytes([rng.choice((0, 1, 2, 3, 200)), rng.choice((0, 5, 63, 64, 255))]) + name.ljust(46, b"\0")
    return out[: len(out) - rng.choice((0, 0, 3, 47))] if out else out


def _features(rng: random.Random, shape: Shape, fields: dict[str, Any], odd: set[str]) -> tuple[int, int, int]:
    incompatible = 4 * shape.external | 8 * shape.zstd | 16 * shape.extended
    compatible = autoclear = 0
    if rng.random() < 0.06:
        compatible |= 1
    if rng.random() < 0.05:
        compatible |= 1
        incompatible |= 1
        odd.add("dirty")
    if rng.random() < 0.03:
        incompatible |= 2
        odd.add("corrupt")
    if rng.random() < 0.01:
        incompatible |= 1 << rng.randrange(5, 64)
        odd.add("unknown")
    if rng.random() < 0.15:
        compatible |= rng.choice(UNKNOWN_COMPATIBLE)
        odd.add("compatible")
    if rng.random() < 0.15:
        autoclear |= rng.choice(UNKNOWN_AUTOCLEAR)
        odd.add("autoclear")
    if fields["bitmaps"] is not None and rng.random() < 0.85:
        autoclear |= 1
    elif fields["bitmaps"] is not None:
        odd.add("old bitmaps")
    if fields["raw"]:
        autoclear |= 2
    return incompatible, compatible, autoclear
