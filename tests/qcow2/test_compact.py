"""Compaction: content and snapshots stay, the file becomes shorter, QEMU finds it clean, and a crash at any point costs space only."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.compact.compact import Compactor
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import Cancelled, CowhandError, ImageCorrupt, NotSupported
from cowhand.core.progress import CancelToken
from cowhand.drivers import REGISTRY
from cowhand.image import bitmaps
from cowhand.image.check import check
from cowhand.image.compact import compact
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot, delete_snapshot
from cowhand.testing.faults import ALL, CHANGES, HALF, NOTHING, FaultNode
from cowhand.testing.recorder import RecorderNode
from cowhand.testing.replay import CrashState, prefixes, replay, sampled, singles
from tests.qcow2 import damage, images
from tests.qcow2.images import Shape
from tests.qcow2.oracle import Image
from tests.tools.qemu import assert_clean, qemu_img, require_qemu


def holey(rng: random.Random, shape: Shape) -> MemoryNode:
    """Return an image with gaps: written at random, compressed too, snapshotted, with a bitmap, much of it discarded."""
    node = images.create(shape, rng.randbytes(shape.size // 2))
    keeper = Disk(node)
    if shape.version > 2:
        with images.open_over(node, writable=True) as disk:
            bitmaps.add_bitmap(disk, "b", granularity=512)
    with images.open_over(node, writable=True) as disk:
        live(disk, rng, shape)
    keeper.close()
    return node.copy()


def live(disk: Disk, rng: random.Random, shape: Shape) -> None:
    names: list[str] = []
    for number in range(40):
        length = rng.choice((512, shape.cluster, 3 * shape.cluster))
        offset = rng.randrange((shape.size - length) // 512) * 512
        begin = offset // shape.cluster * shape.cluster
        kind = rng.randrange(14)
        if kind < 6:
            disk.write(offset, rng.randbytes(length))
        elif kind < 8:
            disk.discard(begin, min(8 * shape.cluster, shape.size - begin))
        elif kind < 12:
            # Several of these share a host cluster, or reach from one into the next.
            data = rng.randbytes(rng.randrange(20, shape.cluster // 2)).ljust(shape.cluster, b"c")
            with suppress(NotSupported):
                node: Any = disk.root
                node.write_compressed(begin, node.codec.compress(data))
        elif shape.snapshots and len(names) < 3:
            names.append(f"s{number}")
            images.snapshot_create(disk, names[-1])
        elif names and rng.random() < 0.5:
            images.snapshot_delete(disk, names.pop(0))
    disk.discard(0, shape.size // 3 // shape.cluster * shape.cluster)
    disk.flush()
    disk.flush()


def contents(node: MemoryNode) -> dict[str, bytes]:
    with images.open_over(node) as disk:
        found = {"": disk.read(0, disk.size)}
        for snapshot in disk.root.list_snapshots():
            found[snapshot.name] = images.snapshot_read(disk, snapshot.name)
        for bitmap in bitmaps.list_bitmaps(disk):
            found[f"bitmap {bitmap.name}"] = repr(list(bitmaps.dirty_extents(disk, bitmap.name))).encode()
        return found


def run(node: object, cancel: CancelToken | None = None, round_bytes: int = 4 << 30) -> object:
    opening = Opening(REGISTRY, backing=False)
    opening.for_repair = True
    root = opening.open({"driver": "qcow2", "file": node, "read-only": False})
    assert isinstance(root, Qcow2Node)
    with Disk(root, writable=True):
        return Compactor(root, None, cancel, round_bytes).run()


SHAPES = [
    Shape(),
    Shape(version=2),
    Shape(refcount_bits=1),
    Shape(cluster=4096, refcount_bits=64, size=1 << 20),
    Shape(refcount_bits=4),
    Shape(cluster=16384, extended=True, size=1 << 20),
]


@require_qemu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_content_and_snapshots_stay(tmp_path: Path, shape: Shape, seed: int) -> None:
    node = holey(random.Random(seed), shape)
    before, size = contents(node.copy()), node.size
    path = tmp_path / "image"
    path.write_bytes(node.snapshot_bytes())
    planned = compact(path, dry_run=True)
    done = compact(path)
    assert done.size == path.stat().st_size < size
    assert planned == done
    assert_clean(path)
    assert contents(MemoryNode(content=path.read_bytes())) == before
    assert compact(path).moved == 0, "once is enough"


@pytest.mark.parametrize(("seed", "bits", "least"), [(0, 8, 2), (3, 8, 2), (2, 1, 15)])
def test_a_crash_at_any_point_costs_space_only(seed: int, bits: int, least: int) -> None:
    shape = Shape(refcount_bits=bits, size=64 << 10)
    node = holey(random.Random(seed), shape)
    if bits == 1:
        node = images.create(shape, random.Random(seed).randbytes(shape.size))
        with Disk(node):
            with images.open_over(node, writable=True) as disk:
                disk.discard(0, shape.size // 2)
            node = node.copy()
    before = contents(node.copy())
    recorder = RecorderNode(node, sector=1)
    with Disk(recorder):
        run(recorder, round_bytes=8 << 10)
    assert recorder.log.changes

    def judge(state: CrashState) -> None:
        with Disk(state.image):
            opening = Opening(REGISTRY, backing=False)
            opening.for_repair = True
            root = opening.open({"driver": "qcow2", "file": state.image, "read-only": True})
            with Disk(root):
                from cowhand.image.check import check_node

                result = check_node(root)
                assert (result.corruptions, result.check_errors, result.failure) == (0, 0, None), result.messages[:5]
        found = contents(state.image.copy())
        if "bitmap b" not in found:
            # While the directory is switched its bitmaps count for nothing: who asks copies everything.
            found["bitmap b"] = before.get("bitmap b", b"")
        assert found == {"bitmap b": b"", **before}

    assert replay(prefixes(recorder.log), judge) >= least
    replay(singles(recorder.log, limit=60, seed=seed), judge)
    replay(sampled(recorder.log, 80, seed=seed), judge)


@require_qemu
@pytest.mark.parametrize("options", [{}, {"data_file_raw": "on"}, {"extended_l2": "on"}], ids=str)
def test_images_with_a_data_file_lose_tables_only(tmp_path: Path, options: dict[str, str]) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    create(path, "qcow2", 1 << 30, {"data_file": str(data), "cluster_size": "16k", **options})
    with cowhand.open(path, writable=True) as disk:
        for offset in range(0, 1 << 30, 16 << 20):
            disk.write(offset, bytes([offset >> 24 | 1]) * 5000)
        disk.resize(512 << 20, shrink=True)
        content = [disk.read(offset, 5000) for offset in range(0, 512 << 20, 16 << 20)]
    before, size = data.read_bytes(), path.stat().st_size
    done = compact(path)
    assert done.size == path.stat().st_size <= size
    assert data.read_bytes() == before
    assert_clean(path)
    with cowhand.open(path) as disk:
        assert [disk.read(offset, 5000) for offset in range(0, 512 << 20, 16 << 20)] == content


@require_qemu
def test_all_metadata_moves_down(tmp_path: Path) -> None:
    """A large L1 table, snapshots' L1 tables, a bitmap and refcount blocks behind a hole that was all of the data."""
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2", 1 << 20, {"cluster_size": "512", "refcount_bits": "64"})
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, random.Random(3).randbytes(1 << 20))
        disk.resize(64 << 20)
        create_snapshot(disk, "s")
        bitmaps.add_bitmap(disk, "b", granularity=512)
        disk.write(60 << 20, b"tail" * 1000)
        delete_snapshot(disk, "s")
        create_snapshot(disk, "t")
        disk.discard(0, 1 << 20)
        delete_snapshot(disk, "t")
        create_snapshot(disk, "u")
    before = contents(MemoryNode(content=path.read_bytes()))
    planned = compact(path, dry_run=True)
    done = compact(path)
    assert planned == done
    assert done.size < 120_000, "two L1 tables of 16 KiB each, a bitmap of 32 KiB, and nearly nothing else"
    assert contents(MemoryNode(content=path.read_bytes())) == before
    assert_clean(path)


