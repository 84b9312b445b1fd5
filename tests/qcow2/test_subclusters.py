"""Extended L2 entries: many writes at once, tables read by numpy and without it, and users of one cluster's different subclusters."""

from __future__ import annotations

import errno
import random
import sys
from array import array
from itertools import pairwise
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.cluster import mapping
from cowhand.block.formats.qcow2.cluster.extended_mapping import ALL_DATA, ALL_ZERO, ExtendedMapping
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount import l2_scan
from cowhand.block.formats.qcow2.refcount.counted import Tally
from cowhand.block.node.node import WRITE_REQUEST, Request
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import ImageCorrupt, NoSpace, Poisoned
from cowhand.core.extents import DATA, ZERO, ExtentBatch
from cowhand.image.snapshots import create_snapshot, delete_snapshot, open_snapshot
from cowhand.testing.faults import FaultNode
from tests.block.disks import Worker, impatient_interpreter, qcow2_disk, qcow2_file, qcow2_node
from tests.block.test_batch import sound_content
from tests.qcow2 import oracle

CLUSTER = 16384
SUB = CLUSTER // 32
COUNT = 64
SIZE = COUNT * CLUSTER


def extended(**options: Any) -> MemoryNode:
    return qcow2_file(SIZE, cluster_size=CLUSTER, extended_l2=True, **options)


