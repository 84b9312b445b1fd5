"""Rebasing under power failures and failing writes: at any moment the image shows what it showed, over the backing file that it names then."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.create import create as create_image
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY
from cowhand.jobs.rebase import rebase
from cowhand.testing import replay
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import oracle

SIZE = 96 << 10


def content(rng: random.Random, size: int) -> bytes:
    """Return bytes of which every third KiB is zero."""
    return b"".join(bytes(1024) if rng.random() < 0.3 else rng.randbytes(1024) for _ in range(size >> 10))


class _Scene:
    """An old and a new backing file, and an overlay of the old one that stores a part of its disk."""

    def __init__(self, folder: Path, rng: random.Random, *, cluster: int, longer: bool, named: bool) -> None:
        self.old, self.new = folder / "old.raw", folder / "another.raw"
        old = content(rng, SIZE // (1 if longer else 2))
        # Alike in parts, so that something need not be copied.
        new = b"".join(rng.choice((old[at : at + 4096], content(rng, 4096))) for at in range(0, len(old), 4096))
        self.old.write_bytes(old)
        self.new.write_bytes(new + (b"" if longer else content(rng, SIZE // 4)))
        self.target = str(self.new) if named else None
        node = MemoryNode()
        keeper = Disk(node)
        create_image(node, SIZE, {"cluster_size": cluster, "backing_file": str(self.old), "backing_fmt": "raw"})
        self.expected = bytearray(old.ljust(SIZE, b"\0"))
        with self.open(node) as disk:
            for _ in range(12):
                offset, data = rng.randrange(SIZE - 3000), rng.randbytes(rng.randrange(1, 3000))
                disk.write(offset, data)
                self.expected[offset : offset + len(data)] = data
            disk.write_zeroes(8192, 4096)
            self.expected[8192:12288] = bytes(4096)
        self.image = node.copy()
        keeper.close()

    @staticmethod
    def open(file: BlockNode) -> Disk:
        """Open the overlay that *file* holds, over what its header names."""
        root = Opening(REGISTRY).open({"driver": "qcow2", "file": file, "read-only": False})
        return Disk(root, writable=True)

    def judge(self, file: MemoryNode) -> str | None:
        """Raise unless the overlay in *file* is sound and shows what it showed; return which backing file it names."""
        keeper = Disk(file)
        with self.open(file) as disk:
            found = disk.read(0, disk.size)
            assert isinstance(disk.root, Qcow2Node)
            name = disk.root.header.backing_name
        keeper.close()
        assert found == self.expected
        below = Path(name).read_bytes() if name else b""
        assert oracle.Image(file.snapshot_bytes(), below).check().corruptions == []
        return name


#: From 8 KiB clusters on the header has the names of the features in it, and the backing file's lies behind the first sector.
KINDS = {"longer": (512, True, True), "shorter": (8192, False, True), "none": (8192, True, False)}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def scene(request: pytest.FixtureRequest, tmp_path: Path, rng: random.Random) -> _Scene:
    cluster, longer, named = request.param
    return _Scene(tmp_path, rng, cluster=cluster, longer=longer, named=named)


def test_a_power_failure_leaves_one_of_the_two(scene: _Scene) -> None:
    recorder = RecorderNode(scene.image, sector=512)
    keeper = Disk(recorder)
    with scene.open(recorder) as disk:
        rebase(disk, scene.target, "raw" if scene.target else None)
    keeper.close()
    seen = set()
    replay.replay(replay.crash_states(recorder.log, samples=60), lambda state: seen.add(scene.judge(state.image)))
    assert seen == {str(scene.old), scene.target}


class _Failing(MemoryNode):
    """Fails in one of its changes, or from it on."""

    left = -1
    lasting = False

    def _count(self) -> None:
        if self.left == 0:
            if not self.lasting:
                self.left = -1
            raise CowhandError("no more", qemu="No space left on device", errno=28)
        self.left -= 1

    def write(self, offset: int, buffers: Any, fua: bool = False) -> None:
        self._count()
        super().write(offset, buffers, fua)

    def flush(self) -> None:
        self._count()
        super().flush()


@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_leaves_one_of_the_two(scene: _Scene, lasting: bool) -> None:
    data = scene.image.snapshot_bytes()
    step, failures = 0, 0
    while True:
        node = _Failing(content=data)
        keeper = Disk(node)
        disk = scene.open(node)
        node.left, node.lasting = step, lasting
        try:
            rebase(disk, scene.target, "raw" if scene.target else None)
        except CowhandError:
            failures += 1
            done = False
        else:
            done = node.left > 0  # nothing failed
        try:
            disk.close()
        except CowhandError:
            assert not done
        node.left = -1
        keeper.close()
        name = scene.judge(node.copy())
        if done:
            assert name == scene.target
            break
        step += 1 + step // 8
    assert failures > 4
