"""Errors at each step: EIO and ENOSPC at every request that an operation makes, done by the medium not at all, by half, or wholly.

After the error the disk holds, sector for sector, what it held before or what the operation gives; the image is sound but for leaks at
that moment, in case the power fails next; and the disk goes on working, or refuses every change.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError, Poisoned, ReadOnly
from cowhand.jobs import commit
from cowhand.testing import replay
from cowhand.testing.faults import ALL, CHANGES, FLUSH, GROWTH, HALF, NOTHING, READ, FaultNode
from cowhand.testing.model import compare
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape
from tests.tools.patience import PATIENCE

SECTOR = 512
DIRTY = 1
PLAIN = Shape()
BACKED = Shape(backed=True)
WIDE = Shape(refcount_bits=64)
BASE = random.Random(99).randbytes(96 << 10)


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to an image: ``prepare`` without faults, flushed, then ``act``, every request of which fails once."""

    name: str
    act: Callable[[Disk], None]
    prepare: Callable[[Disk], None] = lambda disk: None
    shape: Shape = PLAIN
    medium: int = 0  #: which file fails: 1 is the data file

    def __str__(self) -> str:
        return self.name


def fill(disk: Disk, begin: int, end: int, seed: int = 1) -> None:
    """Write random bytes to ``[begin, end)``, in pieces that are single reservations."""
    rng = random.Random(seed)
    for offset in range(begin, end, 16384):
        disk.write(offset, rng.randbytes(min(16384, end - offset)))


def allocate(disk: Disk) -> None:
    disk.write(100 << 10, b"n" * 700)
    disk.flush()


def copy_on_write(disk: Disk) -> None:
    disk.write(5000, b"c" * 100)
    disk.write(64 << 10, b"c" * 3000)
    disk.flush()


def overwrite_zeroes(disk: Disk) -> None:
    disk.write(1024, b"z" * 512)
    disk.flush()


def prepare_zeroes(disk: Disk) -> None:
    fill(disk, 0, 8192)
    disk.flush()
    disk.write_zeroes(0, 8192)


def discard_and_reuse(disk: Disk) -> None:
    disk.discard(0, 8192)
    disk.flush()
    disk.write(32 << 10, b"r" * 8192)
    disk.flush()
    disk.write(60 << 10, b"s" * 4096)
    disk.flush()


def zero(disk: Disk) -> None:
    disk.write_zeroes(3000, 9000, unmap=True)
    disk.write_zeroes(100 << 10, 4096)
    disk.flush()


def grow(disk: Disk) -> None:
    disk.resize(300 << 10)
    disk.write(290 << 10, b"g" * 1024)
    disk.flush()


def take_space(disk: Disk) -> None:
    """The disk ends inside a cluster that moves, and the refcount table moves."""
    disk.resize(300 << 10, preallocation="falloc")
    disk.write(290 << 10, b"g" * 1024)
    disk.flush()


def make_uneven(disk: Disk) -> None:
    fill(disk, 100 << 10, 128 << 10)
    disk.resize((120 << 10) + 1536, shrink=True)


def many_blocks(disk: Disk) -> None:
    fill(disk, 0, 64 << 10, seed=3)
    disk.flush()


def grow_refcount_table(disk: Disk) -> None:
    fill(disk, 0, 96 << 10, seed=4)
    disk.flush()


