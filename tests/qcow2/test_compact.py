"""Compaction: content and snapshots stay, the file becomes shorter, QEMU finds it clean, and a crash at any point costs space only."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowhand.block.check import check
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.compact import Compactor
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import Cancelled, ImageCorrupt
from cowhand.core.progress import CancelToken
from cowhand.drivers import REGISTRY
from cowhand.jobs.compact import compact
from cowhand.testing.recorder import RecorderNode
from cowhand.testing.replay import CrashState, prefixes, replay, sampled, singles
from tests.qcow2 import damage, images
from tests.qcow2.images import Shape
from tests.tools.qemu import assert_clean, qemu_img, require_qemu


def holey(rng: random.Random, shape: Shape) -> MemoryNode:
    """Return an image with gaps: written at random, snapshotted, much of it discarded."""
    node = images.create(shape, rng.randbytes(shape.size // 2))
    with Disk(node), images.open_over(node, writable=True) as disk:
        names: list[str] = []
        for number in range(30):
            length = rng.choice((512, shape.cluster, 3 * shape.cluster))
            offset = rng.randrange((shape.size - length) // 512) * 512
            kind = rng.randrange(10)
            if kind < 6:
                disk.write(offset, rng.randbytes(length))
            elif kind < 8:
                begin = offset // shape.cluster * shape.cluster
                disk.discard(begin, min(8 * shape.cluster, shape.size - begin))
            elif shape.snapshots and len(names) < 3:
                names.append(f"s{number}")
                images.snapshot_create(disk, names[-1])
            elif names and rng.random() < 0.5:
                images.snapshot_delete(disk, names.pop(0))
        disk.discard(0, shape.size // 3 // shape.cluster * shape.cluster)
        disk.flush()
        disk.flush()
        return node.copy()


def contents(node: MemoryNode) -> dict[str, bytes]:
    with images.open_over(node) as disk:
        found = {"": disk.read(0, disk.size)}
        for snapshot in disk.root.list_snapshots():
            found[snapshot.name] = images.snapshot_read(disk, snapshot.name)
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
]


@require_qemu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_content_and_snapshots_stay(tmp_path: Path, shape: Shape, seed: int) -> None:
    node = holey(random.Random(seed), shape)
    before, size = contents(node.copy()), node.size
    path = tmp_path / "image"
    path.write_bytes(node.snapshot_bytes())
    planned = compact(path, dry_run=True)
    done = compact(path)
    assert done.size == path.stat().st_size < size
    if not planned.leaked:
        assert (planned.size, planned.moved) == (done.size, done.moved)
    assert_clean(path)
    assert contents(MemoryNode(content=path.read_bytes())) == before
    assert compact(path).moved == 0, "once is enough"


@pytest.mark.parametrize(("seed", "bits", "least"), [(0, 8, 2), (1, 8, 2), (3, 8, 2), (2, 1, 15)])
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
                from cowhand.block.check import check_node

                result = check_node(root)
                assert (result.corruptions, result.check_errors, result.failure) == (0, 0, None), result.messages[:5]
        assert contents(state.image.copy()) == before

    assert replay(prefixes(recorder.log), judge) >= least
    replay(singles(recorder.log, limit=60, seed=seed), judge)
    replay(sampled(recorder.log, 80, seed=seed), judge)


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
@pytest.mark.parametrize("seed", range(10))
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
