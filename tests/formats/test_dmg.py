"""Apple's disk images: chunks of every kind are read; tables that lie and chunks that hold more than they say are refused."""

from __future__ import annotations

import base64
import bz2
import importlib.util
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.dmg import codecs
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError, InvalidFormat, NotSupported
from cowhand.drivers import REGISTRY
from cowhand.testing.mapped import MappedContract

SECTOR = 512
Chunk = tuple[int, int, int, bytes]  # kind, first sector, sectors, stored


def pack_adc(data: bytes) -> bytes:
    """Return *data* in Apple's Data Compression: literal bytes, but for runs of one byte."""
    out, at = bytearray(), 0
    while at < len(data):
        run = 1
        while at + run < len(data) and data[at + run] == data[at] and run < 60:
            run += 1
        if run > 8:
            out += bytes([0x80, data[at]])
            out += bytes([0x40 | (run - 1 - 4), 0, 0]) if run % 2 else bytes([(10 - 3) << 2, 0])
            at += run if run % 2 else 11
        else:
            piece = data[at : at + 3]
            out += bytes([0x80 | (len(piece) - 1)]) + piece
            at += len(piece)
    return bytes(out)


PACKERS: dict[int, Callable[[bytes], bytes]] = {
    codecs.RAW: bytes,
    codecs.ADC: pack_adc,
    codecs.ZLIB: zlib.compress,
    codecs.BZIP2: bz2.compress,
    codecs.LZMA: lzma.compress,
}


def image(chunks: list[Chunk], *, fork: bool = False, parts: int = 2) -> bytes:
    """Return an image of *chunks*, its tables in a property list or in a resource *fork*."""
    data, tables = bytearray(), []
    for part in range(parts):
        mine = chunks[part::parts]
        first = min((chunk[1] for chunk in mine), default=0)
        rows = b""
        for kind, start, count, stored in mine:
            rows += struct.pack(">IIQQQQ", kind, 0, start - first, count, len(data), len(stored))
            data += stored
        rows += struct.pack(">IIQQQQ", 0xFFFFFFFF, 0, 0, 0, 0, 0)
        head = struct.pack(">4sIQQQII", b"mish", 1, first, sum(chunk[2] for chunk in mine), 0, 0, 0)
        tables.append(head.ljust(200, b"\0") + struct.pack(">I", len(rows) // 40) + rows)
    koly = bytearray(SECTOR)
    koly[:4] = b"koly"
    if fork:
        body = b"".join(len(table).to_bytes(4, "big") + table for table in tables)
        text = struct.pack(">IIII", 16, 16 + len(body), len(body), 0) + body
        struct.pack_into(">QQQQ", koly, 24, 0, len(data), len(data), len(text))
    else:
        items = b"".join(
            b"<dict><key>Data</key>\n<data>\n" + base64.encodebytes(table) + b"</data></dict>" for table in tables
        )
        text = b'<?xml version="1.0"?><plist><dict><key>blkx</key><array>' + items + b"</array></dict></plist>"
        struct.pack_into(">QQQQ", koly, 24, 0, len(data), 0, 0)
        struct.pack_into(">QQ", koly, 216, len(data), len(text))
    return bytes(data + text + koly)


def chunks_of(content: bytes, sectors: int = 64) -> list[Chunk]:
    """Return *content* in chunks of every kind."""
    kinds, out = list(PACKERS), []
    for number, at in enumerate(range(0, len(content), sectors * SECTOR)):
        piece = content[at : at + sectors * SECTOR]
        kind = kinds[number % len(kinds)] if any(piece) else (codecs.ZEROES, codecs.IGNORED)[number % 2]
        out.append((kind, at // SECTOR, len(piece) // SECTOR, PACKERS[kind](piece) if any(piece) else b""))
    return out


def opened(data: bytes) -> Disk:
    return Disk(Opening(REGISTRY).open({"driver": "dmg", "file": MemoryNode(content=data), "read-only": True}))


class TestContract(MappedContract):
    driver = "dmg"

    def make_image(self, folder: Path, content: bytes) -> Path:
        path = folder / "disk.dmg"
        path.write_bytes(image(chunks_of(content)))
        return path

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        size = image.stat().st_size
        return [(size - 512, size), (size - 4096, size), (0, size)]


@pytest.mark.parametrize("fork", [False, True])
def test_chunks_of_every_kind(fork: bool) -> None:
    content = b"".join(bytes([number % 256]) * 300 + number.to_bytes(212, "little") for number in range(1000))
    chunks = chunks_of(content)
    assert {chunk[0] for chunk in chunks} == set(PACKERS)
    with opened(image(chunks[::-1], fork=fork)) as disk:
        assert disk.read(0, disk.size) == content


def test_what_no_chunk_tells_of_reads_as_zeroes() -> None:
    with opened(image([(codecs.RAW, 10, 2, b"x" * 1024)], parts=1)) as disk:
        assert disk.read(0, disk.size) == bytes(5120) + b"x" * 1024


@pytest.mark.parametrize("kind", [codecs.ADC, codecs.ZLIB, codecs.BZIP2, codecs.LZMA])
def test_a_chunk_that_holds_more_or_less_than_it_says(kind: int) -> None:
    bomb = PACKERS[kind](b"a" * (8 << 20 if kind != codecs.ADC else 1 << 16))
    with opened(image([(kind, 0, 2, bomb)], parts=1)) as disk:
        assert disk.read(0, 1024) == b"a" * 1024  # no more than this is unpacked
    with (
        opened(image([(kind, 0, 200, PACKERS[kind](b"a" * 512))], parts=1)) as disk,
        pytest.raises(InvalidFormat, match="holds 512 bytes"),
    ):
        disk.read(0, 512)
    with opened(image([(kind, 0, 2, b"\x40\xff\xff" * 20)], parts=1)) as disk, pytest.raises(InvalidFormat):
        disk.read(0, 512)


def test_lzfse_without_a_library_says_so() -> None:
    stored = b"bvx-" + (512).to_bytes(4, "little") + b"y" * 512 + b"bvx$"
    assert codecs.lzfse_size(stored) == 512
    with opened(image([(codecs.LZFSE, 0, 1, stored)], parts=1)) as disk:
        if importlib.util.find_spec("liblzfse") is None:
            with pytest.raises(NotSupported, match="pyliblzfse"):
                disk.read(0, 512)
        else:
            assert disk.read(0, 512) == b"y" * 512
    for bad in (b"bvx?", b"bvx-\xff\xff", b"bvx2" + bytes(28), b""):
        with pytest.raises(codecs.Damaged):
            codecs.lzfse_size(bad)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ((codecs.ZLIB, 0, (64 << 20) // 512 + 1, b""), "sector count 131073 for chunk 0 is larger than max"),
        ((codecs.RAW, 1 << 55, 1, bytes(512)), "ends at sector"),
        ((codecs.RAW, 0, 100, bytes(512)), "is stored in 512 bytes"),
        ((0x80000099, 0, 1, b""), "method 0x80000099"),
    ],
)
def test_chunks_that_cannot_be(chunk: Chunk, words: str) -> None:
    with pytest.raises(CowhandError, match=words):
        opened(image([chunk], parts=1))
