"""Bitmaps through a random life, power failures and errors of the medium: whatever a bitmap says that it can be trusted, it is right.

A model knows what each bitmap holds, and the disk, every time the image was closed. A bitmap that is not marked as in use holds what it held at
one of these moments; and if it follows writes, the disk is as it was at that moment too.
"""

from __future__ import annotations

import copy
import errno
import random
from dataclasses import dataclass, field

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import AS_QEMU, DEFAULT, Policy
from cowhand.block.protocols.memory import MemoryNode
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY
from cowhand.image import bitmaps
from cowhand.image.check import check_node
from cowhand.testing import replay
from cowhand.testing.faults import CHANGES, FLUSH, HALF, NOTHING, FaultNode
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images
from tests.qcow2.images import Shape

KIB = 1024
GRANULE = 512
SHAPES = (Shape(), Shape(cluster=4096), Shape(cluster=65536))


@dataclass
class Moment:
    """What the image held when it was closed."""

    disk: bytearray
    dirty: dict[str, set[int]] = field(default_factory=dict)
    enabled: dict[str, bool] = field(default_factory=dict)


class Life:
    """An image's life over *file*; ``moments`` are what it held at each closing."""

    def __init__(
        self, file: RecorderNode | FaultNode | MemoryNode, shape: Shape, seed: int, policy: Policy = DEFAULT
    ) -> None:
        self.file = file
        self.policy = policy
        self.rng = random.Random(seed)
        self.now = Moment(bytearray(shape.size))
        self.moments = [copy.deepcopy(self.now)]
        self.names = 0

    def session(self, steps: int) -> None:
        with images.open_over(self.file, None, writable=True, policy=self.policy) as disk:
            for _ in range(steps):
                self.step(disk)
        self.moments.append(copy.deepcopy(self.now))

    def step(self, disk: Disk) -> None:
        rng, now = self.rng, self.now
        kind = rng.choice(
            (
                "write",
                "write",
                "write",
                "zero",
                "discard",
                "add",
                "remove",
                "clear",
                "toggle",
                "merge",
                "grow",
                "shrink",
            )
        )
        name = rng.choice(sorted(now.dirty)) if now.dirty else None
        if kind in ("write", "zero", "discard"):
            self.change(disk, kind)
        elif kind == "add" or name is None:
            self.add(disk)
        elif kind == "remove":
            bitmaps.remove_bitmap(disk, name)
            del now.dirty[name], now.enabled[name]
        elif kind == "clear":
            bitmaps.clear_bitmap(disk, name)
            now.dirty[name] = set()
        elif kind == "toggle":
            now.enabled[name] = not now.enabled[name]
            bitmaps.enable_bitmap(disk, name, enabled=now.enabled[name])
        elif kind == "merge":
            other = rng.choice(sorted(now.dirty))
            bitmaps.merge_bitmap(disk, name, bitmaps.find_bitmap(disk, other))
            now.dirty[name] |= now.dirty[other]
        else:
            self.resize(disk, kind)

    def add(self, disk: Disk) -> None:
        name, enabled = f"b{self.names}", self.rng.random() < 0.7
        self.names += 1
        bitmaps.add_bitmap(disk, name, granularity=GRANULE, enabled=enabled)
        self.now.dirty[name], self.now.enabled[name] = set(), enabled

    def change(self, disk: Disk, kind: str) -> None:
        offset = self.rng.randrange(disk.size // 512) * 512
        length = min(disk.size - offset, self.rng.choice((512, 1024, 4096)))
        if kind == "write":
            data = self.rng.randbytes(length)
            disk.write(offset, data)
        else:
            # What a discard leaves of a cluster that it does not cover is as before: only whole ones.
            unit = disk.root.limits.discard_alignment
            offset, length, data = offset // unit * unit, min(unit, disk.size - offset // unit * unit), b""
            (disk.discard if kind == "discard" else disk.write_zeroes)(offset, length)
        self.now.disk[offset : offset + length] = data or bytes(length)
        touched = range(offset // GRANULE, -(-(offset + length) // GRANULE))
        for name, enabled in self.now.enabled.items():
            if enabled:
                self.now.dirty[name].update(touched)

    def resize(self, disk: Disk, kind: str) -> None:
        size = disk.size + 16 * KIB if kind == "grow" else max(32 * KIB, disk.size - 16 * KIB)
        disk.resize(size, shrink=True)
        self.now.disk = bytearray(self.now.disk[:size].ljust(size, b"\0"))
        for dirty in self.now.dirty.values():
            dirty -= {granule for granule in dirty if granule * GRANULE >= size}


def checked(file: MemoryNode) -> None:
    """Raise unless a check finds no more than leaks."""
    opening = Opening(REGISTRY)
    opening.for_repair = True
    root = opening.open({"driver": "qcow2", "file": file, "read-only": True})
    with Disk(root) as disk:
        result = check_node(disk.root)
    assert not result.corruptions and not result.check_errors and result.failure is None, result.messages


def judge(file: MemoryNode, moments: list[Moment], *, failed: bool = False) -> tuple[int, int]:
    """Raise unless every bitmap that says it can be trusted is right; return how many do, and how many do not.

    *failed*: a request failed meanwhile. What it was to change may have changed, and is dirty then.
    """
    checked(file)
    trusted = doubtful = 0
    with images.open_over(file) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node) and not node.bitmap_directory.broken, node.bitmap_directory.problems
        content = disk.read(0, disk.size)
        for bitmap in bitmaps.list_bitmaps(disk):
            if bitmap.inconsistent:
                doubtful += 1
                continue
            trusted += 1
            dirty = {granule for first, end in bitmap.bits.runs() for granule in range(first, end)}
            known = [moment for moment in moments if moment.enabled.get(bitmap.name) == bitmap.enabled]
            assert any(
                moment.dirty[bitmap.name] | _changed(moment.disk, content) <= dirty
                if failed and bitmap.enabled
                else moment.dirty[bitmap.name] == dirty and (not bitmap.enabled or moment.disk == content)
                for moment in known
            ), f"bitmap {bitmap.name} claims what was never so"
    return trusted, doubtful


def _changed(before: bytes | bytearray, after: bytes) -> set[int]:
    """Return the granules that differ; one that only *before* has is no part of the disk any more."""
    granules = range(len(after) // GRANULE)
    return {at for at in granules if before[at * GRANULE :][:GRANULE] != after[at * GRANULE :][:GRANULE]}


@pytest.mark.parametrize(
    ("shape", "policy"),
    [(SHAPES[0], DEFAULT), (SHAPES[1], AS_QEMU), (SHAPES[1], DEFAULT), (SHAPES[2], AS_QEMU)],
    ids=lambda value: value.name if isinstance(value, Policy) else str(value),
)
def test_power_failures(shape: Shape, policy: Policy) -> None:
    recorder = RecorderNode(images.create(shape), sector=512)
    keeper = Disk(recorder)
    life = Life(recorder, shape, seed=shape.cluster, policy=policy)
    for _ in range(4):
        life.session(8)
    keeper.close()
    counts = [0, 0]

    def look(state: replay.CrashState) -> None:
        found = judge(state.image, life.moments)
        counts[0] += found[0]
        counts[1] += found[1]

    assert replay.replay(replay.crash_states(recorder.log, samples=50), look) > 50
    assert min(counts) >= 5, counts
    assert len({name for moment in life.moments for name in moment.dirty}) > 1


@pytest.mark.parametrize(
    ("done", "policy"), [(NOTHING, DEFAULT), (HALF, AS_QEMU)], ids=lambda value: str(getattr(value, "name", value))
)
def test_errors_of_the_medium(done: float, policy: Policy) -> None:
    """Every request of a session, its closing included, fails once: what is stored then is right, and so is what the next session makes of it."""
    shape = SHAPES[1]
    start = images.create(shape)
    first = Life(start, shape, seed=5, policy=policy)
    starter = Disk(start)
    for _ in range(3):
        first.session(8)
    with images.open_over(start, None, writable=True) as disk:
        for _ in range(3):
            first.add(disk)
    first.moments.append(copy.deepcopy(first.now))
    start = start.copy()
    starter.close()
    first.file = start
    number = total = 0
    while number <= total:
        number += 1
        medium = start.copy()
        faults = FaultNode(medium, sector=512)
        keeper = Disk(faults)
        life = copy.copy(first)
        life.now, life.moments = copy.deepcopy(first.now), list(first.moments)
        life.rng, life.file = random.Random(4), faults
        kinds = CHANGES | {FLUSH}
        if number > 1:
            faults.fail(kinds, number - 1, errno.ENOSPC if number % 2 else errno.EIO, done=done)
        failed = False
        try:
            life.session(12)
        except CowhandError:
            failed = True
        if number == 1:
            total = min(70, sum(kind in kinds for kind in faults.kinds))
            assert not failed
        # What the session had come to is not known after an error: only what can be trusted all the same is looked at.
        known = [*first.moments, life.now] if not failed else [*first.moments, life.now, *_steps_of(first)]
        judge(medium, known, failed=failed)
        faults.reset()
        keeper.close()
    assert total > 30


def _steps_of(first: Life) -> list[Moment]:
    """Return what the session that fails would hold after each of its steps: its closing stores one of them."""
    file = first.file.copy() if isinstance(first.file, MemoryNode) else first.file
    life = copy.copy(first)
    life.now, life.moments, life.rng, life.file = copy.deepcopy(first.now), [], random.Random(4), file
    out = []
    with images.open_over(file, None, writable=True) as disk:
        for _ in range(12):
            life.step(disk)
            out.append(copy.deepcopy(life.now))
    return out


def test_a_copy_with_bitmaps_into_an_existing_image() -> None:
    """Power fails on the target: its own bitmap and the new ones are there as they were, or as they are to be, or in doubt."""
    shape = SHAPES[0]
    source_file = images.create(shape)
    source_keeper = Disk(source_file)
    source = Life(source_file, shape, seed=9)
    with images.open_over(source_file, None, writable=True) as disk:
        for name, enabled in (("one", True), ("two", False)):
            bitmaps.add_bitmap(disk, name, granularity=GRANULE, enabled=enabled)
            source.now.dirty[name], source.now.enabled[name] = set(), enabled
        for _ in range(12):
            source.change(disk, "write")
        bitmaps.merge_bitmap(disk, "two", bitmaps.find_bitmap(disk, "one"))
        source.now.dirty["two"] = set(source.now.dirty["one"])
    target_file = images.create(shape)
    own = Life(target_file, shape, seed=1)
    with images.open_over(target_file, None, writable=True) as disk:
        bitmaps.add_bitmap(disk, "own", granularity=GRANULE)
        own.now.dirty["own"], own.now.enabled["own"] = set(), True
        own.change(disk, "write")
    recorder = RecorderNode(target_file.copy(), sector=512)
    keeper = Disk(recorder)
    with images.open_over(source_file) as origin, images.open_over(recorder, None, writable=True) as target:
        convert(origin, target, bitmaps=True)
    keeper.close()
    source_keeper.close()
    after = copy.deepcopy(source.now)
    with images.open_over(recorder.log.initial.copy()) as disk:
        assert [bitmap.name for bitmap in bitmaps.list_bitmaps(disk)] == ["own"]
    # All that was written to the target is dirty in its own bitmap, at least.
    moments = [own.now, after]

    def look(state: replay.CrashState) -> None:
        checked(state.image)
        with images.open_over(state.image) as disk:
            content = disk.read(0, disk.size)
            for bitmap in bitmaps.list_bitmaps(disk):
                if bitmap.inconsistent:
                    continue
                dirty = {granule for first, end in bitmap.bits.runs() for granule in range(first, end)}
                if bitmap.name == "own":
                    assert own.now.dirty["own"] | _changed(own.now.disk, content) <= dirty
                else:
                    assert dirty == moments[1].dirty[bitmap.name] and content == after.disk

    assert replay.replay(replay.crash_states(recorder.log, samples=40), look) > 20
