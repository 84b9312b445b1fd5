"""Emptying a whole image at once: what it leaves, and what a power failure or a failing file in its middle leaves."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.graph import graph
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.jobs.commit import empty
from cowhand.testing import replay
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape

SHAPES = [
    Shape(backed=True),
    Shape(backed=True, refcount_bits=64, size=40 << 10),
    Shape(backed=True, lazy=True),
    Shape(backed=True, cluster=4096, size=256 << 10),
    Shape(size=1 << 20, backed=True),  # the L1 table takes several clusters
]


def stored(shape: Shape, rng: random.Random) -> tuple[MemoryNode, bytes]:
    """Return an image that stores something everywhere, after some growing and overwriting, and its content."""
    node = images.create(shape)
    keeper = Disk(node)
    content = bytearray(shape.size)
    with images.open_over(node, writable=True) as disk:
        for _ in range(3):
            for offset in range(0, shape.size, 4096):
                data = rng.randbytes(min(4096, shape.size - offset))
                disk.write(offset, data)
                content[offset : offset + len(data)] = data
            disk.discard(shape.size // 3, shape.size // 3)
        disk.write(0, bytes(content))
    keeper.close()
    return node.copy(), bytes(content)


def make_empty(disk: Disk) -> bool:
    node = disk.root
    assert isinstance(node, Qcow2Node)
    with graph.quiesce(node):
        return node.make_empty()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_stored_any_more(shape: Shape, rng: random.Random) -> None:
    node, _ = stored(shape, rng)
    base = shape.base(rng)
    before = node.size
    keeper = Disk(node)
    with images.open_over(node, MemoryNode(content=base), writable=True) as disk:
        assert make_empty(disk)
        shown = base[: shape.size].ljust(shape.size, b"\0")
        assert disk.read(0, disk.size) == shown
        new = rng.randbytes(5000)
        disk.write(3000, new)
        wanted = shown[:3000] + new + shown[8000:]
        assert disk.read(0, disk.size) == wanted
    assert node.size < before
    image = oracle.Image(node.snapshot_bytes(), base)
    keeper.close()
    assert image.incompatible == 0
    assert image.check() == oracle.Findings()
    assert image.content() == wanted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_power_failure_leaves_the_old_content_or_the_base(shape: Shape) -> None:
    rng = random.Random(str(shape))
    node, content = stored(shape, rng)
    base = shape.base(rng)
    recorder = RecorderNode(node, sector=512)
    keeper = Disk(recorder)
    with images.open_over(recorder, MemoryNode(content=base), writable=True) as disk:
        assert make_empty(disk)
    keeper.close()
    shown = base[: shape.size].ljust(shape.size, b"\0")
    seen = set()
    in_place = shape.size <= 64 << 10 or shape.cluster > 512  # new tables would be where the old ones are

    def judge(state: replay.CrashState) -> None:
        if in_place:
            found_as_it_is = oracle.Image(state.image.snapshot_bytes(), base).check()
            assert found_as_it_is.corruptions == []
        holder = Disk(state.image)
        with images.open_over(state.image, MemoryNode(content=base), writable=True) as disk:
            found = disk.read(0, disk.size)
        holder.close()
        unit = shape.cluster
        for offset in range(0, shape.size, unit):
            assert found[offset : offset + unit] in (content[offset : offset + unit], shown[offset : offset + unit])
        image = oracle.Image(state.image.snapshot_bytes(), base)
        assert image.incompatible == 0
        assert image.check().corruptions == []
        assert image.content() == found
        seen.add(found)

    replay.replay(replay.crash_states(recorder.log, samples=30), judge)
    assert {content, shown} <= seen


class _Failing(MemoryNode):
    """Fails from one of its changes on."""

    left = -1

    def _count(self) -> None:
        if self.left == 0:
            raise CowhandError("no more", errno=5)
        self.left -= 1

    def write(self, offset: int, buffers: Any, fua: bool = False) -> None:
        self._count()
        super().write(offset, buffers, fua)

    def write_zeroes(self, *arguments: Any, **named: Any) -> None:
        self._count()
        super().write_zeroes(*arguments, **named)

    def flush(self) -> None:
        self._count()
        super().flush()


def test_an_error_at_any_step_leaves_an_image_that_opens(rng: random.Random) -> None:
    shape = SHAPES[0]
    made, content = stored(shape, rng)
    failures = 0
    for step in range(100):
        node = _Failing(content=made.snapshot_bytes())
        keeper = Disk(node)
        disk = images.open_over(node, MemoryNode(content=b"base" * 100), writable=True)
        node.left = step
        try:
            done = make_empty(disk)
        except CowhandError:
            failures += 1
            done = False
            assert isinstance(disk.root, Qcow2Node)
            if disk.root.poison is not None:
                with pytest.raises(CowhandError):
                    disk.write(0, b"x")
        node.left = -1
        try:
            disk.close()
        except CowhandError:
            assert not done
        with images.open_over(node, MemoryNode(content=b"base" * 100), writable=True) as again:
            assert again.read(0, 400) in (content[:400], b"base" * 100)
        assert oracle.Image(node.snapshot_bytes(), b"base" * 100).check().corruptions == []
        keeper.close()
        if done:
            break
    assert failures > 5


def test_what_has_to_stay_is_gone_through_instead(rng: random.Random) -> None:
    node, _ = stored(Shape(version=2), rng)
    keeper = Disk(node)
    with images.open_over(node, writable=True) as disk:
        assert not make_empty(disk)
    keeper.close()
    node, _ = stored(Shape(), rng)
    keeper = Disk(node)
    with images.open_over(node, writable=True) as disk:
        images.snapshot_create(disk, "kept")
        assert not make_empty(disk)
    keeper.close()


def test_a_power_failure_never_shows_a_hole_of_the_data_file(rng: random.Random) -> None:
    """What a commit has brought down is seen at every moment: in the data file, or where the tables do not name it any more below."""
    shape = Shape(cluster=4096, size=16 * 4096, data="plain", backed=True)
    content = rng.randbytes(shape.size)
    image, data = images.create_media(shape, content)
    recorder = RecorderNode(image, sector=512)
    recorded = RecorderNode(data, sector=512, log=recorder.log)
    keepers = [Disk(recorder), Disk(recorded)]
    with images.open_over(recorder, MemoryNode(content=content), writable=True, data=recorded) as disk:
        assert empty(disk)
        assert disk.read(0, disk.size) == content
    for keeper in keepers:
        keeper.close()
    assert any(change.kind == "discard" for change in recorder.log.changes if change.medium)

    def judge(state: replay.CrashState) -> None:
        held = [Disk(medium) for medium in (state.image, *state.others)]
        with images.open_over(state.image, MemoryNode(content=content), data=state.others[0]) as disk:
            assert disk.read(0, disk.size) == content
        for disk in held:
            disk.close()

    replay.replay(replay.crash_states(recorder.log, samples=20), judge)
