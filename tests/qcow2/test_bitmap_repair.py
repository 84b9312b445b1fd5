"""Broken bitmap directories: a check counts what it can follow, a repair keeps what is sound, QEMU opens the result, no crash makes it worse."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.records import CheckResult
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY
from cowhand.image import bitmaps
from cowhand.image.check import check, check_node
from cowhand.testing import replay
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images
from tests.qcow2.images import Shape
from tests.tools.qemu import assert_clean, qemu_info, require_qemu

NAMES = ("first", "wrong", "third")


def make(shape: Shape) -> bytearray:
    """Return an image with three bitmaps, each with a cluster of its own, and some data."""
    node = images.create(shape, b"d" * 3000)
    keeper = Disk(node)
    with images.open_over(node, writable=True) as disk:
        for name in reversed(NAMES):  # the last one comes first in the directory
            bitmaps.add_bitmap(disk, name, granularity=512)
        disk.write(512, b"x" * 512)
    data = bytearray(node.snapshot_bytes())
    keeper.close()
    return data


def extension(data: bytearray) -> int:
    """Return where the bitmaps extension's 24 bytes lie."""
    return data.index(struct.pack(">I", 0x23852875)) + 8


def second(data: bytearray) -> int:
    """Return where the second entry of the directory lies."""
    place = struct.unpack_from(">Q", data, extension(data) + 16)[0]
    return place + 24 + -(-len(NAMES[0]) // 8) * 8


def table(data: bytearray) -> int:
    offset: int = struct.unpack_from(">Q", data, second(data))[0]
    return offset


def put(data: bytearray, at: int, form: str, *values: int) -> None:
    struct.pack_into(form, data, at, *values)


DAMAGE = {
    "table not aligned": lambda data: put(data, second(data), ">Q", 513),
    "table at 0": lambda data: put(data, second(data), ">Q", 0),
    "table behind the end": lambda data: put(data, second(data), ">Q", 1 << 50),
    "table too long": lambda data: put(data, second(data) + 8, ">I", 0x7FFFFFFF),
    "table of another length": lambda data: put(data, second(data) + 8, ">I", 2),
    "reserved flags": lambda data: put(data, second(data) + 12, ">I", 0x82),
    "type": lambda data: put(data, second(data) + 16, "B", 2),
    "granularity 0": lambda data: put(data, second(data) + 17, "B", 0),
    "granularity 63": lambda data: put(data, second(data) + 17, "B", 63),
    "same name": lambda data: data.__setitem__(slice(second(data) + 24, second(data) + 29), b"first"),
    "entry of the table": lambda data: put(data, table(data), ">Q", 1 << 60 | 1),
    "cluster behind the end": lambda data: put(data, table(data), ">Q", 1 << 40),
}
#: What hides bitmaps: (damage, how many are left).
HIDING = {
    "longer than the directory": (lambda data: put(data, second(data) + 18, ">H", 60000), 1),
    "extra data too long": (lambda data: put(data, second(data) + 20, ">I", 1 << 31), 1),
    "count too high": (lambda data: put(data, extension(data), ">I", 4), 3),
    "count too low": (lambda data: put(data, extension(data), ">I", 2), 2),
    "count 0": (lambda data: put(data, extension(data), ">I", 0), 0),
    "reserved field": (lambda data: put(data, extension(data) + 4, ">I", 1), 0),
    "directory too long": (lambda data: put(data, extension(data) + 8, ">Q", 1 << 40), 0),
    "directory not aligned": (lambda data: put(data, extension(data) + 16, ">Q", 520), 0),
    "directory behind the end": (lambda data: put(data, extension(data) + 16, ">Q", 1 << 40), 0),
}


def mended(file: MemoryNode | RecorderNode, repair: str | None = "all") -> CheckResult:
    opening = Opening(REGISTRY)
    opening.for_repair = True
    root = opening.open({"driver": "qcow2", "file": file, "read-only": repair is None})
    with Disk(root, writable=repair is not None) as disk:
        return check_node(disk.root, repair=repair)


def names_of(file: MemoryNode) -> list[str]:
    with images.open_over(file) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node) and not node.bitmap_directory.broken, node.bitmap_directory.problems
        for bitmap in bitmaps.list_bitmaps(disk):
            assert list(bitmap.bits.extents()) == [(512, 512)]
        return [bitmap.name for bitmap in bitmaps.list_bitmaps(disk)]