def near_the_end_of_the_table(disk: Disk) -> None:
    """Use up nearly all of the 2 MiB that one cluster of 8-byte counts' table describes."""
    fill(disk, 128 << 10, (128 << 10) + 1_960_000 // 512 * 512)


def close(disk: Disk) -> None:
    disk.write(20 << 10, b"l" * 5000)
    disk.discard(0, 4096)
    disk.close()


def snapshot(disk: Disk) -> None:
    images.snapshot_create(disk, "taken")
    disk.write(0, b"after" * 100)
    disk.flush()


def with_snapshot(disk: Disk) -> None:
    fill(disk, 0, 32 << 10)
    images.snapshot_create(disk, "first")
    fill(disk, 16 << 10, 48 << 10, seed=2)


def apply_snapshot(disk: Disk) -> None:
    images.snapshot_apply(disk, "first")
    disk.write(1000, b"applied" * 100)
    disk.flush()


def delete_snapshot(disk: Disk) -> None:
    images.snapshot_delete(disk, "first")
    disk.write(1000, b"deleted" * 100)
    disk.flush()


def subclusters(disk: Disk) -> None:
    disk.write(20 << 10, b"s" * 700)
    disk.write(40 << 10, b"t" * 3000)
    disk.write_zeroes(3072, 1024, unmap=True)
    disk.flush()
    disk.write(512, b"u" * 1000)
    disk.discard(48 << 10, 16 << 10)
    disk.flush()


def shrink(disk: Disk) -> None:
    disk.resize(20 << 10, shrink=True)
    disk.write(1000, b"shrunk" * 100)
    disk.flush()


def amend(**options: object) -> Callable[[Disk], None]:
    def act(disk: Disk) -> None:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        node.amend(options)
        disk.write(100 << 10, b"amended" * 100)
        disk.flush()

    return act


def zeroes_of_both_kinds(disk: Disk) -> None:
    fill(disk, 0, 16384)
    disk.write_zeroes(0, 4096)
    disk.write_zeroes(40 << 10, 4096)


EXTENDED = Shape(cluster=16384, extended=True)
SUBCLUSTERS = Shape(cluster=16384, extended=True, backed=True)
EXTERNAL = Shape(data="plain", backed=True)
RAW = Shape(data="raw", cluster=4096)

OPERATIONS = [
    Operation("allocation", allocate),
    Operation("allocation-v2", allocate, shape=Shape(version=2)),
    Operation("copy-on-write", copy_on_write, shape=BACKED),
    Operation("write-over-zeroes", overwrite_zeroes, prepare_zeroes),
    Operation("discard-and-reuse", discard_and_reuse, lambda disk: fill(disk, 0, 16384)),
    Operation("zero", zero, lambda disk: fill(disk, 0, 16384), BACKED),
    Operation("refcount-blocks", many_blocks, shape=WIDE),
    Operation(
        "refcount-table", grow_refcount_table, near_the_end_of_the_table, Shape(refcount_bits=64, size=2200 << 10)
    ),
    Operation("l1-table", grow, lambda disk: fill(disk, 0, 16384)),
    Operation("l1-table-backed", grow, lambda disk: fill(disk, 0, 16384), BACKED),
    Operation("take-space", take_space, make_uneven, Shape(cluster=4096)),
    Operation("take-space-backed", take_space, make_uneven, Shape(cluster=16384, extended=True, backed=True)),
    Operation("close", close, lambda disk: fill(disk, 0, 16384)),
    Operation("snapshot", snapshot, lambda disk: fill(disk, 0, 32 << 10)),
    Operation("apply-snapshot", apply_snapshot, with_snapshot),
    Operation("delete-snapshot", delete_snapshot, with_snapshot),
    Operation("empty-backed", commit.empty, lambda disk: fill(disk, 0, 30000), BACKED),  # type: ignore[arg-type]
    Operation("wider-counts", amend(refcount_bits=64), with_snapshot),
    Operation("narrower-counts", amend(refcount_bits=1), lambda disk: fill(disk, 0, 32 << 10)),
    Operation("downgrade", amend(compat="0.10"), zeroes_of_both_kinds),
    Operation("downgrade-backed", amend(compat="0.10"), zeroes_of_both_kinds, BACKED),
    Operation("upgrade", amend(compat="1.1"), lambda disk: fill(disk, 0, 8192), Shape(version=2)),
    Operation("shrink", shrink, lambda disk: fill(disk, 0, 64 << 10)),
    Operation("subclusters", subclusters, lambda disk: fill(disk, 0, 56 << 10), EXTENDED),
    Operation("subclusters-backed", subclusters, lambda disk: fill(disk, 0, 18 << 10), SUBCLUSTERS),
    Operation("subclusters-of-a-snapshot", delete_snapshot, with_snapshot, EXTENDED),
    *(
        Operation(f"{name}-{('image', 'data')[medium]}", act, prepare, shape, medium)
        for medium in (0, 1)
        for name, act, prepare, shape in (
            ("external-allocation", copy_on_write, lambda disk: fill(disk, 0, 16384), EXTERNAL),
            ("external-zero", zero, lambda disk: fill(disk, 0, 16384), EXTERNAL),
            ("external-grow", grow, lambda disk: fill(disk, 0, 16384), EXTERNAL),
            ("external-shrink", shrink, lambda disk: fill(disk, 0, 120 << 10), Shape(data="plain")),
            ("raw-zero", zero, lambda disk: fill(disk, 0, 16384), RAW),
            ("raw-grow", grow, lambda disk: fill(disk, 0, 16384), RAW),
            ("raw-shrink", shrink, lambda disk: fill(disk, 0, 120 << 10), RAW),
        )
    ),
]
if not images.SNAPSHOTS:
    OPERATIONS = [operation for operation in OPERATIONS if "snapshot" not in operation.name]


class Bench:
    """One image of an operation's shape behind a fault node, prepared and flushed; ``medium`` is what is really stored."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.media = [node.copy() for node in prepared(operation)]
        nodes = [FaultNode(node, sector=SECTOR) for node in self.media]
        self.faults = nodes[operation.medium]
        self.keepers = [Disk(node) for node in nodes]
        self.base = BASE if operation.shape.backed else b""
        data, cache = nodes[1] if nodes[1:] else None, operation.shape.cache
        self.disk = images.open_over(nodes[0], self._backing(), writable=True, data=data, cache=cache)

    def _backing(self) -> MemoryNode | None:
        return MemoryNode(content=self.base) if self.base else None

    def act(self) -> CowhandError | None:
        """Do the operation; return the error by which it failed."""
        try:
            self.operation.act(self.disk)
        except CowhandError as error:
            return error
        return None

    def look(self, what: str) -> oracle.Image:
        """Return what the medium holds now; it has to be sound but for leaks."""
        stored, *data = self.stored()
        image = oracle.Image(stored, self.base, *data)
        findings = image.check()
        assert findings.corruptions == [], what
        if not image.incompatible & DIRTY and image.version > 2:
            assert findings.flags + findings.lost_flags == [], what
        return image

    def stored(self) -> list[bytes]:
        """Return what the media hold."""
        return [node.snapshot_bytes() for node in self.media]

    def shut(self) -> None:
        """Close everything, errors or not."""
        for disk in (self.disk, *self.keepers):
            try:
                disk.close()
            except CowhandError:
                continue


@lru_cache
def prepared(operation: Operation) -> list[MemoryNode]:
    """Return the image before the operation, and its data file."""
    media = images.create_media(operation.shape)
    keepers = [Disk(node) for node in media]
    backing = MemoryNode(content=BASE) if operation.shape.backed else None
    with images.open_over(media[0], backing, writable=True, data=media[1] if media[1:] else None) as disk:
        operation.prepare(disk)
    for keeper in keepers:
        keeper.close()
    return [node.copy() for node in media]


@dataclass(frozen=True, slots=True)
class Reference:
    """What an operation does without faults."""

    kinds: tuple[str, ...]
    before: bytes
    after: bytes
    snapshots: tuple[dict[str, bytes], dict[str, bytes]]


@lru_cache
def reference(operation: Operation) -> Reference:
    bench = Bench(operation)
    before = bench.look("before the operation")
    bench.faults.reset()
    assert bench.act() is None
    kinds = tuple(bench.faults.kinds)
    bench.shut()
    after = bench.look("after the operation")
    return Reference(kinds, before.content(), after.content(), (contents(before), contents(after)))


def contents(image: oracle.Image) -> dict[str, bytes]:
    return {snapshot.name: image.content(snapshot) for snapshot in image.snapshots}


def steps(operation: Operation, kinds: frozenset[str]) -> Iterator[int]:
    """Yield the numbers, among the requests of *kinds*, of all that the operation makes: all of the first 40, then every seventh."""
    count = sum(kind in kinds for kind in reference(operation).kinds)
    assert count > 0, "the operation makes no such request"
    yield from (n for n in range(1, count + 1) if n <= 40 or n % 7 == 0 or n > count - 15)


def between(found: bytes, before: bytes, after: bytes, what: str) -> None:
    """Assert that each sector of *found* is that of *before* or of *after*, as is the length."""
    assert len(found) in (len(before), len(after)), what
    for at in range(0, len(found), SECTOR):
        piece = found[at : at + SECTOR]
        # Behind the shorter of the two lie zeroes.
        wanted = [side[at : at + SECTOR].ljust(SECTOR, b"\0") for side in (before, after)]
        assert piece in wanted, f"{what}: sector {at // SECTOR} holds neither the old nor the new content"


def check_after_error(bench: Bench, wanted: Reference, what: str) -> None:
    """The power may fail right after an error: what is stored then is sound, with old or new content, and whole snapshots."""
    image = bench.look(what)
    between(image.content(), wanted.before, wanted.after, what)
    found = contents(image)
    for name, content in found.items():
        known = [side[name] for side in wanted.snapshots if name in side]
        assert content in known, f"{what}: snapshot {name} holds something else"
    for name in wanted.snapshots[0].keys() & wanted.snapshots[1].keys():
        assert name in found, f"{what}: snapshot {name} is gone"


def go_on(bench: Bench, wanted: Reference, what: str) -> None:
    """Use the disk on after the error: it works and the image is sound, or nothing is written any more."""
    disk = bench.disk
    node = disk.root
    assert isinstance(node, Qcow2Node)
    if node.closed:
        bench.shut()
        bench.look(what)
        return
    content = bytearray(disk.read(0, disk.size))
    between(bytes(content), wanted.before, wanted.after, f"{what}, read by the disk")
    if node.poison is not None:
        stored = bench.stored()
        with pytest.raises((Poisoned, ReadOnly)):
            disk.write(0, b"x" * 4096)
        bench.shut()
        assert bench.stored() == stored, f"{what}: a poisoned node wrote"
        return
    rng = random.Random(7)
    for _ in range(12):
        length = rng.choice((100, 512, 5000))
        offset = rng.randrange(len(content) - length)
        data = rng.randbytes(length)
        disk.write(offset, data)
        content[offset : offset + length] = data
    disk.flush()
    same_but_for_growth(bytes(content), bench.look(f"{what}, used on"), wanted, f"{what}, the disk used on")
    disk.close()
    for keeper in bench.keepers:
        keeper.close()
    image = bench.look(f"{what}, closed")
    same_but_for_growth(bytes(content), image, wanted, f"{what}, the disk closed")
    findings = image.check()
    assert findings.flags + findings.lost_flags == [], what
    shape = bench.operation.shape
    assert image.incompatible == 4 * bool(shape.data) + 16 * shape.extended, what
    check_snapshots(image, wanted, what)


def same_but_for_growth(content: bytes, image: oracle.Image, wanted: Reference, what: str) -> None:
    """Compare; after an error nobody knows whether the new size reached the file, so zeroes may follow up to it."""
    found = image.content()
    if len(found) == len(wanted.after) > len(content):
        content = content.ljust(len(found), b"\0")
    compare(content, found, what)


def check_snapshots(image: oracle.Image, wanted: Reference, what: str) -> None:
    for name, content in contents(image).items():
        assert content in [side[name] for side in wanted.snapshots if name in side], f"{what}: snapshot {name} changed"


def fails_and_goes_on(operation: Operation, kinds: frozenset[str], number: int, error: int, done: float) -> None:
    wanted = reference(operation)
    what = f"{operation}, {errno.errorcode[error]} at change {number}, {int(done * 100)} % done"
    bench = Bench(operation)
    bench.faults.fail(kinds, number, error, done=done)
    raised = bench.act()
    assert bench.faults.failed == 1, f"{what}: nothing failed"
    if raised is not None:
        assert raised.errno == error, f"{what}: {raised!r}"
    check_after_error(bench, wanted, what)
    go_on(bench, wanted, what)


def test_the_operations_do_what_their_names_say() -> None:
    moved = {}
    for operation in OPERATIONS:
        bench = Bench(operation)
        before = bench.look("before")
        assert bench.act() is None
        bench.shut()
        after = bench.look("after")
        moved[operation.name] = (before.table_offset != after.table_offset, before.l1_offset != after.l1_offset)
    # Counts of another width are a new structure; and what takes space ahead makes a table that counts all of it first, as QEMU does.
    tables = {"refcount-table", "narrower-counts", "wider-counts", "take-space", "take-space-backed"}
    assert {name for name, (table, _) in moved.items() if table} == tables
    assert {name for name, (_, l1) in moved.items() if l1} >= {"l1-table", "l1-table-backed"}


@pytest.mark.parametrize("done", [NOTHING, HALF, ALL])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_an_io_error_at_each_step(operation: Operation, done: float) -> None:
    for number in steps(operation, CHANGES):
        fails_and_goes_on(operation, CHANGES, number, errno.EIO, done)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.name != "refcount-table"], ids=str)
def test_a_table_that_cannot_be_read_at_each_step(operation: Operation) -> None:
    forgetful = replace(operation, shape=replace(operation.shape, cache=1024))
    if READ in reference(forgetful).kinds:
        for number in steps(forgetful, frozenset((READ,))):
            fails_and_goes_on(forgetful, frozenset((READ,)), number, errno.EIO, NOTHING)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_no_space_at_each_step(operation: Operation) -> None:
    for number in steps(operation, GROWTH):
        fails_and_goes_on(operation, GROWTH, number, errno.ENOSPC, HALF)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_device_that_dies_at_each_step(operation: Operation) -> None:
    wanted = reference(operation)
    for number in steps(operation, CHANGES):
        what = f"{operation}, dead from change {number} on"
        bench = Bench(operation)
        bench.faults.fail(CHANGES, number, errno.EIO, lasting=True)
        bench.act()
        check_after_error(bench, wanted, what)
        bench.shut()
        check_after_error(bench, wanted, f"{what}, closed")


def test_a_flush_waits_for_the_one_that_is_under_way() -> None:
    """What was acknowledged before a flush is stable when it returns, whoever makes it so."""
    bench = Bench(OPERATIONS[0])
    bench.disk.write(0, b"f" * 512)
    held = bench.faults.suspend(FLUSH, 1)
    first = threading.Thread(target=bench.disk.flush)
    first.start()
    assert held.reached.wait(PATIENCE)
    second = threading.Thread(target=bench.disk.flush)
    second.start()
    second.join(0.2)
    waits = second.is_alive()
    held.resume()
    first.join()
    second.join()
    bench.shut()
    assert waits, "the second flush returned though nothing was stable yet"


def test_an_old_table_that_cannot_be_counted_down_is_lost_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = next(operation for operation in OPERATIONS if operation.name == "refcount-table")
    bench = Bench(replace(growing, shape=replace(growing.shape, cache=1024)))
    switch = Qcow2Node.switch_header

    def switch_then_fail(node: Qcow2Node, **fields: int) -> None:
        switch(node, **fields)
        bench.faults.fail(READ)

    monkeypatch.setattr(Qcow2Node, "switch_header", switch_then_fail)
    assert bench.act() is None
    assert bench.faults.failed == 1
    bench.shut()
    assert len(bench.look("closed").check().leaks) == 1


def test_a_new_table_that_may_be_named_already_is_no_longer_new() -> None:
    """The flush after L1 was written failed: from then on the table's entries wait for counts and bytes as those of any other."""
    recorder = RecorderNode(images.create(Shape(cluster=4096)), sector=SECTOR)
    faults = FaultNode(recorder, sector=SECTOR)
    keeper = Disk(faults)
    with images.open_over(faults, writable=True) as disk:
        disk.write(0, b"a" * 4096)
        faults.fail(FLUSH, 2)
        with pytest.raises(CowhandError):
            disk.flush()
        disk.write(4096, b"b" * 4096)
        disk.flush()
    keeper.close()

    def judge(state: replay.CrashState) -> None:
        image = oracle.Image(state.image.snapshot_bytes())
        assert image.check().corruptions == []
        assert image.content()[4096:8192] in (bytes(4096), b"b" * 4096)

    replay.replay(replay.crash_states(recorder.log, samples=60), judge)


def test_disks_know_the_size_that_a_failed_change_left() -> None:
    faults = FaultNode(images.create(PLAIN))
    keeper = Disk(faults)
    disk = images.open_over(faults, writable=True)
    images.snapshot_create(disk, "small")
    disk.resize(2 * PLAIN.size)
    before = faults.counts[FLUSH]
    images.snapshot_apply(disk, "small")
    flushes = faults.counts[FLUSH] - before
    disk.resize(2 * PLAIN.size)
    assert isinstance(disk.root, Qcow2Node)
    faults.fail(FLUSH, flushes)
    with pytest.raises(CowhandError):
        images.snapshot_apply(disk, "small")
    assert disk.size == disk.root.size == PLAIN.size
    disk.root.amend({"size": PLAIN.size // 2})
    assert disk.size == disk.root.size == PLAIN.size // 2
    disk.close()
    keeper.close()
