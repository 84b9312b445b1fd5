"""Growing images of Bochs: what QEMU reads of them is read, and headers and catalogs that lie are refused, with the place."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import AccessDenied, CowhandError, InvalidFormat
from cowhand.core.extents import DATA, ZERO
from cowhand.drivers import REGISTRY
from cowhand.testing.mapped import MappedContract
from tests.tools.qemu import assert_identical, require_qemu

SECTOR = 512


def image(
    size: int, extent: int, seed: int, *, version: int = 0x20000, bitmap: int | None = None
) -> tuple[bytes, bytes]:
    """Return (file, disk): an image with about half of its extents, and half of their sectors; the extents lie in any order."""
    rng = random.Random(seed)
    count = -(-size // extent)
    sectors = extent // SECTOR
    bitmap = -(-sectors // 8) if bitmap is None else bitmap
    disk, catalog, body = bytearray(count * extent), [0xFFFFFFFF] * count, b""
    wanted = [index for index in range(count) if rng.random() < 0.5]
    rng.shuffle(wanted)
    for number, index in enumerate(wanted):
        catalog[index] = number
        bits, content = bytearray(-(-bitmap // SECTOR) * SECTOR), bytearray(rng.randbytes(extent))
        for sector in range(sectors):
            if rng.random() < 0.5:
                bits[sector // 8] |= 1 << sector % 8
                at = sector * SECTOR
                disk[index * extent + at : index * extent + at + SECTOR] = content[at : at + SECTOR]
        body += bits + content
    head = struct.pack(
        "<32s16s16s5I", b"Bochs Virtual HD Image", b"Redolog", b"Growing", version, 512, count, bitmap, extent
    )
    head += struct.pack("<IQ", 0, size) if version == 0x20000 else struct.pack("<Q", size)
    return head.ljust(512, b"\0") + struct.pack(f"<{count}I", *catalog) + body, bytes(disk[:size])


class TestContract(MappedContract):
    driver = "bochs"

    def make_image(self, folder: Path, content: bytes) -> Path:
        path = folder / "disk.bochs"
        path.write_bytes(stored(content, 65536))
        return path


def stored(content: bytes, extent: int) -> bytes:
    """Return an image of *content* that stores every sector which is not all zeroes, the extents in reverse order."""
    count, catalog, body = -(-len(content) // extent), [], b""
    for index in reversed(range(count)):
        part = content[index * extent : (index + 1) * extent].ljust(extent, b"\0")
        bits = bytearray(512)
        for sector in range(extent // SECTOR):
            if any(part[sector * SECTOR : (sector + 1) * SECTOR]):
                bits[sector // 8] |= 1 << sector % 8
        catalog.append(count - 1 - index)
        body += bits + part
    fields = (b"Bochs Virtual HD Image", b"Redolog", b"Growing", 0x20000, 512, count, 512, extent, 0, len(content))
    head = struct.pack("<32s16s16s5IIQ", *fields).ljust(512, b"\0")
    return head + struct.pack(f"<{count}I", *reversed(catalog)) + body


def opened(data: bytes, **options: object) -> Disk:
    file = MemoryNode(content=data)
    return Disk(Opening(REGISTRY).open({"driver": "bochs", "file": file, "read-only": True, **options}))


SHAPES = [
    (40 * 512, 512, 0x20000),
    (1 << 20, 4096, 0x20000),
    ((1 << 20) - 512, 65536, 0x10000),
    (3 << 20, 1 << 20, 0x20000),
]


@pytest.mark.parametrize(("size", "extent", "version"), SHAPES)
def test_content_in_any_pieces(size: int, extent: int, version: int) -> None:
    data, expected = image(size, extent, seed=extent, version=version)
    rng = random.Random(1)
    with opened(data) as disk:
        assert disk.size == size
        assert disk.read(0, size) == expected
        for _ in range(50):
            offset = rng.randrange(size)
            length = rng.randrange(min(size - offset, 3 * extent) + 1)
            assert disk.read(offset, length) == expected[offset : offset + length]


@pytest.mark.parametrize(("size", "extent", "version"), SHAPES)
def test_the_map_tells_what_is_stored(size: int, extent: int, version: int) -> None:
    data, expected = image(size, extent, seed=extent, version=version)
    with opened(data) as disk:
        position = 0
        while position < size:
            for row in disk.root.map_batch(position, size - position):
                assert row.start == position and row.length > 0
                if row.flags & DATA:
                    assert data[row.host : row.host + row.length] == expected[position : position + row.length]
                else:
                    assert row.flags & ZERO and not any(expected[position : position + row.length])
                position += row.length
        assert position == size


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize(("size", "extent", "version"), SHAPES)
def test_qemu_reads_the_same(size: int, extent: int, version: int, tmp_path: Path) -> None:
    data, expected = image(size, extent, seed=extent, version=version, bitmap=max(512, extent // 4096))
    path, raw = tmp_path / "disk.bochs", tmp_path / "disk.raw"
    path.write_bytes(data)
    raw.write_bytes(expected)
    assert_identical(path, "bochs", raw, "raw")
    with cowhand.open(path) as disk:
        assert disk.root.driver == "bochs"
        assert disk.read(0, size) == expected


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (72, 0xFFFFFFFF, "Catalog size is too large"),
        (72, 3, "Catalog size is too small for this disk size"),
        (80, 0, "Extent size must be at least 512"),
        (80, 0x80000000, "Extent size 2147483648 is too large"),
        (80, 4097, "Extent size 4097 is not a power of two"),
        (92, 0x7F000000, "Catalog size is too small for this disk size"),
        (64, 0x30000, "Image not in Bochs format"),
        (76, 0, "bitmaps of 0 bytes for 8 sectors"),
        (68, 0xFFFFFF00, "behind the end of the file"),
    ],
)
def test_headers_that_lie(at: int, value: int, words: str) -> None:
    data = bytearray(image(1 << 20, 4096, seed=3)[0])
    struct.pack_into("<I", data, at, value)
    with pytest.raises(InvalidFormat) as caught:
        opened(bytes(data))
    assert words in caught.value.qemu()


def test_extents_behind_the_end_of_the_file() -> None:
    data = bytearray(image(1 << 20, 4096, seed=3)[0])
    struct.pack_into("<2I", data, 512, 0xFFFFFFF0, 0xFFFFFFFF)
    with opened(bytes(data)) as disk:
        with pytest.raises(InvalidFormat, match="extent 0 of the disk lies at"):
            disk.read(0, 512)
        assert disk.read(4096, 4096) == bytes(4096)
    cut = image(1 << 20, 65536, seed=9)[0][:-65536]  # of the last extent only the bitmap is left
    with opened(cut) as disk, pytest.raises(InvalidFormat, match="behind the end of the file"):
        disk.read(0, 1 << 20)


def test_anything_else_is_an_error_of_ours() -> None:
    rng = random.Random(7)
    good = image(64 << 10, 4096, seed=5)[0]
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(600)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        try:
            with opened(bytes(data[: rng.choice((len(data), 600))])) as disk:
                length = min(disk.size, 64 << 10)
                assert len(disk.read(0, length)) == length
        except CowhandError:
            refused += 1
    assert 20 < refused < 300


def test_it_cannot_be_written() -> None:
    with pytest.raises(AccessDenied, match="can only be read"):
        opened(image(1 << 20, 4096, seed=3)[0], **{"read-only": False})


def test_long_runs_of_sectors_are_told_without_looking_at_each() -> None:
    extent, count = 8 << 20, 4096
    sectors = extent // SECTOR
    bits = bytearray(sectors // 8)
    bits[100:600] = b"\xff" * 500
    bits[99], bits[600], bits[-1] = 0xF0, 0x07, 0x80
    head = struct.pack(
        "<32s16s16s5I", b"Bochs Virtual HD Image", b"Redolog", b"Growing", 0x20000, 512, count, sectors // 8, extent
    ) + struct.pack("<IQ", 0, count * extent)
    data = head.ljust(512, b"\0") + bytes(4 * count) + bits + bytes(extent)  # all extents are one
    stored = (600 * 8 + 3 - 99 * 8 - 4, 1)
    began = time.process_time()
    with opened(data) as disk:
        rows = [row for batch in disk.extents() for row in batch if row.flags & DATA]
    assert time.process_time() - began < 9  # sector by sector it takes thirty: three times what it took here
    assert [(row.start, row.length) for row in rows[:2]] == [
        ((99 * 8 + 4) * SECTOR, stored[0] * SECTOR),
        (extent - SECTOR, SECTOR),
    ]
    assert sum(row.length for row in rows) == count * sum(stored) * SECTOR
