"""Many writes at once that need space: they take it together, and one that fails does not take the others along."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.format_io import batch as batch_module
from cowhand.block.node.node import READ, WRITE_REQUEST
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import NoSpace
from cowhand.core.extents import DATA
from cowhand.image.check import check
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot
from cowhand.testing.faults import FaultNode
from tests.block.disks import PATIENCE, Worker, impatient_interpreter, qcow2_file, qcow2_node
from tests.qcow2 import oracle

CLUSTER = 4096
COUNT = 64


def sound_content(file: MemoryNode, backing: bytes = b"") -> bytes:
    """Return the guest's bytes of the closed image in *file*, which another reader finds sound and without leaks."""
    image = oracle.Image(file.snapshot_bytes(), backing)
    findings = image.check()
    assert findings.corruptions == []
    assert findings.leaks == []
    return bytes(image.content())


@pytest.mark.parametrize("backed", [False, True])
def test_scattered_first_writes_lie_one_behind_the_other(backed: bool) -> None:
    base = random.Random(1).randbytes(COUNT * CLUSTER)
    backing = MemoryNode(content=base) if backed else None
    file = qcow2_file(COUNT * CLUSTER, cluster_size=CLUSTER)
    keeper = Disk(file)
    model = bytearray(base if backed else bytes(len(base)))
    order = random.Random(2).sample(range(COUNT), COUNT)
    with Disk(qcow2_node(file, backing=backing), writable=True) as disk:
        disk.write(order[0] * CLUSTER, b"0")
        model[order[0] * CLUSTER] = ord("0")
        batch = []
        for number in order:
            at, data = number * CLUSTER + number * 7, bytes([number + 1]) * (number + 1)
            batch.append((WRITE_REQUEST, at, data))
            model[at : at + len(data)] = data
        disk.submit(batch)
        assert disk.read(0, disk.size) == model
        hosts = {}
        for rows in disk.extents(depth=1):
            for start, length, flags, host in zip(rows.start, rows.length, rows.flags, rows.host, strict=True):
                assert flags & DATA
                hosts.update({start + step: host + step for step in range(0, length, CLUSTER)})
        places = [hosts[number * CLUSTER] for number in order]
        assert places == list(range(places[0], places[0] + COUNT * CLUSTER, CLUSTER))
    keeper.close()
    assert sound_content(file, base if backed else b"") == model


def test_two_writes_to_one_cluster_and_writes_over_two() -> None:
    file = qcow2_file(COUNT * CLUSTER, cluster_size=CLUSTER)
    keeper = Disk(file)
    with Disk(qcow2_node(file), writable=True) as disk:
        disk.submit(
            [
                (WRITE_REQUEST, 0, b"a" * 100),
                (WRITE_REQUEST, 2000, b"b" * 100),
                (WRITE_REQUEST, 2 * CLUSTER - 50, b"c" * 100),
                (WRITE_REQUEST, 5 * CLUSTER, b""),
                (WRITE_REQUEST, 7 * CLUSTER, b"d" * 3 * CLUSTER),
            ]
        )
        assert disk.read(0, 100) + disk.read(2000, 100) == b"a" * 100 + b"b" * 100
        assert disk.read(2 * CLUSTER - 50, 100) == b"c" * 100
        assert disk.read(7 * CLUSTER, 3 * CLUSTER) == b"d" * 3 * CLUSTER
        model = disk.read(0, disk.size)
    keeper.close()
    assert sound_content(file) == model


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("nth", [1, 3, 5])
def test_one_that_fails_leaves_the_others(nth: int, backed: bool) -> None:
    file = qcow2_file(COUNT * CLUSTER, cluster_size=CLUSTER)
    keeper = Disk(file)
    fault = FaultNode(file)
    backing = MemoryNode(content=b"z" * COUNT * CLUSTER) if backed else None
    with Disk(qcow2_node(fault, backing=backing), writable=True) as disk:
        disk.write(60 * CLUSTER, b"table")
        fault.fail("write", 1, errno.ENOSPC)  # of all together, and then of one of them alone
        fault.fail("write", nth + 1, errno.ENOSPC)
        with pytest.raises(NoSpace):
            disk.submit([(WRITE_REQUEST, number * CLUSTER, b"x" * CLUSTER) for number in range(5)])
        found = [disk.read(number * CLUSTER, 1) for number in range(5)]
        assert found == [b"x" if number != nth - 1 else (b"z" if backed else b"\0") for number in range(5)]
        disk.submit([(WRITE_REQUEST, number * CLUSTER, b"y" * CLUSTER) for number in range(5)])
        assert disk.read(0, 5 * CLUSTER) == b"y" * 5 * CLUSTER
    keeper.close()
    sound_content(file, b"z" * COUNT * CLUSTER if backed else b"")


def test_a_large_batch_is_copied_up_by_two_threads() -> None:
    cluster = 65536
    base = random.Random(3).randbytes(COUNT * cluster)
    file = qcow2_file(COUNT * cluster, cluster_size=cluster)
    keeper = Disk(file)
    model = bytearray(base)
    with Disk(qcow2_node(file, backing=MemoryNode(content=base)), writable=True) as disk:
        numbers = random.Random(4).sample(range(COUNT), COUNT)
        batch = []
        for number in numbers:
            at, data = number * cluster + number * 500, bytes([number + 1]) * (cluster if number % 7 == 0 else 4096)
            at = number * cluster if number % 7 == 0 else at
            batch.append((WRITE_REQUEST, at, data))
            model[at : at + len(data)] = data
        disk.submit(batch)
        assert disk.read(0, disk.size) == model
    keeper.close()
    assert sound_content(file, base) == model


