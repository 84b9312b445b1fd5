"""QEMU's enhanced disks: read, written and made as QEMU does, over backing files; images that were not closed are looked through."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import ImageCorrupt
from tests.formats.contracts import MIB, QemuReads, make, round_trip
from tests.formats.overlays import QemuOverlays
from tests.tools.qemu import assert_clean, qemu_img, qemu_info, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReading(QemuReads):
    driver = "qed"

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        return [(0, 64), (65536, 65536 + 256), (6 * 65536, 6 * 65536 + 256)]


class TestReadingSmall(QemuReads):
    driver = "qed"
    options = "cluster_size=4096,table_size=2"


class TestWriting(QemuOverlays):
    driver = "qed"


class TestWritingSmall(QemuOverlays):
    driver = "qed"
    options = "cluster_size=4096,table_size=2"


@pytest.mark.parametrize("options", ["", "cluster_size=4096,table_size=2", "cluster_size=1048576,table_size=16"])
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int, options: str) -> None:
    round_trip(tmp_path, size, "qed", options)


def test_a_backing_file_of_either_maker(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1024
    (tmp_path / "base.raw").write_bytes(content)
    for name in ("ours", "theirs"):
        image = tmp_path / f"{name}.qed"
        if name == "ours":
            cowhand.create(image, "qed", 512 << 10, backing="base.raw", backing_format="raw")
        else:
            qemu_img("create", "-f", "qed", "-b", "base.raw", "-F", "raw", image, "512k")
        with cowhand.open(image, writable=True) as disk:
            assert disk.read(0, len(content)) == content
            disk.write(1000, b"new")
            disk.write_zeroes(65536, 65536)
        expected = bytearray(content + bytes(512 * 1024 - len(content)))
        expected[1000:1003], expected[65536:131072] = b"new", bytes(65536)
        qemu_img("convert", "-f", "qed", "-O", "raw", image, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == expected
        assert_clean(image, "qed")


def test_an_image_that_was_not_closed_is_looked_through_before_it_is_written(tmp_path: Path) -> None:
    image = make(tmp_path, b"x" * 65536 * 3, "qed")
    with image.open("r+b") as file:
        file.seek(16)
        file.write(struct.pack("<Q", 2))
    with cowhand.open(image, writable=True) as disk:
        disk.write(0, b"y")
    assert image.read_bytes()[16:24] == bytes(8)
    assert_clean(image, "qed")
    qemu_io(image, "read -P 0x78 1 1023", format="qed")
    data = bytearray(image.read_bytes())
    table = struct.unpack_from("<Q", data, 65536)[0]
    data[16], data[table + 8 : table + 16] = 2, data[table : table + 8]
    image.write_bytes(data)
    with cowhand.open(image, writable=True) as disk, pytest.raises(ImageCorrupt, match="used twice"):
        disk.write(0, b"z")


def test_another_backing_file_and_a_larger_disk(tmp_path: Path) -> None:
    for name, byte in (("one.raw", b"1"), ("two.raw", b"2")):
        (tmp_path / name).write_bytes(byte * (1 << 20))
    image = tmp_path / "top.qed"
    cowhand.create(image, "qed", 65536, backing="one.raw", backing_format="raw")
    for name in ("two.raw", "one.raw", "two.raw"):
        cowhand.rebase(image, name, backing_format="raw", unsafe=True)
        assert Path(qemu_info(image, "qed")["backing-filename"]).name == name
        with cowhand.open(image) as disk:
            assert disk.read(0, 1) == name[:1].replace("o", "1").replace("t", "2").encode()
    with cowhand.open(image, writable=True) as disk:
        disk.resize(40 << 20)
        assert disk.read(65536, 1 << 20) == bytes(1 << 20)
        disk.write((40 << 20) - 512, b"e" * 512)
    qemu_io(image, "read -P 0x32 0 64k", "read -P 0 64k 1M", "read -P 0x65 41942528 512", format="qed")
    assert_clean(image, "qed")
