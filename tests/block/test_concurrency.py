"""Many threads on one image: nothing that was written is lost, and nothing is written where it does not belong any more."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.extents import DATA, ZERO
from cowhand.image import snapshots
from cowhand.image.create import create
from cowhand.testing.faults import FaultNode
from cowhand.testing.recorder import RecorderNode
from tests.block.disks import (
    PATIENCE,
    Worker,
    blkdebug_over,
    impatient_interpreter,
    qcow2_disk,
    qcow2_file,
    qcow2_node,
)
from tests.qcow2 import oracle
from tests.tools.qemu import assert_clean, require_qemu

CLUSTER = 4096


def content_of(file: MemoryNode, backing: bytes = b"") -> bytes:
    """Return the guest's bytes of the closed image in *file* as another reader sees them, having found it sound and without leaks."""
    image = oracle.Image(file.snapshot_bytes(), backing)
    findings = image.check()
    assert findings.corruptions == []
    assert findings.leaks == []
    return bytes(image.content())


def write_halves(disk: Disk, pairs: int) -> None:
    """Have two threads write the two halves of each cluster, both at the same moment."""
    barrier = threading.Barrier(2)
    half = CLUSTER // 2

    def write(side: int) -> None:
        data = bytes([side + 1]) * half
        for number in range(pairs):
            barrier.wait(PATIENCE)
            disk.write(number * CLUSTER + side * half, data)

    for worker in [Worker(write, 0), Worker(write, 1)]:
        worker.done()


