"""Compressed loop devices: read block by block; offsets and blocks that lie are refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidFormat
from cowhand.drivers import REGISTRY
from cowhand.testing.mapped import MappedContract
from tests.tools.qemu import assert_identical, require_qemu

SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


def image(content: bytes, block: int = 65536) -> bytes:
    """Return an image of *content*, which is whole blocks."""
    packed = [zlib.compress(content[at : at + block]) for at in range(0, len(content), block)]
    at = 136 + 8 * (len(packed) + 1)
    offsets = [at]
    for piece in packed:
        offsets.append(offsets[-1] + len(piece))
    head = SCRIPT.ljust(128, b"\0") + struct.pack(">II", block, len(packed))
    return head + struct.pack(f">{len(offsets)}Q", *offsets) + b"".join(packed)


def opened(data: bytes) -> Disk:
    return Disk(Opening(REGISTRY).open({"driver": "cloop", "file": MemoryNode(content=data), "read-only": True}))


class TestContract(MappedContract):
    driver = "cloop"

    def make_image(self, folder: Path, content: bytes) -> Path:
        path = folder / "disk.cloop"
        path.write_bytes(image(content))
        return path

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        return [(128, 136), (136, 136 + 72), (0, image.stat().st_size)]


@require_qemu
@pytest.mark.interop
def test_qemu_reads_the_same(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1024
    (tmp_path / "a.cloop").write_bytes(image(content, 4096))
    (tmp_path / "a.raw").write_bytes(content)
    assert_identical(tmp_path / "a.cloop", "cloop", tmp_path / "a.raw", "raw")
    with Disk(Opening(REGISTRY).open(str(tmp_path / "a.cloop"), options={"read-only": True})) as disk:
        assert disk.format == "cloop"
        assert disk.read(0, disk.size) == content


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (128, 513, "block_size 513 must be a multiple of 512"),
        (128, 0, "block_size cannot be zero"),
        (128, 128 << 20, "block_size 134217728 must be 64 MB or less"),
        (132, 0xFFFFFFFF, "n_blocks 4294967295 must be 536870911 or less"),
        (132, 0x1FFFFFFF, "image requires too many offsets, try increasing block size"),
        (132, 0x00FFFFFF, "does not end inside the file"),
        (144, 0, "invalid compressed block size at index 1, image file is corrupt"),
        (148, 0, "offsets not monotonically increasing at index 1, image file is corrupt"),
    ],
)
def test_headers_that_lie(at: int, value: int, words: str) -> None:
    data = bytearray(image(bytes(range(256)) * 1024))
    struct.pack_into(">I", data, at, value if at != 144 else 0x10000000)
    with pytest.raises(InvalidFormat) as caught:
        opened(bytes(data))
    assert words in caught.value.qemu()


def test_a_block_that_holds_more_or_less_than_it_says() -> None:
    bomb = zlib.compress(b"a" * (16 << 20))
    for block, expected in ((512, b"a" * 512), (32 << 20, None)):
        head = SCRIPT.ljust(128, b"\0") + struct.pack(">II", block, 1) + struct.pack(">QQ", 152, 152 + len(bomb))
        with opened(head + bomb) as disk:
            if expected is not None:
                assert disk.read(0, 512) == expected  # no more than this is unpacked
            else:
                with pytest.raises(InvalidFormat, match="16777216 bytes"):
                    disk.read(0, 512)
