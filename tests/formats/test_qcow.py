"""Images of qcow, version 1: read, compressed clusters too, written and made as QEMU does, over backing files."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand
from tests.formats.contracts import MIB, QemuReads, round_trip
from tests.formats.overlays import QemuOverlays
from tests.tools.qemu import qemu_img, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReading(QemuReads):
    driver = "qcow"


class TestReadingCompressed(QemuReads):
    driver = "qcow"
    extra = ("-c",)

    def content(self) -> bytes:
        return b"".join(bytes([number % 251, number % 7]) * 256 for number in range(self.size // 512))


class TestWriting(QemuOverlays):
    driver = "qcow"


@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int) -> None:
    round_trip(tmp_path, size, "qcow")


def test_a_backing_file_of_either_maker(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1024
    (tmp_path / "base.raw").write_bytes(content)
    for name in ("ours", "theirs"):
        image = tmp_path / f"{name}.qcow"
        if name == "ours":
            cowhand.create(image, "qcow", 512 << 10, backing="base.raw", backing_format="raw")
        else:
            qemu_img("create", "-f", "qcow", "-b", "base.raw", "-F", "raw", image, "512k")
        with cowhand.open(image, writable=True) as disk:
            assert disk.read(0, len(content)) == content
            disk.write(1000, b"new")
            disk.write_zeroes(65536, 65536)
        expected = bytearray(content + bytes(512 * 1024 - len(content)))
        expected[1000:1003], expected[65536:131072] = b"new", bytes(65536)
        qemu_img("convert", "-f", "qcow", "-O", "raw", image, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == expected