@pytest.mark.parametrize(("seed", "done"), [(0, NOTHING), (1, HALF), (3, ALL)])
def test_an_error_at_each_step_costs_space_only(seed: int, done: float) -> None:
    node = holey(random.Random(seed), Shape(refcount_bits=8, size=64 << 10))
    before = contents(node.copy())
    counter = FaultNode(node.copy())
    with Disk(counter):
        run(counter)
    size, changes = counter.size, sum(kind in CHANGES for kind in counter.kinds)
    assert changes > 20
    for number in range(1, changes + 1, 1 + changes // 30):
        medium = node.copy()
        faults = FaultNode(medium)
        with Disk(faults):
            faults.fail(CHANGES, number, errno.EIO, done=done)
            with suppress(CowhandError):
                run(faults)
            assert faults.failed == 1
            found = contents(medium.copy())
            assert {"bitmap b": before["bitmap b"], **found} == before, f"change {number} failed"
            run(faults)
        # Bitmaps that are lost with an error leave room behind.
        assert medium.size <= size
        assert {"bitmap b": before["bitmap b"], **contents(medium)} == before


def test_interrupted_it_goes_on() -> None:
    node = holey(random.Random(7), Shape())
    before = contents(node.copy())
    for passes in (2, 5, 9, 20):

        class Soon(CancelToken):
            left = passes

            def check(self) -> None:
                self.left -= 1
                if self.left < 0:
                    raise Cancelled("enough")

        copy = node.copy()
        with Disk(copy):
            try:
                run(copy, Soon(), 4 << 10)
            except Cancelled:
                assert contents(copy.copy()) == before
            run(copy)
            assert contents(copy.copy()) == before
        whole = node.copy()
        with Disk(whole):
            run(whole)
        assert copy.size == whole.size


@require_qemu
@pytest.mark.parametrize("seed", range(5))
def test_images_of_qemu_with_compressed_clusters(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "image"
    damage.make(path, random.Random(seed), bitmaps=True)
    before = tmp_path / "before"
    before.write_bytes(path.read_bytes())
    compact(path)
    assert_clean(path)
    assert qemu_img("compare", before, path, check=False).status == 0


@require_qemu
def test_a_damaged_image_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    data = bytearray(path.read_bytes())
    data[3 << 16 : (3 << 16) + 8] = ((2 << 16) | 1 << 63).to_bytes(8, "big")
    path.write_bytes(data)
    with pytest.raises(ImageCorrupt):
        compact(path)
    assert path.read_bytes() == data
    assert check(path).corruptions


def test_features_that_are_not_known_do_not_count_afterwards() -> None:
    """An autoclear bit vouches for what nobody here kept up: their places may be others now (specification, "autoclear_features")."""
    image = holey(random.Random(1), Shape(size=64 << 10))
    data = bytearray(image.snapshot_bytes())
    known = data[95]
    data[94] |= 0x40
    moved = MemoryNode(content=bytes(data))
    with Disk(moved):
        run(moved)
        assert (moved.snapshot_bytes()[94], moved.snapshot_bytes()[95]) == (0, known)


@pytest.mark.parametrize("other", ["snapshot's L1 table", "compressed data"])
def test_a_cluster_that_is_two_things_keeps_its_count(other: str) -> None:
    """Data's place is also something else's, and the count says so: no check finds that wrong. Moved as data it would leave the other uncounted."""
    rng, shape = random.Random(4), Shape(size=64 << 10)
    image = images.create(shape, rng.randbytes(32 << 10))
    with Disk(image), images.open_over(image, writable=True) as disk:
        images.snapshot_create(disk, "a")
        disk.write(0, rng.randbytes(16 << 10))
        node: Any = disk.root
        for number in range(4):
            node.write_compressed((40 << 10) + number * 512, node.codec.compress(bytes([number]) * 512))
        images.snapshot_create(disk, "b")
        images.snapshot_delete(disk, "a")
        disk.write(56 << 10, rng.randbytes(8 << 10))
        disk.flush()
        image = image.copy()
    found = Image(image.snapshot_bytes())
    tables = [word & damage.OFFSET for word in found.words(found.l1_offset, found.l1_size)]
    if other == "compressed data":
        words = (word for table in tables for word in found.words(table, 64))
        place = next(word for word in words if word >> 62 == 1) & ((1 << 61) - 1)
    else:
        place = found.snapshots[0].l1_offset
    data = bytearray(found.data)
    at = tables[-1] + 63 * 8
    old = int.from_bytes(data[at : at + 8], "big") & damage.OFFSET
    data[at : at + 8] = (place // 512 * 512).to_bytes(8, "big")
    blocks = found.words(found.table_offset, 64)
    for cluster, more in ((old // 512, -1), (place // 512, 1)):
        begin = blocks[cluster // 256] + cluster % 256 * 2
        data[begin : begin + 2] = (int.from_bytes(data[begin : begin + 2], "big") + more).to_bytes(2, "big")
    image = MemoryNode(content=bytes(data))
    before = contents(image.copy())
    recorder = RecorderNode(image, sector=1)
    with Disk(recorder), suppress(ImageCorrupt):  # half-way a COPIED bit may be missing
        run(recorder)

    def judge(state: CrashState) -> None:
        with Disk(state.image):
            wrong = [line for line in Image(state.image.snapshot_bytes()).check().corruptions if "is both" not in line]
            assert not wrong
        found = contents(state.image.copy())
        # What the disk shows of a table changes with it.
        assert (found[""][:-512], found["b"]) == (before[""][:-512], before["b"])

    assert replay(prefixes(recorder.log), judge)