@require_qemu
@pytest.mark.parametrize("damage", [*DAMAGE, *HIDING])
def test_a_repair_keeps_what_is_sound(damage: str, tmp_path: Path) -> None:
    data = make(Shape())
    spoil, left = HIDING[damage] if damage in HIDING else (DAMAGE[damage], 2)
    spoil(data)
    file = MemoryNode(content=bytes(data))
    keeper = Disk(file)
    assert mended(file, None).exit_code == 2
    # Leaks alone: nothing that may be a bitmap's is given back.
    before = mended(file, "leaks")
    assert before.exit_code == 2 and (damage not in HIDING or not before.leaks_fixed)
    result = mended(file)
    assert result.clean and result.corruptions_fixed >= 1, result.messages
    if left:
        assert f"The bitmap directory has {left} bitmaps now" in result.messages
    expected = [name for name in NAMES if damage in HIDING or name != "wrong"]
    assert names_of(file) == (expected[:left] if damage in HIDING else expected)
    path = tmp_path / "a.qcow2"
    path.write_bytes(file.snapshot_bytes())
    keeper.close()
    assert_clean(path)
    assert len(qemu_info(path)["format-specific"]["data"].get("bitmaps", [])) == left


@require_qemu
def test_bitmaps_that_are_in_use_stay_so(tmp_path: Path) -> None:
    """What was not stored is not made to look sound by a repair of its neighbour."""
    data = make(Shape(cluster=4096))
    DAMAGE["type"](data)
    place = struct.unpack_from(">Q", data, extension(data) + 16)[0]
    put(data, place + 12, ">I", 3)
    path = tmp_path / "a.qcow2"
    path.write_bytes(data)
    assert check(path, repair="all").clean
    flags = {one["name"]: one["flags"] for one in qemu_info(path)["format-specific"]["data"]["bitmaps"]}
    assert flags == {"first": ["in-use", "auto"], "third": ["auto"]}
    assert_clean(path)


def test_a_repaired_disk_goes_on_recording() -> None:
    data = make(Shape(cluster=4096))
    DAMAGE["reserved flags"](data)
    file = MemoryNode(content=bytes(data))
    keeper = Disk(file)
    with images.open_over(file, writable=True) as disk:
        assert check_node(disk.root, repair="all").clean
        disk.write(64 << 10, b"y" * 512)
    with images.open_over(file) as disk:
        found = bitmaps.find_bitmap(disk, "first")
        assert found.inconsistent or list(found.bits.extents()) == [(512, 512), (64 << 10, 512)]
    keeper.close()


@pytest.mark.parametrize("damage", ["type", "entry of the table", "directory behind the end"])
def test_no_power_failure_during_a_repair_loses_what_is_sound(damage: str) -> None:
    data = make(Shape())
    (HIDING[damage][0] if damage in HIDING else DAMAGE[damage])(data)
    recorder = RecorderNode(MemoryNode(content=bytes(data)), sector=512)
    keeper = Disk(recorder)
    assert mended(recorder).clean
    keeper.close()
    expected = [] if damage in HIDING else ["first", "third"]

    def judge(state: replay.CrashState) -> None:
        assert mended(state.image).clean
        assert names_of(state.image) in ([], expected) if damage in HIDING else names_of(state.image) == expected
        with images.open_over(state.image) as disk:
            assert disk.read(600, 4) == b"xxxx" and disk.read(0, 4) == b"dddd"

    assert replay.replay(replay.crash_states(recorder.log, samples=40), judge) > 20


def test_a_medium_that_fails_costs_no_bitmap(tmp_path: Path) -> None:
    """A directory that cannot be read just now is neither dropped nor are its clusters given back."""
    path = tmp_path / "a.qcow2"
    data = make(Shape(cluster=4096))
    path.write_bytes(data)
    place = struct.unpack_from(">Q", data, extension(data) + 16)[0]
    rules = [{"event": "none", "sector": place // 512, "iotype": "read"}]
    blkdebug = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": rules}
    result = check({"driver": "qcow2", "file": blkdebug}, repair="all")
    assert result.exit_code == 1 and isinstance(result.failure, CowhandError)
    assert path.read_bytes() == data
