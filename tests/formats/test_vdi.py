"""VirtualBox's disk images: read, written and made as QEMU does."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand
from tests.formats.contracts import MIB, QemuReads, QemuWrites, make, round_trip
from tests.tools.qemu import require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReading(QemuReads):
    driver = "vdi"
    size = 5 * MIB + 65536


class TestReadingStatic(QemuReads):
    driver = "vdi"
    options = "static=on"


class TestWriting(QemuWrites):
    driver = "vdi"
    size = 4 * MIB


@pytest.mark.parametrize("options", ["", "static=on"])
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int, options: str) -> None:
    round_trip(tmp_path, size, "vdi", options)


def test_a_check_finds_blocks_that_are_used_twice_or_lie_outside(tmp_path: Path) -> None:
    image = make(tmp_path, b"x" * (3 * MIB), "vdi")
    clean = cowhand.check(image)
    assert clean.clean
    assert (clean.total_clusters, clean.allocated_clusters) == (3, 3)
    data = bytearray(image.read_bytes())
    data[512:520] = (2).to_bytes(4, "little") + (77).to_bytes(4, "little")
    image.write_bytes(data)
    found = cowhand.check(image)
    assert found.corruptions == 2
    assert [finding.kind.name for finding in found.findings] == ["block-outside-file", "block-used-twice"]
