"""Expandable images of Parallels: read, written and made as QEMU does; what was not closed is not written."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import ImageCorrupt
from tests.formats.contracts import MIB, QemuReads, QemuWrites, make, round_trip
from tests.tools.qemu import require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReading(QemuReads):
    driver = "parallels"
    options = "cluster_size=65536"


class TestWriting(QemuWrites):
    driver = "parallels"
    options = "cluster_size=65536"


class TestWritingLarge(QemuWrites):
    driver = "parallels"
    size = 4 * MIB


@pytest.mark.parametrize("options", ["", "cluster_size=65536"])
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int, options: str) -> None:
    round_trip(tmp_path, size, "parallels", options)


def old_image(content: bytes, tracks: int = 63) -> bytes:
    """Return an image of the first kind: words are sectors, clusters have 63 of them and lie where they like."""
    unit = tracks * 512
    count = -(-len(content) // unit)
    data = -(-(64 + 4 * count) // 512)
    words = [data + tracks * index for index in reversed(range(count))]
    header = struct.pack(
        "<16sIIIIIQIIIQ", b"WithoutFreeSpace", 2, 16, 10, tracks, count, len(content) // 512, 0, 0, 0, 0
    )
    body = b"".join(content[index * unit : (index + 1) * unit].ljust(unit, b"\0") for index in reversed(range(count)))
    return (header + struct.pack(f"<{count}I", *words)).ljust(data * 512, b"\0") + body


def test_an_image_of_the_first_kind(tmp_path: Path) -> None:
    content = bytearray(b"".join(number.to_bytes(4, "little") * 128 for number in range(1000)))
    image = tmp_path / "old.hds"
    image.write_bytes(old_image(bytes(content)))
    with cowhand.open(image, writable=True) as disk:
        assert disk.format == "parallels"
        assert disk.read(0, disk.size) == content
        disk.write(40_000, b"new" * 20_000)
        content[40_000:100_000] = b"new" * 20_000
        assert disk.read(0, disk.size) == content
    with cowhand.open(image) as disk:
        assert disk.read(0, disk.size) == content


def test_an_image_that_was_not_closed_is_only_read(tmp_path: Path) -> None:
    image = make(tmp_path, b"x" * 65536, "parallels")
    with image.open("r+b") as file:
        file.seek(44)
        file.write(struct.pack("<I", 0x746F6E59))
    with pytest.raises(ImageCorrupt, match="was not closed"):
        cowhand.open(image, writable=True)
    with cowhand.open(image) as disk:
        assert disk.read(0, 4) == b"xxxx"


def test_a_repair_says_that_the_image_was_closed(tmp_path: Path) -> None:
    image = make(tmp_path, b"x" * 65536, "parallels")
    with image.open("r+b") as file:
        file.seek(44)
        file.write(struct.pack("<I", 0x746F6E59))
    found = cowhand.check(image)
    assert found.corruptions == 1
    assert found.messages == ["ERROR image was not closed correctly"]
    assert cowhand.check(image, repair="all").clean
    with cowhand.open(image, writable=True) as disk:
        disk.write(0, b"y")
    assert cowhand.check(image).clean