def test_batches_of_two_threads_into_the_same_new_clusters() -> None:
    """Each thread writes its half of every cluster; both halves survive, whoever takes the cluster."""
    rounds, half = 40, CLUSTER // 2
    file = qcow2_file(rounds * COUNT * CLUSTER, cluster_size=CLUSTER)
    keeper = Disk(file)
    with Disk(qcow2_node(file), writable=True) as disk:
        barrier = threading.Barrier(2)

        def write(side: int) -> None:
            data = bytes([side + 1]) * half
            for turn in range(rounds):
                numbers = range(turn * COUNT, (turn + 1) * COUNT)
                barrier.wait(PATIENCE)
                disk.submit([(WRITE_REQUEST, number * CLUSTER + side * half, data) for number in numbers])

        with impatient_interpreter():
            for worker in [Worker(write, 0), Worker(write, 1)]:
                worker.done()
    keeper.close()
    assert sound_content(file) == (b"\1" * half + b"\2" * half) * COUNT * rounds


def test_tables_stay_although_the_cache_is_too_small_for_them() -> None:
    """Each write of a batch lies under a table of its own, and the cache holds one."""
    cluster, tables = 512, 40
    reach = cluster * (cluster // 8)
    file = qcow2_file(tables * reach, cluster_size=cluster)
    keeper = Disk(file)
    model = bytearray(tables * reach)
    with Disk(qcow2_node(file, **{"l2-cache-size": cluster}), writable=True) as disk:
        for step in range(4):
            numbers = [number for number in range(tables) for _ in range(2)]
            batch = []
            for turn, number in enumerate(numbers):
                at = number * reach + (2 * step + turn % 2) * cluster + 5
                data = bytes([1 + (turn + step) % 255]) * 100
                batch.append((WRITE_REQUEST, at, data))
                model[at : at + 100] = data
            random.Random(step).shuffle(batch)
            disk.submit(batch)
        assert disk.read(0, disk.size) == model
    keeper.close()
    assert sound_content(file) == model


@pytest.mark.parametrize("options", [{}, {"cluster_size": "512"}, {"extended_l2": "on"}, {"data_file": "x.data"}])
def test_scattered_batches_on_a_file_do_what_single_requests_do(tmp_path: Path, options: dict[str, str]) -> None:
    chance = random.Random(5)
    size = 3 << 20
    if "data_file" in options:
        options = {**options, "data_file": str(tmp_path / options["data_file"])}
    create(tmp_path / "x", "qcow2", size, options)
    model = bytearray(size)
    with cowhand.open(tmp_path / "x", writable=True) as disk:
        for turn in range(60):
            if turn == 20 and "data_file" not in options:
                create_snapshot(disk, "s")  # every cluster is shared from here on
            if turn % 10 == 5:
                at = chance.randrange(0, size - 200_000)
                disk.write_zeroes(at, 150_000, unmap=bool(turn % 2))
                model[at : at + 150_000] = bytes(150_000)
            spots = chance.sample(range(0, size - 8192, 8192), 40)
            batch = [(WRITE_REQUEST, at, chance.randbytes(chance.choice((512, 4096, 4097, 8000)))) for at in spots]
            for _, at, data in batch:
                model[at : at + len(data)] = data
            disk.submit(batch)
            reads = [(READ, at + 100, bytearray(chance.choice((1, 512, 4096)))) for at in chance.sample(spots, 40)]
            disk.submit(reads)
            for _, at, buffer in reads:
                assert buffer == model[at : at + len(buffer)]
        assert disk.read(0, size) == model
    assert not check(tmp_path / "x").findings
    with cowhand.open(tmp_path / "x") as disk:
        assert disk.read(0, size) == model


def test_a_file_that_ends_early_reads_as_zeroes_and_an_interrupted_write_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path / "x", "qcow2", 1 << 20, {})
    with cowhand.open(tmp_path / "x", writable=True) as disk:
        disk.write(0, b"a" * (1 << 20))
        os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 65536 - 1000)
        spots = (0, 1 << 19, (15 << 16) - 1100, (15 << 16) + 5000)
        reads = [(READ, at, bytearray(b"?" * 4096)) for at in spots]
        disk.submit(reads)
        shown = [bytes(buffer) for _, _, buffer in reads]
        assert shown == [disk.read(at, 4096) for at in spots]
        assert shown[0] == b"a" * 4096 and shown[3] == bytes(4096)

        short = iter((1000, -1, 4096, 0, 4096))

        def pwritev(descriptor: int, buffers: tuple[bytes, ...], offset: int, flags: int = 0) -> int:
            count = next(short)
            if count < 0:
                raise InterruptedError
            return os.pwritev(descriptor, [buffers[0][:count]], offset)

        with monkeypatch.context() as patch:
            patch.setattr(batch_module, "_pwritev", pwritev)
            disk.submit([(WRITE_REQUEST, at, b"b" * 4096) for at in range(0, 5 << 16, 1 << 16)])
        assert [disk.read(at, 4096) for at in range(0, 5 << 16, 1 << 16)] == [b"b" * 4096] * 5
