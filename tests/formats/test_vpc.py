"""Virtual hard disks (VHD): fixed and dynamic ones are read, written and made as QEMU does."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand
from cowhand.block.formats.vpc import geometry
from tests.formats.contracts import MIB, QemuReads, QemuWrites, make, round_trip
from tests.tools.qemu import qemu_img, qemu_info, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReadingDynamic(QemuReads):
    driver = "vpc"
    options = "force_size=on"
    size = 7 * MIB + 65536


class TestReadingFixed(QemuReads):
    driver = "vpc"
    options = "subformat=fixed,force_size=on"

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        size = image.stat().st_size
        return [(size - 512, size)]


class TestWritingDynamic(QemuWrites):
    driver = "vpc"
    options = "force_size=on"
    size = 5 * MIB


class TestWritingFixed(QemuWrites):
    driver = "vpc"
    options = "subformat=fixed,force_size=on"


@pytest.mark.parametrize("options", ["", "subformat=fixed", "force_size=on", "subformat=fixed,force_size=on"])
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int, options: str) -> None:
    round_trip(tmp_path, size, "vpc", options)


@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 30) + 512, 100 << 30, 127 << 30, 600 << 30, 2040 << 30])
def test_a_new_image_has_the_size_that_qemu_gives_it(tmp_path: Path, size: int) -> None:
    ours, theirs = tmp_path / "ours.vhd", tmp_path / "theirs.vhd"
    cowhand.create(ours, "vpc", size)
    qemu_img("create", "-f", "vpc", theirs, str(size))
    assert qemu_info(ours, "vpc")["virtual-size"] == qemu_info(theirs, "vpc")["virtual-size"]
    with cowhand.open(theirs, format="vpc") as disk:
        assert disk.size == qemu_info(theirs, "vpc")["virtual-size"]


def test_the_geometry_is_that_of_the_specification() -> None:
    assert geometry(20480) == (301, 4, 17)
    assert geometry(65535 * 16 * 255 + 5) == (65535, 16, 255)


def test_a_write_marks_sectors_of_a_block_as_written(tmp_path: Path) -> None:
    image = make(tmp_path, b"x" * 4096 + bytes(2 * MIB), "vpc", "force_size=on")
    data = bytearray(image.read_bytes())
    bitmap = data.index(b"x" * 512) - 512
    data[bitmap : bitmap + 512] = b"\xff".ljust(512, b"\0")  # as Hyper-V: only the sectors that were written
    image.write_bytes(data)
    with cowhand.open(image, format="vpc", writable=True) as disk:
        disk.write(65536, b"y" * 512)
        assert disk.read(0, 4096) == b"x" * 4096
    assert image.read_bytes()[bitmap : bitmap + 512] == b"\xff" * 512