class TestTwoWritesIntoOneNewCluster:
    """Two disjoint writes by two threads into one new cluster both survive."""

    WRITTEN = b"\1" * (CLUSTER // 2) + b"\2" * (CLUSTER // 2)

    @require_qemu
    @pytest.mark.interop
    def test_ten_thousand_times(self, image_dir: Path) -> None:
        path = image_dir / "a.qcow2"
        pairs = 10_000
        create(path, "qcow2", pairs * CLUSTER, {"cluster_size": CLUSTER})
        with impatient_interpreter(), cowhand.open(path, writable=True) as disk:
            write_halves(disk, pairs)
        with cowhand.open(path) as disk:
            for number in range(pairs):
                assert disk.read(number * CLUSTER, CLUSTER) == self.WRITTEN, f"cluster {number}"
        assert_clean(path)

    @pytest.mark.parametrize("before", ["backed", "zero", "zero with its place", "compressed"])
    def test_over_what_was_there_before(self, before: str) -> None:
        pairs = 500
        backing = MemoryNode(content=b"\xbb" * (pairs * CLUSTER)) if before == "backed" else None
        file = qcow2_file(pairs * CLUSTER, cluster_size=CLUSTER)
        with Disk(qcow2_node(file, backing=backing), writable=True) as disk:
            if before == "zero":
                disk.write_zeroes(0, disk.size)
            elif before == "zero with its place":
                disk.write(0, bytes(disk.size))
                disk.write_zeroes(0, disk.size)
            elif before == "compressed":
                node: Any = disk.root
                for number in range(pairs):
                    node.write_compressed(number * CLUSTER, node.codec.compress(b"c" * CLUSTER))
            keeper = Disk(file)
            with impatient_interpreter():
                write_halves(disk, pairs)
        keeper.close()
        assert content_of(file, b"") == self.WRITTEN * pairs

    @pytest.mark.parametrize("data", [False, True])
    @pytest.mark.parametrize("backed", [False, True])
    def test_into_subclusters(self, backed: bool, data: bool) -> None:
        """Pieces of subclusters and whole ones, of the same cluster and of the same subcluster: 10,000 pairs of writes in all."""
        clusters, unit, rounds = 250, 16384, 10
        below = b"\xbb" * (clusters * unit)
        nodes = {"data_file_node": MemoryNode(), "data_file": "x"} if data else {}
        keepers = [Disk(node) for node in nodes.values() if isinstance(node, MemoryNode)]
        file = qcow2_file(clusters * unit, cluster_size=unit, extended_l2=True, **nodes)
        given = {"data-file": nodes["data_file_node"]} if data else {}
        root = qcow2_node(file, backing=MemoryNode(content=below) if backed else None, **given)
        keepers.append(Disk(file))
        expected = bytearray(below if backed else bytes(len(below)))
        barrier = threading.Barrier(2)

        def write(side: int) -> None:
            for number in range(clusters * rounds):
                barrier.wait(PATIENCE)
                disk.write(*place(number, side))

        def place(number: int, side: int) -> tuple[int, bytes]:
            # Rounds go over the clusters anew, so that writes meet in new and in placed clusters.
            begin = number % clusters * unit + number // clusters * 1300
            length = (200, 512, 700, 600)[number % 4]
            return begin + side * length, bytes([number % 250 + 1 + side]) * length

        with Disk(root, writable=True) as disk, impatient_interpreter():
            for worker in [Worker(write, 0), Worker(write, 1)]:
                worker.done()
        for keeper in keepers:
            keeper.close()
        for number in range(clusters * rounds):
            for side in (0, 1):
                begin, content = place(number, side)
                expected[begin : begin + len(content)] = content
        external = [nodes["data_file_node"].snapshot_bytes()] if data else []  # type: ignore[attr-defined]
        image = oracle.Image(file.snapshot_bytes(), below if backed else b"", *external)
        assert image.check().corruptions == []
        assert image.content() == expected

    def test_the_second_waits_for_the_first(self) -> None:
        file = qcow2_file(1 << 20, cluster_size=CLUSTER)
        debug = blkdebug_over(file)
        with Disk(qcow2_node(debug), writable=True) as disk:
            debug.breakpoint("write_aio", "first")
            first = Worker(disk.write, 0, b"\1" * 100)
            assert debug.wait_suspended("first", PATIENCE)
            second = Worker(disk.write, 200, b"\2" * 100)
            second.join(0.1)
            assert second.is_alive()
            elsewhere = Worker(disk.write, CLUSTER, b"\3" * 100)
            elsewhere.done()
            assert disk.read(0, 300) == bytes(300)
            debug.resume("first")
            first.done()
            second.done()
            assert disk.read(0, 300) == b"\1" * 100 + bytes(100) + b"\2" * 100

    def test_the_second_takes_over_when_the_first_fails(self) -> None:
        fault = FaultNode(qcow2_file(1 << 20, cluster_size=CLUSTER))
        debug = blkdebug_over(fault)
        with Disk(qcow2_node(debug), writable=True) as disk:
            disk.write(CLUSTER, b"the table is there")
            disk.flush()
            debug.breakpoint("write_aio", "first")
            first = Worker(disk.write, 0, b"\1" * 100)
            assert debug.wait_suspended("first", PATIENCE)
            second = Worker(disk.write, 200, b"\2" * 100)
            fault.fail("write")
            debug.resume("first")
            with pytest.raises(OSError):
                first.done()
            second.done()
            assert disk.read(0, 300) == bytes(200) + b"\2" * 100


def suspended_write(writer: str) -> None:
    """Suspend an in-place write, take its cluster away from under it, use the space for something else, and let it go on."""
    size = 64 * CLUSTER
    file = qcow2_file(size, cluster_size=CLUSTER)
    keeper = Disk(file)
    debug = blkdebug_over(file)
    disk = Disk(qcow2_node(debug), writable=True)
    model = bytearray(size)
    disk.write(0, b"\1" * (4 * CLUSTER))
    disk.flush()
    debug.breakpoint("write_aio", "slow")
    if writer == "write":
        slow = Worker(disk.write, CLUSTER, b"\xee" * CLUSTER)
    else:
        slow = Worker(disk.submit, [(1, CLUSTER, b"\xee" * CLUSTER)])
    assert debug.wait_suspended("slow", PATIENCE)
    model[: 4 * CLUSTER] = b"\1" * (4 * CLUSTER)
    disk.discard(CLUSTER, CLUSTER)
    for _ in range(3):
        disk.flush()
    for number in range(8, 40):
        disk.write(number * CLUSTER, bytes([number]) * CLUSTER)
        model[number * CLUSTER : (number + 1) * CLUSTER] = bytes([number]) * CLUSTER
        disk.flush()
    debug.resume("slow")
    slow.done()
    found = disk.read(CLUSTER, CLUSTER)
    assert found in (bytes(CLUSTER), b"\xee" * CLUSTER)
    model[CLUSTER : 2 * CLUSTER] = found
    assert disk.read(0, size) == model
    disk.close()
    assert content_of(file) == model
    keeper.close()


class TestSuspendedWrite:
    """An in-place write that is suspended while its cluster is discarded and others allocate destroys nothing."""

    @pytest.mark.parametrize("writer", ["write", "submit"])
    def test_it_destroys_nothing(self, writer: str) -> None:
        suspended_write(writer)

    def test_a_suspended_read_sees_what_it_began_with_or_zeroes(self) -> None:
        file = qcow2_file(64 * CLUSTER, cluster_size=CLUSTER)
        debug = blkdebug_over(file)
        with Disk(qcow2_node(debug), writable=True) as disk:
            disk.write(0, b"\1" * CLUSTER)
            disk.flush()
            debug.breakpoint("read_aio", "slow")
            buffer = bytearray(CLUSTER)
            slow = Worker(disk.read_into, 0, buffer)
            assert debug.wait_suspended("slow", PATIENCE)
            disk.discard(0, CLUSTER)
            disk.flush()
            for number in range(8, 20):
                disk.write(number * CLUSTER, b"\xcc" * CLUSTER)
                disk.flush()
            debug.resume("slow")
            slow.done()
            assert buffer in (b"\1" * CLUSTER, bytes(CLUSTER))

    def test_the_space_is_used_again_when_it_has_ended(self) -> None:
        file = qcow2_file(64 * CLUSTER, cluster_size=CLUSTER)
        with Disk(qcow2_node(file), writable=True) as disk:
            disk.write(0, b"\1" * (4 * CLUSTER))
            disk.flush()
            disk.discard(0, 4 * CLUSTER)
            disk.flush()
            disk.flush()
            end = file.size
            disk.write(8 * CLUSTER, b"\2" * (4 * CLUSTER))
            assert file.size == end

    def test_a_lease_holds_what_was_freed(self) -> None:
        file = qcow2_file(64 * CLUSTER, cluster_size=CLUSTER)
        with Disk(qcow2_node(file), writable=True) as disk:
            disk.write(0, b"\1" * (4 * CLUSTER))
            disk.flush()
            child, host = disk.root.map(0, CLUSTER)[2:]  # type: ignore[attr-defined]
            with disk.lease():
                disk.discard(0, 4 * CLUSTER)
                for _ in range(3):
                    disk.flush()
                disk.write(8 * CLUSTER, b"\2" * (16 * CLUSTER))
                buffer = bytearray(4 * CLUSTER)
                child.read_into(host, buffer)
                assert buffer == b"\1" * (4 * CLUSTER)
            end = file.size
            disk.flush()
            disk.flush()
            disk.write(32 * CLUSTER, b"\3" * (4 * CLUSTER))
            child.read_into(host, buffer)
            assert buffer == b"\3" * (4 * CLUSTER)
            assert file.size == end


class _Stamper:
    """Threads that stamp their own sectors, interleaved with those of the others, with rising numbers."""

    SECTOR = 512

    def __init__(self, disk: Disk, threads: int) -> None:
        self.disk = disk
        self.threads = threads
        self.sectors = disk.size // self.SECTOR
        self.last = [0] * self.sectors
        self.total = 0
        self._stop = threading.Event()
        self._workers = [Worker(self._stamp, number) for number in range(threads)]

    def content(self, sector: int, stamp: int) -> bytes:
        return stamp.to_bytes(8, "big") * (self.SECTOR // 8) if stamp else bytes(self.SECTOR)

    def _stamp(self, number: int) -> None:
        rng = random.Random(number)
        stamp = 0
        while not self._stop.is_set():
            stamp += 1
            sector = rng.randrange(self.sectors // self.threads) * self.threads + number
            if stamp % 50 == 0:
                self.disk.flush()
            if stamp % 4 == 0:
                self.disk.submit([(1, sector * self.SECTOR, self.content(sector, stamp))])
            else:
                self.disk.write(sector * self.SECTOR, self.content(sector, stamp))
            self.last[sector] = stamp
            assert self.disk.read(sector * self.SECTOR, self.SECTOR) == self.content(sector, stamp)

    def running(self) -> bool:
        return all(worker.is_alive() for worker in self._workers)

    def stop(self) -> bytes:
        """End all threads; return what the disk must hold."""
        self._stop.set()
        for worker in self._workers:
            worker.done()
        return b"".join(self.content(sector, stamp) for sector, stamp in enumerate(self.last))


def commit_into(top: Disk, base: BlockNode) -> None:
    """Copy what *top*'s root holds itself into *base*, nobody else being at work."""
    with Disk(base, writable=True) as lower:
        for batch in top.extents(depth=1):
            for row in batch:
                if row.flags & DATA:
                    lower.write(row.start, top.read(row.start, row.length))
                elif row.flags & ZERO and row.depth == 0:
                    lower.write_zeroes(row.start, row.length)


class TestReplacedRoot:
    """A root replaced under writing threads loses no write, and nothing is written into the old root afterwards."""

    SIZE = 256 * 1024

    @pytest.mark.parametrize("format", ["qcow2", "raw"])
    def test_overlays_come_and_go_under_eight_writers(self, format: str) -> None:
        recorder = RecorderNode(
            qcow2_file(self.SIZE, cluster_size=CLUSTER) if format == "qcow2" else MemoryNode(content=bytes(self.SIZE))
        )
        keeper = Disk(recorder)
        base = qcow2_node(recorder) if format == "qcow2" else recorder
        disk = Disk(base, writable=True)
        held = Disk(base)  # keeps the base open while it is replaced
        stampers = _Stamper(disk, 8)
        for _ in range(6):
            before = sum(stampers.last)
            overlay = qcow2_node(qcow2_file(self.SIZE, cluster_size=CLUSTER), backing=base)
            disk.replace_root(overlay)
            changes = len(recorder.log.changes)
            self._wait_for_more(stampers, before)
            assert len(recorder.log.changes) == changes, recorder.log.changes[changes:]
            with disk.still():
                commit_into(disk, base)
                disk.replace_root(base)
            assert overlay.closed
            self._wait_for_more(stampers, sum(stampers.last))
        expected = stampers.stop()
        assert disk.read(0, disk.size) == expected
        disk.close()
        held.close()
        if format == "qcow2":
            assert content_of(recorder.inner) == expected  # type: ignore[arg-type]
        keeper.close()

    @staticmethod
    def _wait_for_more(stampers: _Stamper, before: int) -> None:
        wait = threading.Event()
        for _ in range(2000):
            if sum(stampers.last) > before + 2000 or not stampers.running():
                break
            wait.wait(0.005)
        assert sum(stampers.last) > before

    def test_a_chain_grows_under_writers(self) -> None:
        base: BlockNode = qcow2_node(qcow2_file(self.SIZE, cluster_size=CLUSTER))
        disk = Disk(base, writable=True)
        stampers = _Stamper(disk, 8)
        for _ in range(5):
            before = sum(stampers.last)
            disk.replace_root(qcow2_node(qcow2_file(self.SIZE, cluster_size=512), backing=disk.root))
            self._wait_for_more(stampers, before)
        expected = stampers.stop()
        assert disk.read(0, disk.size) == expected
        disk.close()

    def test_nothing_is_left_to_be_written_into_the_old_root(self) -> None:
        recorder = RecorderNode(qcow2_file(self.SIZE, cluster_size=CLUSTER))
        keeper = Disk(recorder)
        base = qcow2_node(recorder)
        disk = Disk(base, writable=True)
        disk.write(0, b"1" * self.SIZE)
        disk.discard(CLUSTER, 8 * CLUSTER)
        disk.flush()
        disk.discard(16 * CLUSTER, CLUSTER)
        disk.replace_root(qcow2_node(qcow2_file(self.SIZE), backing=base))
        changes = len(recorder.log.changes)
        disk.write(0, b"2" * self.SIZE)
        disk.close()
        assert base.closed
        assert len(recorder.log.changes) == changes
        assert content_of(recorder.inner)[:CLUSTER] == b"1" * CLUSTER  # type: ignore[arg-type]
        keeper.close()

    def test_a_conflict_leaves_the_old_root(self) -> None:
        disk = qcow2_disk(self.SIZE)
        other = Disk(MemoryNode(content=bytes(self.SIZE)), writable=True, shared=0)
        old = disk.root
        with pytest.raises(cowhand.core.errors.PermissionConflict):
            disk.replace_root(other.root)
        assert disk.root is old
        disk.write(0, b"still there")
        assert disk.read(0, 11) == b"still there"
        disk.close()
        other.close()

    def test_the_old_root_of_an_unshared_disk_becomes_a_backing_file(self) -> None:
        base = qcow2_node(qcow2_file(self.SIZE))
        disk = Disk(base, writable=True, shared=0)
        disk.write(0, b"below")
        disk.replace_root(qcow2_node(qcow2_file(self.SIZE), backing=base))
        disk.write(100, b"above")
        assert disk.read(0, 5) == b"below"
        probe = bytearray(5)
        base.read_into(100, probe)
        assert probe == bytes(5)
        disk.close()

    def test_two_replace_at_once(self) -> None:
        disk = Disk(MemoryNode(content=bytes(self.SIZE)), writable=True)
        nodes = [MemoryNode(content=bytes([number]) * self.SIZE) for number in range(40)]
        keepers = [Disk(node) for node in nodes]

        def replace(mine: list[MemoryNode]) -> None:
            for node in mine:
                disk.replace_root(node)

        with impatient_interpreter():
            workers = [Worker(replace, nodes[half::2]) for half in range(2)]
            for worker in workers:
                worker.done()
        assert disk.root in (nodes[-1], nodes[-2])
        assert sum(len(node.parents) for node in nodes) == len(nodes) + 1
        disk.close()
        for keeper in keepers:
            keeper.close()


class TestSnapshotsUnderWriters:
    """A snapshot taken under writers holds all that was acknowledged before, nothing that began after, and does not change."""

    def test_each_is_one_moment(self) -> None:
        size = 128 * 1024
        file = qcow2_file(size, cluster_size=CLUSTER)
        keeper = Disk(file)
        disk = Disk(qcow2_node(file), writable=True)
        stampers = _Stamper(disk, 8)
        taken: dict[str, bytes] = {}
        for number in range(12):
            before = list(stampers.last)
            name = f"s{number}"
            snapshots.create_snapshot(disk, name)
            TestReplacedRoot._wait_for_more(stampers, sum(before))
            with snapshots.open_snapshot(disk, name) as view:
                taken[name] = view.read(0, size)
            for sector, stamp in enumerate(before):
                found = int.from_bytes(taken[name][sector * 512 : sector * 512 + 8], "big")
                assert found >= stamp, f"sector {sector} of {name} lost a write"
                assert taken[name][sector * 512 : (sector + 1) * 512] == stampers.content(sector, found)
            if number % 3 == 2:
                gone = f"s{number - 1}"
                snapshots.delete_snapshot(disk, gone)
                del taken[gone]
        expected = stampers.stop()
        for name, content in taken.items():
            with snapshots.open_snapshot(disk, name) as view:
                assert view.read(0, size) == content
        assert disk.read(0, size) == expected
        snapshots.apply_snapshot(disk, "s3")
        assert disk.read(0, size) == taken["s3"]
        disk.close()
        assert content_of(file) == taken["s3"]
        keeper.close()


class TestMixedThreads:
    """Threads that write, zero, discard, flush and read regions of their own see their own model throughout."""

    @pytest.mark.parametrize(
        "options", [{"cluster_size": 512}, {"cluster_size": 4096}, {"cluster_size": 65536, "refcount_bits": 1}], ids=str
    )
    @pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
    @pytest.mark.parametrize(
        "caches", [{}, {"l2-cache-size": 1024, "refcount-cache-size": 512}], ids=["", "tiny caches"]
    )
    def test_regions_of_sectors(self, options: dict[str, int], backed: bool, caches: dict[str, int]) -> None:
        size = 1 << 20
        base = random.Random(1).randbytes(size * 3 // 4)
        backing = MemoryNode(content=base) if backed else None
        file = qcow2_file(size, **options)
        keeper = Disk(file)
        disk = Disk(qcow2_node(file, backing=backing, **caches), writable=True)
        model = bytearray((base if backed else b"").ljust(size, b"\0"))
        count = 6
        # Bands of 1.5 clusters: neighbours meet in the middle of clusters.
        band = -(-options["cluster_size"] * 3 // 2 // 512) * 512

        def live(number: int) -> None:
            rng = random.Random(number)
            bands = range(number * band, size - band, count * band)
            for step in range(250):
                begin = rng.choice(bands)
                offset = begin + rng.randrange(band // 512) * 512
                length = min(rng.choice((512, 1024, band)), begin + band - offset)
                kind = rng.randrange(8)
                if kind < 4:
                    data = rng.randbytes(length)
                    disk.write(offset, data)
                    model[offset : offset + length] = data
                elif kind == 4:
                    disk.write_zeroes(offset, length, unmap=bool(step % 2))
                    model[offset : offset + length] = bytes(length)
                elif kind == 5:
                    disk.discard(offset, length)
                    found = disk.read(offset, length)
                    assert all(now in (0, was) for now, was in zip(found, model[offset : offset + length], strict=True))
                    model[offset : offset + length] = found
                elif kind == 6 and step % 5 == 0:
                    disk.flush()
                else:
                    assert disk.read(offset, length) == model[offset : offset + length]

        with impatient_interpreter():
            for worker in [Worker(live, number) for number in range(count)]:
                worker.done()
        assert disk.read(0, size) == model
        disk.close()
        assert content_of(file, base if backed else b"") == model
        keeper.close()

    def test_growth_under_writers(self) -> None:
        disk = qcow2_disk(64 * CLUSTER, cluster_size=512)
        stampers = _Stamper(disk, 4)
        size = disk.size
        for _ in range(20):
            size += 37 * 512
            disk.resize(size)
        expected = stampers.stop()
        assert disk.size == size
        assert disk.read(0, size) == expected.ljust(size, b"\0")
        disk.close()

    def test_closing_ends_other_threads_with_an_error(self) -> None:
        disk = qcow2_disk(64 * CLUSTER)
        stampers = _Stamper(disk, 4)
        TestReplacedRoot._wait_for_more(stampers, 0)
        closers = [Worker(disk.close) for _ in range(3)]
        for worker in closers:
            worker.done()
        with pytest.raises(cowhand.core.errors.Closed):
            stampers.stop()


def test_oldest_request_counts_all_disks_above() -> None:
    from cowhand.block.graph.request_order import oldest_in_flight

    base = MemoryNode(content=bytes(65536))
    reader = Disk(base)
    upper = qcow2_disk(65536, backing=base)
    with reader.lease() as first, upper.lease() as second:
        assert first < second
        assert oldest_in_flight(base) == first
        assert oldest_in_flight(upper.root) == second
    assert oldest_in_flight(base) > second
    upper.close()
    reader.close()
    assert graph.disks_above((base,)) == []
