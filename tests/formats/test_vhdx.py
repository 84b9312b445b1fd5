"""Hyper-V's virtual hard disks: read, written and made as QEMU does; a log is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.vhdx.layout import crc32c
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import IOFailed
from cowhand.drivers import REGISTRY
from cowhand.testing.faults import FaultNode
from tests.formats.contracts import MIB, QemuReads, QemuWrites, make, round_trip
from tests.tools.qemu import assert_identical, qemu_img, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReading(QemuReads):
    driver = "vhdx"
    options = "block_size=1M"
    size = 5 * MIB + 65536

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        begins = (0, 64 << 10, 128 << 10, 192 << 10, 256 << 10, 2 * MIB, 2 * MIB + 65536, 3 * MIB)
        return [(begin, begin + 256) for begin in begins]

    def test_the_map_is_that_of_qemu(self, tmp_path: Path) -> None:
        pytest.skip("QEMU does not tell what a VHDX stores")


class TestWriting(QemuWrites):
    driver = "vhdx"
    options = "block_size=1M"
    size = 4 * MIB


class TestWritingLargeBlocks(QemuWrites):
    driver = "vhdx"


@pytest.mark.parametrize("options", ["", "subformat=fixed", "block_size=1M,log_size=2M"])
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int, options: str) -> None:
    round_trip(tmp_path, size, "vhdx", options)


def test_the_checksum_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def opened(node: Any, *, writable: bool) -> Disk:
    what = {"driver": "vhdx", "file": node, "read-only": not writable}
    return Disk(Opening(REGISTRY).open(what), writable=writable)


def test_a_log_is_replayed_in_memory_and_in_the_file(tmp_path: Path) -> None:
    image = make(tmp_path, bytes(4 * MIB), "vhdx", "block_size=1M")
    memory = MemoryNode(content=image.read_bytes())
    fault = FaultNode(memory)
    disk = opened(fault, writable=True)
    disk.write(MIB + 5, b"logged")
    disk.root.event_sink = None
    # The entry is in the log and stable; writing it to the table fails.
    fault.fail("write", 2, 5)
    with pytest.raises(IOFailed):
        disk.flush()
    state = _content(memory)
    with opened(MemoryNode(content=state), writable=False) as again:
        assert again.read(MIB, 20) == b"\0" * 5 + b"logged" + bytes(9)
    crashed = tmp_path / "crashed.vhdx"
    crashed.write_bytes(state)
    qemu_img("check", "-r", "all", "-f", "vhdx", crashed)
    with cowhand.open(crashed) as theirs:
        assert theirs.read(MIB + 5, 6) == b"logged"
    crashed.write_bytes(state)
    with cowhand.open(crashed, writable=True) as ours:
        ours.write(0, b"x" * 512)
    raw = tmp_path / "expected.raw"
    raw.write_bytes(b"x" * 512 + bytes(MIB + 5 - 512) + b"logged" + bytes(3 * MIB - 11))
    assert_identical(crashed, "vhdx", raw, "raw")


def _content(memory: MemoryNode) -> bytes:
    buffer = bytearray(memory.size)
    memory.read_into(0, buffer)
    return bytes(buffer)
