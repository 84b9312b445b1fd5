"""Persistent bitmaps: QEMU reads what cowhand keeps and the other way round, and no power failure makes one claim clean what was written."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import BitmapUnusable, CowhandError, InvalidArgument
from cowhand.image import bitmaps
from cowhand.testing import replay
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images
from tests.qcow2.images import Shape
from tests.tools.qemu import assert_clean, qemu_img, qemu_info, qemu_io, require_qemu

MIB = 1 << 20


def extents(path: Path, name: str) -> list[tuple[int, int]]:
    with cowhand.open(path) as disk:
        return list(bitmaps.dirty_extents(disk, name))


def stored(path: Path) -> dict[str, tuple[int, list[str]]]:
    data = qemu_info(path)["format-specific"]["data"]
    return {one["name"]: (one["granularity"], one["flags"]) for one in data.get("bitmaps", [])}


@require_qemu
class TestWithQemu:
    def test_what_qemu_recorded_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, "64M")
        qemu_img("bitmap", "--add", "-g", "4096", path, "fine")
        qemu_img("bitmap", "--add", "--disable", path, "off")
        qemu_io(path, "write 1M 6k", "write -z 20M 64k", "discard 40M 128k")
        assert extents(path, "fine") == [(MIB, 8192), (20 * MIB, 65536), (40 * MIB, 131072)]
        assert extents(path, "off") == []

    def test_writes_of_both_join(self, tmp_path: Path) -> None:
        """A bitmap that is in QEMU's directory and in cowhand's in turn says what both have written."""
        path = tmp_path / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
        with cowhand.open(path, writable=True) as disk:
            bitmaps.add_bitmap(disk, "b", granularity=65536)
            disk.write(0, b"x")
        qemu_io(path, "write 3M 64k")
        with cowhand.open(path, writable=True) as disk:
            disk.write_zeroes(5 * MIB, 65536)
            disk.discard(7 * MIB, 65536)
        assert extents(path, "b") == [(0, 65536), (3 * MIB, 65536), (5 * MIB, 65536), (7 * MIB, 65536)]
        assert stored(path) == {"b": (65536, ["auto"])}
        assert_clean(path)
        # QEMU merges what cowhand stored into a bitmap of its own.
        qemu_img("bitmap", "--add", "--disable", "--merge", "b", path, "copy")
        assert extents(path, "copy") == extents(path, "b")

    def test_states_and_removal(self, tmp_path: Path) -> None:
        path = tmp_path / "a.qcow2"
        path.with_name("none").write_bytes(bytes(MIB))
        qemu_img("create", "-q", "-f", "qcow2", "-b", path.with_name("none"), "-F", "raw", path, "16M")
        with cowhand.open(path, writable=True, backing=False) as disk:
            for name in ("one", "two", "three"):
                bitmaps.add_bitmap(disk, name)
            bitmaps.enable_bitmap(disk, "two", enabled=False)
            disk.write_zeroes(0, 65536)
            bitmaps.clear_bitmap(disk, "three")
        assert {name: flags for name, (_, flags) in stored(path).items()} == {
            "one": ["auto"],
            "two": [],
            "three": ["auto"],
        }
        with cowhand.open(path, backing=False) as disk:
            dirty = {bitmap.name for bitmap in bitmaps.list_bitmaps(disk) if bitmap.bits}
            assert dirty == {"one"}
        assert qemu_info(path)["backing-filename"] == str(path.with_name("none"))
        with cowhand.open(path, writable=True, backing=False) as disk:
            for name in ("one", "two", "three"):
                bitmaps.remove_bitmap(disk, name)
        assert stored(path) == {}
        assert_clean(path)

    def test_bitmaps_follow_the_size(self, tmp_path: Path) -> None:
        path = tmp_path / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, "64M")
        with cowhand.open(path, writable=True) as disk:
            bitmaps.add_bitmap(disk, "b", granularity=512)
            disk.write(MIB, b"x" * 512)
            disk.write(60 * MIB, b"x" * 512)
            disk.resize(8 * MIB, shrink=True)
            disk.resize(128 * MIB)
            disk.write(100 * MIB, b"x" * 512)
        assert extents(path, "b") == [(MIB, 512), (100 * MIB, 512)]
        assert_clean(path)
        qemu_io(path, "write 127M 512")
        assert extents(path, "b")[-1] == (127 * MIB, 512)

    def test_no_snapshot_is_applied_under_bitmaps(self, tmp_path: Path) -> None:
        from cowhand.image.snapshots import apply_snapshot, create_snapshot

        path = tmp_path / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, "16M")
        with cowhand.open(path, writable=True) as disk:
            bitmaps.add_bitmap(disk, "b")
            create_snapshot(disk, "s")
            with pytest.raises(BitmapUnusable) as caught:
                apply_snapshot(disk, "s")
        assert caught.value.qemu() == "Device has active dirty bitmaps"


def make(shape: Shape) -> MemoryNode:
    node = images.create(shape, b"")
    keeper = Disk(node)
    with images.open_over(node, None, writable=True) as disk:
        bitmaps.add_bitmap(disk, "auto", granularity=512)
        bitmaps.add_bitmap(disk, "off", granularity=4096, enabled=False)
    keeper.close()
    return node.copy()


@pytest.mark.parametrize("shape", [Shape(), Shape(cluster=4096), Shape(cluster=65536)], ids=str)
def test_no_power_failure_makes_a_bitmap_claim_clean_what_was_written(shape: Shape) -> None:
    rng = random.Random(f"{shape}")
    recorder = RecorderNode(make(shape), sector=512)
    keeper = Disk(recorder)
    written: list[tuple[int, int]] = []  # moment before, offset
    for _ in range(3):
        with images.open_over(recorder, None, writable=True) as disk:
            for _ in range(6):
                offset = rng.randrange(shape.size // 512) * 512
                written.append((recorder.log.now(), offset))
                disk.write(offset, rng.randbytes(512))
            bitmaps.merge_bitmap(disk, "off", bitmaps.find_bitmap(disk, "auto"))
            bitmaps.add_bitmap(disk, f"new{rng.random()}")
    keeper.close()
    seen = {"consistent": 0, "in use": 0}

    def judge(state: replay.CrashState) -> None:
        with images.open_over(state.image, None) as disk:
            node = disk.root
            assert isinstance(node, Qcow2Node) and not node.bitmap_directory.broken, node.bitmap_directory.problems
            found = bitmaps.find_bitmap(disk, "auto")
            if found.inconsistent:
                seen["in use"] += 1
                return
            seen["consistent"] += 1
            content = disk.read(0, disk.size)
            for moment, offset in written:
                if moment < state.moment and any(content[offset : offset + 512]):
                    assert found.bits.is_dirty(offset), f"{offset:#x} was written, and the bitmap says it is clean"

    assert replay.replay(replay.crash_states(recorder.log, samples=60), judge) > 60
    assert seen["consistent"] and seen["in use"], seen


def test_a_bitmap_that_was_removed_is_trusted_by_nobody_after_a_power_failure() -> None:
    """One that follows no writes needs no mark before them; removed, and made anew under its name, it would claim clean what was written."""
    recorder = RecorderNode(make(Shape()), sector=512)
    keeper = Disk(recorder)
    with images.open_over(recorder, None, writable=True) as disk:
        disk.write(0, b"a")
        bitmaps.remove_bitmap(disk, "off")
        bitmaps.add_bitmap(disk, "off", granularity=4096)
        begun = recorder.log.now()
        disk.write(8192, b"b" * 512)
        disk.flush()
    keeper.close()

    def judge(state: replay.CrashState) -> None:
        with images.open_over(state.image, None) as disk:
            known = {bitmap.name: bitmap for bitmap in bitmaps.list_bitmaps(disk)}
            if state.moment > begun and disk.read(8192, 1) == b"b" and "off" in known:
                assert known["off"].inconsistent or known["off"].bits.is_dirty(8192)

    assert replay.replay(replay.prefixes(recorder.log), judge) > 4


class TestBrokenDirectory:
    """The image opens, read-only and writable; what is broken is told of, and nothing claims what is not so."""

    @staticmethod
    def broken(tmp_path: Path, damage: bytes, at: int) -> Path:
        path = tmp_path / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, "16M")
        with cowhand.open(path, writable=True) as disk:
            for name in ("hurt", "sound"):  # the last one comes first in the directory
                bitmaps.add_bitmap(disk, name)
            disk.write(0, b"x")
        with cowhand.open(path) as disk:
            assert isinstance(disk.root, Qcow2Node)
            directory = disk.root.bitmap_directory
            place = directory.offset + directory.entries[1].at + at
        with path.open("r+b") as file:
            file.seek(place)
            file.write(damage)
        return path

    @require_qemu
    @pytest.mark.parametrize(
        ("damage", "at"),
        [
            (struct.pack(">Q", 513), 0),
            (struct.pack(">I", 1 << 31), 8),
            (struct.pack(">I", 8), 12),
            (b"\x02", 16),
            (b"\x00", 17),
        ],
        ids=["table", "entries", "flags", "type", "granularity"],
    )
    def test_the_rest_of_the_image_is_used(self, tmp_path: Path, damage: bytes, at: int) -> None:
        path = self.broken(tmp_path, damage, at)
        assert qemu_img("info", path, check=False).status != 0, "QEMU reads it: nothing is broken"
        assert extents(path, "sound") == [(0, 65536)]
        with cowhand.open(path, writable=True) as disk:
            disk.write(MIB, b"y")
            with pytest.raises(CowhandError, match="broken"):
                bitmaps.add_bitmap(disk, "more")
        with cowhand.open(path) as disk:
            assert disk.read(MIB, 1) == b"y"
            assert bitmaps.find_bitmap(disk, "sound").inconsistent, "nobody recorded what was written"


def test_constraints_are_those_of_qemu(tmp_path: Path) -> None:
    node = images.create(Shape(), b"")
    with images.open_over(node, None, writable=True) as disk:
        bitmaps.add_bitmap(disk, "b")
        for name, granularity, text in (
            ("", None, "Bitmap name cannot be empty"),
            ("x", 513, "Granularity must be power of 2 and at least 512"),
            ("b", None, "Bitmap already exists: b"),
            ("n" * 1024, None, f"persistent in '{disk.root.name}': Name length exceeds maximum (1023 characters)"),
            ("x", 1 << 32, "Granularity exceeds maximum (2147483648 bytes)"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                bitmaps.add_bitmap(disk, name, granularity=granularity)
            assert caught.value.qemu().endswith(text)
        with pytest.raises(CowhandError, match="Dirty bitmap 'none' not found"):
            bitmaps.remove_bitmap(disk, "none")
