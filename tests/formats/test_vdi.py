"""VirtualBox's disk images: read, written and made as QEMU does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.contracts import MIB, QemuReads, QemuWrites, round_trip
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