def kinds(disk: Disk) -> list[str]:
    """Return a letter for each subcluster of the disk's own layer: data, zero, or neither."""
    out: list[str] = []
    for batch in disk.extents(depth=1):
        for row in batch:
            letter = "d" if row.flags & DATA else "z" if row.flags & ZERO and row.flags & 4 else "-"
            out += letter * (row.length // SUB)
    return out


# -- many writes at once


@pytest.mark.parametrize("seed", range(6))
def test_batches_of_small_writes_over_everything_that_subclusters_can_be(seed: int) -> None:
    """In a model of bytes: over data, zeroes, a backing file, clusters of a snapshot, compressed ones; in order, adjoining, twice in one."""
    rng = random.Random(seed)
    base = rng.randbytes(SIZE * 3 // 4)
    backed = bool(seed % 2)
    file = extended()
    keeper = Disk(file)
    model = bytearray(base.ljust(SIZE, b"\0") if backed else bytes(SIZE))
    with Disk(qcow2_node(file, backing=MemoryNode(content=base) if backed else None), writable=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        packed = node.codec.compress(b"pack" * (CLUSTER // 4))
        assert packed is not None
        for number in range(0, COUNT, 9):
            node.write_compressed(number * CLUSTER, packed)
            model[number * CLUSTER : (number + 1) * CLUSTER] = b"pack" * (CLUSTER // 4)
        for turn in range(12):
            if turn == 5:
                create_snapshot(disk, "kept")
                kept = bytes(model)
            for _ in range(6):
                at = rng.randrange(SIZE // 512 - 64) * 512
                length = rng.randrange(1, 64) * 512
                if rng.random() < 0.5:
                    disk.write_zeroes(at, length, unmap=rng.random() < 0.5)
                else:
                    disk.write_zeroes(at // CLUSTER * CLUSTER, CLUSTER)
                    at, length = at // CLUSTER * CLUSTER, CLUSTER
                model[at : at + length] = bytes(length)
            batch: list[Request] = []
            at = 0
            for _ in range(40):
                if rng.random() < 0.5:
                    at = rng.randrange(SIZE - CLUSTER)
                    at -= at % rng.choice((1, 512, SUB, CLUSTER))
                data = rng.randbytes(rng.choice((100, 512, SUB, SUB, 3 * SUB, CLUSTER)))
                data = data[: SIZE - at]
                batch.append((WRITE_REQUEST, at, data))
                model[at : at + len(data)] = data
                at += len(data)
            disk.submit(batch)
            assert disk.read(0, SIZE) == model
        with open_snapshot(disk, "kept") as view:
            assert view.read(0, SIZE) == kept
        delete_snapshot(disk, "kept")
    keeper.close()
    assert sound_content(file, base if backed else b"") == model


def test_scattered_first_writes_take_adjoining_clusters_and_no_more_than_their_subclusters() -> None:
    file = extended()
    keeper = Disk(file)
    order = random.Random(2).sample(range(COUNT), COUNT)
    with Disk(qcow2_node(file), writable=True) as disk:
        disk.submit([(WRITE_REQUEST, number * CLUSTER + number % 32 * SUB, b"x" * SUB) for number in order])
        hosts = {
            row.start // CLUSTER: row.host - row.start % CLUSTER
            for b in disk.extents(depth=1)
            for row in b
            if row.flags & DATA
        }
        assert {b - a for a, b in pairwise(hosts[number] for number in order)} == {CLUSTER}
        assert kinds(disk) == [
            letter for number in range(COUNT) for letter in "-" * (number % 32) + "d" + "-" * (31 - number % 32)
        ]
        # Into the places that they have now: nothing is taken.
        end = file.size // CLUSTER
        disk.submit([(WRITE_REQUEST, number * CLUSTER + (number + 5) % 32 * SUB, b"y" * SUB) for number in order])
        assert kinds(disk).count("d") == 2 * COUNT
        disk.flush()
        assert file.size // CLUSTER == end
    keeper.close()
    sound_content(file)


def test_adjoining_writes_to_one_cluster_are_one_write() -> None:
    file = extended()
    keeper = Disk(file)
    fault = FaultNode(file)
    with Disk(qcow2_node(fault, backing=MemoryNode(content=b"b" * SIZE)), writable=True) as disk:
        disk.write(SIZE - 1, b"t")
        before = fault.counts["write"]
        # Three quarters of one cluster, in pieces that end inside subclusters, from inside of one on.
        pieces = [
            (WRITE_REQUEST, 3 * CLUSTER + 700 + 100 * n, bytes([n % 250 + 1]) * 100) for n in range(CLUSTER * 3 // 400)
        ]
        disk.submit(pieces)
        assert fault.counts["write"] == before + 1
        expected = b"b" * 700 + b"".join(piece for _, _, piece in pieces)
        assert disk.read(3 * CLUSTER, CLUSTER) == expected.ljust(CLUSTER, b"b")
        assert kinds(disk)[3 * 32 : 4 * 32] == list("-ddddddddddddddddddddddddd------")
    keeper.close()
    sound_content(file, b"b" * SIZE)


def test_a_later_write_in_place_does_not_overtake_one_that_needs_space_beside_it() -> None:
    file = extended()
    keeper = Disk(file)
    with Disk(qcow2_node(file), writable=True) as disk:
        disk.write(5 * SUB, b"o" * SUB)
        disk.submit(
            [
                (WRITE_REQUEST, 4 * SUB, b"a" * 2 * SUB),  # one subcluster is new, the other is not
                (WRITE_REQUEST, 5 * SUB + 100, b"b" * 100),
                (WRITE_REQUEST, 40 * SUB, b"c" * SUB),
            ]
        )
        expected = (bytes(4 * SUB) + b"a" * (SUB + 100) + b"b" * 100 + b"a" * (SUB - 200)).ljust(40 * SUB, b"\0")
        assert disk.read(0, 41 * SUB) == expected + b"c" * SUB
    keeper.close()
    sound_content(file)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("placed", [False, True])
def test_one_that_fails_leaves_the_others(nth: int, placed: bool) -> None:
    file = extended()
    keeper = Disk(file)
    fault = FaultNode(file)
    with Disk(qcow2_node(fault, backing=MemoryNode(content=b"z" * SIZE)), writable=True) as disk:
        for number in range(3):
            disk.write(number * CLUSTER if placed else SIZE - SUB, b"p" * SUB)
        fault.fail("write", nth, errno.ENOSPC)
        writes = [(WRITE_REQUEST, number * CLUSTER + 4 * SUB, b"x" * SUB) for number in range(3)]
        with pytest.raises(NoSpace):
            disk.submit(writes)
        assert [disk.read(at, 1) for _, at, _ in writes] == [b"z" if n == nth - 1 else b"x" for n in range(3)]
        disk.submit([(WRITE_REQUEST, at, b"y" * SUB) for _, at, _ in writes])
        assert [disk.read(at, SUB) for _, at, _ in writes] == [b"y" * SUB] * 3
    keeper.close()
    sound_content(file, b"z" * SIZE)


@pytest.mark.parametrize("backed", [False, True])
def test_writers_of_one_clusters_different_subclusters(backed: bool) -> None:
    """Four threads take every fourth subcluster of the same new clusters, by batches, one by one, and with parts of subclusters."""
    file = extended()
    keeper = Disk(file)
    base = random.Random(3).randbytes(SIZE) if backed else bytes(SIZE)
    with Disk(qcow2_node(file, backing=MemoryNode(content=base) if backed else None), writable=True) as disk:

        def write(side: int) -> None:
            data = bytes([side + 1]) * (SUB if side % 2 else SUB - 100)
            for first in range(side, COUNT * 32, 128):
                numbers = range(first, min(first + 128, COUNT * 32), 4)
                if side == 3:
                    for number in numbers:
                        disk.write(number * SUB, data)
                else:
                    disk.submit([(WRITE_REQUEST, number * SUB, data) for number in numbers])

        with impatient_interpreter():
            for worker in [Worker(write, side) for side in range(4)]:
                worker.done()
    keeper.close()
    content = sound_content(file, base if backed else b"")
    for number in range(COUNT * 32):
        side = number % 4
        expected = bytes([side + 1]) * (SUB if side % 2 else SUB - 100)
        rest = base[number * SUB + len(expected) : (number + 1) * SUB]
        assert content[number * SUB : (number + 1) * SUB] == expected + rest, number


def test_zeroing_and_writing_different_subclusters_at_once() -> None:
    file = extended()
    keeper = Disk(file)
    base = b"b" * SIZE
    with Disk(qcow2_node(file, backing=MemoryNode(content=base)), writable=True) as disk:

        def work(side: int) -> None:
            for number in range(side, COUNT * 32, 2):
                if side:
                    disk.write_zeroes(number * SUB, SUB, unmap=bool(number & 2))
                else:
                    disk.submit([(WRITE_REQUEST, number * SUB, b"w" * SUB), (WRITE_REQUEST, number * SUB + 7, b"v")])

        with impatient_interpreter():
            for worker in [Worker(work, 0), Worker(work, 1)]:
                worker.done()
        assert kinds(disk) == list("dz" * (COUNT * 16))
    keeper.close()
    assert sound_content(file, base) == (b"w" * 7 + b"v" + b"w" * (SUB - 8) + bytes(SUB)) * (COUNT * 16)


def test_tables_stay_although_the_cache_is_too_small_for_them() -> None:
    """The writes of a batch lie under many tables, in turn, and the cache holds one."""
    reach = CLUSTER * CLUSTER // 16
    file = qcow2_file(12 * reach, cluster_size=CLUSTER, extended_l2=True)
    keeper = Disk(file)
    written: dict[int, bytes] = {}
    with Disk(qcow2_node(file, **{"l2-cache-size": CLUSTER}), writable=True) as disk:
        for turn in range(6):
            spots = [
                table * reach + (turn // 2) * CLUSTER + (turn + 3 * n) * SUB for table in range(12) for n in range(3)
            ]
            random.Random(turn).shuffle(spots)
            batch = [(WRITE_REQUEST, at, bytes([1 + at // SUB % 255]) * SUB) for at in spots]
            written.update({at: data for _, at, data in batch})
            disk.submit(batch)
    with Disk(qcow2_node(file, writable=False)) as disk:
        assert {at: disk.read(at, SUB) for at in written} == written
    keeper.close()
    findings = oracle.Image(file.snapshot_bytes()).check()
    assert findings == oracle.Findings()


def test_a_batch_does_not_write_over_metadata() -> None:
    """An entry, said to be the guest's alone, names the L1 table; the batch leaves it to the long way, which refuses."""
    file = extended()
    keeper = Disk(file)
    with Disk(qcow2_node(file), writable=True) as disk:
        disk.write(0, b"a" * SUB)
        disk.write(CLUSTER, b"a" * SUB)
    image = bytearray(file.snapshot_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & L.L1_OFFSET_MASK
    image[table : table + 8] = (l1 | L.COPIED).to_bytes(8, "big")
    hostile = MemoryNode(content=bytes(image))
    disk = Disk(qcow2_node(hostile), writable=True)
    with pytest.raises(ImageCorrupt):
        disk.submit([(WRITE_REQUEST, 5 * SUB, b"x" * SUB), (WRITE_REQUEST, CLUSTER + 5 * SUB, b"x" * SUB)])
    assert hostile.snapshot_bytes()[l1 : l1 + 8] == image[l1 : l1 + 8]
    with pytest.raises(Poisoned):
        disk.close()
    keeper.close()


# -- tables as a whole


def random_words(rng: random.Random, count: int, *, damaged: bool = False) -> array[int]:
    """Return *count* entries with their bitmaps, in runs of every kind."""
    words = array("Q")
    host = 1 << 20
    while len(words) < 2 * count:
        kind = rng.randrange(7)
        for _ in range(rng.choice((1, 1, 2, 20))):
            alone = rng.choice((0, L.COPIED, L.COPIED))
            data = rng.getrandbits(32) if rng.random() < 0.3 else rng.choice((0, ALL_DATA))
            zero = rng.getrandbits(32) & ~data if rng.random() < 0.3 else rng.choice((0, ALL_DATA & ~data))
            host += CLUSTER * rng.choice((1, 1, 1, 1, 3))
            pair = (host | alone, data | zero << 32)
            if kind == 0:
                pair = (0, 0)
            elif kind == 1:
                pair = (0, rng.choice((ALL_ZERO, rng.getrandbits(32) << 32)))
            elif kind == 2:
                pair = (L.compressed_entry(host + 512 * rng.randrange(3), 600, 14), 0)
            if damaged and rng.random() < 0.01:
                pair = (pair[0] ^ rng.choice((0, 512, L.L2_OFFSET_MASK)), pair[1] ^ rng.choice((1, 1 << 32, ALL_DATA)))
            words.extend(pair)
    return words[: 2 * count]


@pytest.mark.parametrize("seed", range(12))
def test_numpy_and_the_loop_find_the_same_rows(seed: int) -> None:
    rng = random.Random(seed)
    with qcow2_disk(SIZE, cluster_size=CLUSTER, extended_l2=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node) and isinstance(node.mapping, ExtendedMapping)
        count = node.mapping.entries
        words = random_words(rng, count, damaged=seed % 4 == 3)
        table = Table(bytearray(CLUSTER), 0)
        offset, stop = sorted(rng.sample(range(count * CLUSTER), 2)) if seed % 3 else (0, count * CLUSTER)
        first = offset // CLUSTER
        part = words[2 * first : 2 * -(-stop // CLUSTER)]
        answers = []
        for numpy in (False, True):
            out = ExtentBatch()
            try:
                end = node.mapping._rows(out, part, table, first, offset, stop, 0, numpy)
                answers.append((end, [row[:4] for row in out]))
            except ImageCorrupt as error:
                answers.append((error.message, []))
        assert answers[0] == answers[1]
        if seed % 4 != 3:
            assert answers[0][0] == stop


def test_a_table_of_more_rows_than_a_batch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second subcluster of 2 MiB clusters is data: one table could have four million rows."""
    monkeypatch.setattr(mapping, "_MANY_TABLES", -1)
    with qcow2_disk(64 << 30, cluster_size=2 << 20, extended_l2=True) as disk:
        disk.write(0, b"x")
        node = disk.root
        assert isinstance(node, Qcow2Node)
        table = node.mapping.find(0)
        assert table is not None
        host = int.from_bytes(table.data[:8], "big")
        words = array("Q")
        for number in range(2100):
            words.extend((host + number * (2 << 20), 0x55555555))
        if sys.byteorder == "little":
            words.byteswap()
        table.data[: len(words) * 8] = words.tobytes()
        position = data = rows = 0
        for batch in disk.extents(0, 2100 << 21):
            assert batch.begin == position
            assert len(batch) <= 65536
            position, rows = batch.end, rows + len(batch)
            data += sum(length for length, flags in zip(batch.length, batch.flags, strict=True) if flags & DATA)
        assert (position, data) == (2100 << 21, 2100 << 20)
        assert rows >= 2100 * 32


@pytest.mark.parametrize("seed", range(16))
def test_scans_agree_with_and_without_numpy(seed: int) -> None:
    """Of tables that are sound and of damaged ones: what is counted, and which table has to be looked at closely."""
    rng = random.Random(seed)
    count = CLUSTER // 16
    length = 64 << 20
    if seed % 4 == 0:
        begin = (1 << 20 | L.COPIED) if seed else (1 << 20)
        words = array("Q")
        for number in range(count):
            words.extend((begin + number * CLUSTER, ALL_DATA if seed < 8 else rng.getrandbits(32)))
        if seed == 12:
            words[2 * rng.randrange(count) + 1] = ALL_DATA | 1 << 40
    else:
        words = random_words(rng, count, damaged=seed % 4 == 3)
    words.byteswap()
    answers = []
    for numpy in (False, True):
        tally = Tally(4, length // CLUSTER, lambda cluster, times: None)
        if numpy:
            tally.use_numpy()
        scanner = l2_scan.Scanner(14, tally, length, extended=True)
        found = scanner.scan(words.tobytes(), 2)
        counts = [tally.get(cluster) for cluster in range(length // CLUSTER)]
        answers.append((found if found is None else found[:3], counts))
    assert answers[0] == answers[1]
    assert (answers[0][0] is None) <= (seed % 4 == 3 or seed == 12)
    if seed == 12:
        assert answers[0] == (None, [0] * len(answers[0][1]))
