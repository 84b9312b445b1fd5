"""``detect-zeroes`` of nodes that do not allocate: raw images, filters, protocols."""

from __future__ import annotations

import pytest

from cowhand.block.disk import Disk
from cowhand.block.node.node import WRITE_REQUEST, BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidArgument
from cowhand.drivers import REGISTRY
from cowhand.testing.recorder import RecorderNode


def over(inner: BlockNode, driver: str, **options: str) -> Disk:
    name = "image" if driver == "blkdebug" else "file"
    root = Opening(REGISTRY).open({"driver": driver, name: inner, "read-only": False, **options})
    return Disk(root, writable=True)


def changes(recorder: RecorderNode) -> list[tuple[str, int, int]]:
    return [(change.kind, change.offset, change.length) for change in recorder.log.changes]


@pytest.mark.parametrize("driver", ["raw", "blkdebug", "copy-on-read", "preallocate"])
def test_written_zeroes_arrive_as_zeroes(driver: str) -> None:
    recorder = RecorderNode(MemoryNode(content=b"x" * 65536))
    with over(recorder, driver, **{"detect-zeroes": "on"}) as disk:
        disk.write(0, bytes(4096))
        disk.write(4096, bytes(100), b"a" + bytes(99))
        disk.write(8192, bytes(100), bytes(100), fua=True)
        disk.write(12288, b"")
        disk.submit([(WRITE_REQUEST, 16384, bytes(512)), (WRITE_REQUEST, 20480, b"b" * 512)])
        assert disk.read(0, 8192) == bytes(4096) + bytes(100) + b"a" + bytes(99) + b"x" * 3896
        assert disk.read(16384, 513) + disk.read(20480, 512) == bytes(512) + b"x" + b"b" * 512
    assert [change for change in changes(recorder) if change[2]] == [
        ("zero", 0, 4096), ("write", 4096, 200), ("zero", 8192, 200), ("zero", 16384, 512), ("write", 20480, 512),
    ]  # fmt: skip


def test_without_the_option_zeroes_are_written() -> None:
    recorder = RecorderNode(MemoryNode(content=b"x" * 65536))
    with over(recorder, "raw") as disk:
        disk.write(0, bytes(4096))
    assert changes(recorder) == [("write", 0, 4096)]


def test_unmapping_needs_discards_to_be_handed_down() -> None:
    with pytest.raises(InvalidArgument, match="setting detect-zeroes to unmap is not allowed without"):
        over(MemoryNode(content=bytes(4096)), "raw", **{"detect-zeroes": "unmap"})
    with over(MemoryNode(content=bytes(4096)), "raw", **{"detect-zeroes": "unmap", "discard": "unmap"}) as disk:
        disk.write(0, bytes(4096))
