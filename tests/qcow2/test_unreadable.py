"""What cannot be read is not shown as "none": broken bitmap directories and snapshot tables, everywhere that tells of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import cowhand
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import CowhandError
from tests.cli.command import cowhand as command

MIB = 1 << 20


@pytest.fixture
def image(image_dir: Path) -> Path:
    path = image_dir / "a.qcow2"
    cowhand.create(path, "qcow2", 4 * MIB)
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, b"a" * 65536)
        cowhand.add_bitmap(disk, "b0")
        cowhand.create_snapshot(disk, "s1")
    return path


def extension(data: bytes) -> int:
    """Return where the content of the bitmaps extension begins."""
    at = struct.unpack_from(">I", data, 100)[0]
    while True:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == L.EXT_BITMAPS:
            return int(at + 8)
        assert kind, "the image has bitmaps"
        at += 8 + -(-length // 8) * 8


def _garbage(data: bytearray) -> None:
    size, offset = struct.unpack_from(">QQ", data, extension(data) + 8)
    data[offset : offset + size] = b"\xff" * size


def _far(data: bytearray) -> None:
    struct.pack_into(">Q", data, extension(data) + 16, 1 << 40)


def _too_many(data: bytearray) -> None:
    struct.pack_into(">I", data, extension(data), 1 << 20)


def _snapshots_garbage(data: bytearray) -> None:
    (offset,) = struct.unpack_from(">Q", data, 64)
    data[offset : offset + 80] = b"\xff" * 80


def _snapshots_far(data: bytearray) -> None:
    struct.pack_into(">Q", data, 64, 1 << 40)


def _snapshots_too_many(data: bytearray) -> None:
    struct.pack_into(">I", data, 60, 70000)


def damage(path: Path, how: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    how(data)
    path.write_bytes(data)


BITMAPS = [_garbage, _far, _too_many]
SNAPSHOTS = [_snapshots_garbage, _snapshots_far, _snapshots_too_many]


@pytest.mark.parametrize("how", BITMAPS)
class TestBitmaps:
    def test_info_tells_the_reason(self, image: Path, how: Callable[[bytearray], None]) -> None:
        damage(image, how)
        info = cowhand.image_info(image)
        assert info.bitmaps_problem
        document = info.document()
        assert document["format-specific"]["data"]["bitmaps"] is None
        assert document["bitmaps-problem"] == info.bitmaps_problem
        assert "unreadable" in command("info", image).stdout

    def test_lists_are_not_empty_but_refused(self, image: Path, how: Callable[[bytearray], None]) -> None:
        damage(image, how)
        with cowhand.open(image) as disk, pytest.raises(CowhandError, match="bitmap"):
            cowhand.list_bitmaps(disk)
        with cowhand.open(image) as disk, pytest.raises(CowhandError, match="directory"):
            cowhand.find_bitmap(disk, "b0")
        done = command("bitmap", "list", image, status=1)
        assert "no bitmaps" not in done.stdout
        assert json.loads(command("bitmap", "list", "--output", "json", image, status=1).stdout) is None

    def test_copies_and_measures_say_it(self, image: Path, how: Callable[[bytearray], None]) -> None:
        damage(image, how)
        copy = image.parent / "copy.qcow2"
        assert "unreadable" in command("convert", image, copy).stderr
        assert cowhand.compare(image, copy).identical
        assert "directory" in command("convert", "--overwrite", "--bitmaps", image, copy, status=1).stderr
        done = command("convert", "--overwrite", "--bitmaps", "--skip-broken-bitmaps", image, copy)
        assert "cannot be read" in done.stderr
        found = json.loads(command("measure", "--output", "json", "-O", "qcow2", image).stdout)
        assert found["bitmaps"] is None
        assert found["bitmaps-problem"]


@pytest.mark.parametrize("how", SNAPSHOTS)
class TestSnapshots:
    def test_info_tells_the_reason_and_all_else(self, image: Path, how: Callable[[bytearray], None]) -> None:
        damage(image, how)
        info = cowhand.image_info(image)
        assert info.snapshots_problem
        assert info.virtual_size == 4 * MIB
        assert info.document()["snapshots"] is None
        assert "unreadable" in command("info", image).stdout

    def test_lists_are_not_empty_but_refused(self, image: Path, how: Callable[[bytearray], None]) -> None:
        damage(image, how)
        done = command("snapshot", "list", image, status=4)
        assert "unreadable" in done.stderr
        assert "no snapshots" not in done.stdout
        assert json.loads(command("snapshot", "list", "--output", "json", image, status=4).stdout) is None
        with pytest.raises(CowhandError), cowhand.open(image) as disk:
            cowhand.list_snapshots(disk)


def test_a_table_that_is_cut_off_is_no_table_of_zeroes(image: Path) -> None:
    data = image.read_bytes()
    (offset,) = struct.unpack_from(">Q", data, 64)
    image.write_bytes(data[: offset + 50])
    assert "cut off" in cowhand.image_info(image).snapshots_problem


def test_what_is_sound_has_no_problem(image: Path) -> None:
    info = cowhand.image_info(image)
    assert (info.bitmaps_problem, info.snapshots_problem) == ("", "")
    assert [one.name for one in info.snapshots] == ["s1"]
    assert "problem" not in json.dumps(info.document())
