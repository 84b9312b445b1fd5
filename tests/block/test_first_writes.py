"""First writes of a batch: one reservation for all, in columns; what one of them meets does not harm the others."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.format_io.batch_rows import UnitWrites
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.node import READ, WRITE_REQUEST, Request
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, IOFailed, NoSpace, Poisoned
from cowhand.image.check import check
from cowhand.image.create import create
from cowhand.testing.faults import FaultNode
from tests.block.disks import PATIENCE, Worker, qcow2_file, qcow2_node
from tests.qcow2 import oracle
from tests.tools.qemu import assert_clean, qemu_img, require_qemu

COUNT = 32
#: cluster, and options of the image
PLAIN = (4096, {})
EXTENDED = (16384, {"extended_l2": True})


class Image:
    """An image in memory with a fault node below it, its data in a second one where *data* says so; *backed*: over a base of noise."""

    def __init__(self, cluster: int, options: dict[str, Any], *, backed: bool = False, data: bool = False) -> None:
        self.size = COUNT * cluster
        self.cluster = cluster
        self.base = random.Random(7).randbytes(self.size) if backed else b""
        self.external = MemoryNode() if data else None
        given: dict[str, Any] = {}
        if self.external is not None:
            options = {**options, "data_file_node": self.external, "data_file": "x"}
        self.file = qcow2_file(self.size, cluster_size=cluster, **options)
        self.media = [FaultNode(node) for node in (self.file, self.external) if node is not None]
        self.keepers = [Disk(node) for node in self.media]
        if data:
            given["data-file"] = self.media[1]
        node = qcow2_node(self.media[0], backing=MemoryNode(content=self.base) if backed else None, **given)
        assert isinstance(node, Qcow2Node)
        self.node = node
        self.disk = Disk(node, writable=True)
        self.model = bytearray(self.base.ljust(self.size, b"\0"))

    @property
    def data(self) -> FaultNode:
        """Where guest data goes."""
        return self.media[-1]

    def submit(self, writes: Sequence[tuple[int, Buffer]]) -> None:
        """Write, and have the model hold it."""
        self.disk.submit([(WRITE_REQUEST, at, data) for at, data in writes])
        for at, data in writes:
            self.model[at : at + len(data)] = data

    def judge(self) -> None:
        """Close it, and raise unless another reader finds it sound, without leaks, and as the model."""
        assert self.disk.read(0, self.size) == self.model
        assert self.node._batches == [] and self.node._reserved == []
        self.disk.close()
        for keeper in self.keepers:
            keeper.close()
        external = [self.external.snapshot_bytes()] if self.external is not None else []
        image = oracle.Image(self.file.snapshot_bytes(), self.base, *external)
        findings = image.check()
        assert findings.corruptions == [] and findings.leaks == []
        assert image.content() == self.model


def apart(rng: random.Random, image: Image, count: int) -> list[tuple[int, bytes]]:
    """Return writes that do not overlap, in any order: some adjoin, some lie in one cluster, few go over two."""
    places: list[tuple[int, int]] = []
    at = 0
    sizes = (9, 100, 512, 512, 1024, image.cluster // 2, image.cluster)
    while len(places) < count and at < image.size:
        at += rng.choice((0, 0, 1, 512, 700, image.cluster // 4, image.cluster))
        at = at if rng.random() < 0.5 else -(-at // 512) * 512
        length = min(rng.choice(sizes), image.size - at)
        if length > 8:  # a shorter one may be what was there before, by chance
            places.append((at, length))
        at += length
    rng.shuffle(places)
    return [(at, rng.randbytes(length)) for at, length in places]


SHAPES = [
    pytest.param(cluster, {**options, **more}, kind, id=f"{name}-{kind}{'-lazy' if more else ''}")
    for name, (cluster, options) in (("plain", PLAIN), ("extended", EXTENDED))
    for kind in ("alone", "backed", "data", "backed data")
    for more in ({}, {"lazy_refcounts": True})
    if not more or kind == "alone"
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("cluster", "options", "kind"), SHAPES)
def test_one_failing_write_costs_one_request_at_most(
    cluster: int, options: dict[str, Any], kind: str, seed: int
) -> None:
    """Whatever write of a batch fails first: the batch raises just when one request is missing, and all others are done."""
    rng = random.Random(seed)
    image = Image(cluster, options, backed="backed" in kind, data="data" in kind)
    raised = 0
    for turn in range(8):
        if turn == 4:
            image.disk.write_zeroes(0, image.size // 2, unmap=bool(seed % 2))
            image.model[: image.size // 2] = bytes(image.size // 2)
        writes = apart(rng, image, 24)
        image.data.fail("write", rng.randrange(1, 20), rng.choice((errno.EIO, errno.ENOSPC)))
        error: CowhandError | None = None
        try:
            image.disk.submit([(WRITE_REQUEST, at, data) for at, data in writes])
        except (IOFailed, NoSpace) as failure:
            error = failure
        image.data.reset()
        missing = [(at, data) for at, data in writes if image.disk.read(at, len(data)) != data]
        # Of a write over two clusters the first part may be there.
        assert len(missing) == (error is not None)
        raised += error is not None
        for at, data in writes:
            image.model[at : at + len(data)] = image.disk.read(at, len(data)) if (at, data) in missing else data
    assert raised or kind != "alone"
    image.submit(apart(rng, image, 30))
    image.judge()


@pytest.mark.parametrize("lasting", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(("cluster", "options", "kind"), SHAPES)
def test_all_writes_fail_and_nothing_is_seen_of_them(
    cluster: int, options: dict[str, Any], kind: str, lasting: int
) -> None:
    image = Image(cluster, options, backed="backed" in kind, data="data" in kind)
    image.submit([(0, b"table"), (cluster + 5, b"a")])
    writes = [(number * cluster + cluster // 2 + shift, b"x" * 20) for number in range(2, 12) for shift in (0, 700)]
    image.data.fail("write", 1, lasting, lasting=True)
    with pytest.raises((IOFailed, NoSpace)):
        image.disk.submit([(WRITE_REQUEST, at, data) for at, data in writes])
    image.data.reset()
    assert image.disk.read(0, image.size) == image.model
    image.submit(writes)
    image.judge()


@pytest.mark.parametrize(("cluster", "options"), [PLAIN, EXTENDED], ids=["plain", "extended"])
def test_writes_apart_in_one_cluster_are_one_write(cluster: int, options: dict[str, Any]) -> None:
    """Over a backing file, what lies between them comes with them; in subclusters of their own they are apart."""
    image = Image(cluster, options, backed=True)
    image.submit([(image.size - 1, b"t")])
    image.data.counts.clear()
    image.submit([(n * cluster + at, bytes([n + 1]) * 60) for at in (300, 10, 100, 50) for n in range(4)])
    if not options:
        assert image.data.counts["write"] == 1  # four clusters, one behind the other
    else:
        assert image.data.counts["write"] == 4  # a subcluster of each of four clusters
        image.submit([(n * cluster + at, b"y" * 512) for at in (1024, 4096, 8192) for n in range(4)])
        assert image.data.counts["write"] == 16
    image.judge()


def test_the_ends_of_a_cluster_alone_bring_its_middle_with_them() -> None:
    image = Image(*PLAIN, backed=True)
    image.submit([(n * 4096 + at, b"e" * 100) for n in range(3) for at in (0, 3996)])
    image.judge()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_row_that_fails_leaves_the_cluster_to_another_one(nth: int) -> None:
    """Two subclusters of one new cluster; the cluster stays the image's, whichever of them fails."""
    image = Image(*EXTENDED)
    image.submit([(image.size - 1, b"t")])
    writes = [(512, b"a" * 512), (4096, b"b" * 512), (image.cluster, b"c" * 512)]
    image.data.fail("write", nth)
    with pytest.raises(IOFailed):
        image.submit(writes)
    done = [write for number, write in enumerate(writes, 1) if number != nth]
    for at, data in done:
        image.model[at : at + len(data)] = data
    image.judge()


def test_without_anything_below_only_the_bytes_are_written() -> None:
    image = Image(*PLAIN)
    image.submit([(image.size - 1, b"t")])
    before = image.file.size
    written: list[int] = []
    inner = image.data.write

    def write(offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        written.append(sum(map(len, buffers)))
        inner(offset, buffers, fua)

    image.node.file.write = write
    image.submit([(4096 + at, b"w" * 10) for at in (100, 3000, 2000)])
    assert written == [10] * 3 and image.file.size <= before + 4096
    image.judge()


def test_first_writes_over_zero_clusters_need_no_more_than_their_bytes() -> None:
    for cluster, options in (PLAIN, EXTENDED):
        image = Image(cluster, options, backed=True)
        image.disk.write_zeroes(0, image.size, unmap=True)
        image.model[:] = bytes(image.size)
        image.data.counts.clear()
        image.data.reset()
        image.submit([(n * cluster + 100 * n, b"z" * 700) for n in range(COUNT)])
        assert image.data.counts["read"] == 0 and image.data.counts["write"] == COUNT
        image.judge()


@pytest.mark.parametrize(("cluster", "options"), [PLAIN, EXTENDED], ids=["plain", "extended"])
def test_batches_fill_holes(cluster: int, options: dict[str, Any]) -> None:
    """Space that was given back here and there is used again, also where no run of it is as long as the batch."""
    image = Image(cluster, options)
    rng = random.Random(3)
    image.submit([(n * cluster, rng.randbytes(cluster)) for n in range(COUNT)])
    end = 0
    for turn in range(12):
        numbers = rng.sample(range(COUNT), 8) if turn % 3 else list(range(turn, turn + 8))
        for number in numbers:
            image.disk.discard(number * cluster, cluster)
        for _ in range(2):
            image.disk.flush()
        image.submit([(number * cluster + 9, rng.randbytes(200)) for number in numbers])
        for number in numbers:
            image.model[number * cluster : number * cluster + 9] = bytes(9)
            image.model[number * cluster + 209 : (number + 1) * cluster] = bytes(cluster - 209)
        assert image.disk.read(0, image.size) == image.model
        end = end or image.file.size
        assert image.file.size == end, turn
    image.judge()


def test_many_small_requests_for_one_cluster_cost_their_number() -> None:
    """Ten thousand of them neither adjoin nor come in order."""
    image = Image(65536, {})
    image.submit([(image.size - 1, b"t")])
    places = random.Random(1).sample(range(0, 65536, 6), 10_000)
    begin = time.process_time()
    image.submit([(at, b"abc") for at in places])
    assert time.process_time() - begin < 20
    image.judge()


@pytest.mark.parametrize("extended", [False, True])
def test_new_tables_of_a_batch_are_counted_together(extended: bool) -> None:
    """With lazy reference counts the file counts all of them before one holds data."""
    cluster = 16384 if extended else 512
    reach = cluster * (cluster // (16 if extended else 8))
    file = qcow2_file(8 * reach, cluster_size=cluster, extended_l2=extended, lazy_refcounts=True)
    keeper = Disk(file)
    fault = FaultNode(file)
    with Disk(qcow2_node(fault), writable=True) as disk:
        disk.write(0, b"first")
        batch = [(WRITE_REQUEST, table * reach + 5, b"x" * 100) for table in range(1, 8)]
        fault.fail("flush", lasting=True)
        with pytest.raises(IOFailed):
            disk.submit(batch)
        assert [disk.read(at, 100) for _, at, _ in batch] == [bytes(100)] * 7
        fault.reset()
        disk.submit(batch)
        assert fault.counts["flush"] == 1
        assert [disk.read(at, 100) for _, at, _ in batch] == [b"x" * 100] * 7
    keeper.close()
    assert oracle.Image(file.snapshot_bytes()).check() == oracle.Findings()


# -- others meanwhile


@pytest.mark.parametrize(("cluster", "options"), [PLAIN, EXTENDED], ids=["plain", "extended"])
def test_who_wants_a_unit_of_the_batch_waits_and_others_do_not(cluster: int, options: dict[str, Any]) -> None:
    image = Image(cluster, options)
    image.submit([(image.size - 1, b"t")])
    pause = image.data.suspend("write")
    batch = [(n * cluster + 10, bytes([n + 1]) * 20) for n in range(4)]
    first = Worker(image.submit, batch)
    assert pause.reached.wait(PATIENCE)
    wanted = Worker(image.disk.write, 3 * cluster + 200, b"w" * 20)
    Worker(image.disk.write, 5 * cluster, b"elsewhere").done()
    Worker(image.disk.submit, [(WRITE_REQUEST, n * cluster, b"too") for n in (6, 7)]).done()
    wanted.join(0.1)
    assert wanted.is_alive()
    assert image.disk.read(0, 5 * cluster) == bytes(5 * cluster)
    pause.resume()
    first.done()
    wanted.done()
    for at, data in (
        *batch,
        (3 * cluster + 200, b"w" * 20),
        (5 * cluster, b"elsewhere"),
        (6 * cluster, b"too"),
        (7 * cluster, b"too"),
    ):
        image.model[at : at + len(data)] = data
    image.judge()


def test_a_long_write_stops_before_the_units_of_a_batch() -> None:
    image = Image(*PLAIN)
    image.submit([(image.size - 1, b"t")])
    pause = image.data.suspend("write")
    first = Worker(image.disk.submit, [(WRITE_REQUEST, n * 4096 + 10, b"batch") for n in (3, 4)])
    assert pause.reached.wait(PATIENCE)
    long = Worker(image.disk.write, 0, b"l" * 6 * 4096)
    while image.disk.read(3 * 4096 - 1, 1) != b"l":
        assert long.is_alive()
    pause.resume()
    first.done()
    long.done()
    image.model[: 6 * 4096] = b"l" * 6 * 4096
    image.judge()


@pytest.mark.parametrize(("cluster", "options"), [PLAIN, EXTENDED], ids=["plain", "extended"])
def test_a_batch_does_what_it_can_before_it_waits_for_another_writer(cluster: int, options: dict[str, Any]) -> None:
    image = Image(cluster, options)
    image.submit([(image.size - 1, b"t")])
    pause = image.data.suspend("write")
    slow = Worker(image.disk.write, cluster, b"slow")
    assert pause.reached.wait(PATIENCE)
    batch = Worker(image.disk.submit, [(WRITE_REQUEST, n * cluster + 4, b"fast") for n in range(3)])
    batch.join(0.1)
    assert batch.is_alive()
    assert [image.disk.read(n * cluster + 4, 4) for n in range(3)] == [b"fast", bytes(4), b"fast"]
    pause.resume()
    slow.done()
    batch.done()
    for n in range(3):
        image.model[n * cluster + 4 : n * cluster + 8] = b"fast"
    image.model[cluster : cluster + 4] = b"slow"
    image.judge()


def test_poison_found_while_the_bytes_are_on_their_way() -> None:
    image = Image(*EXTENDED)
    image.submit([(image.size - 1, b"t")])
    pause = image.data.suspend("write")
    batch = Worker(image.disk.submit, [(WRITE_REQUEST, n * image.cluster, b"x") for n in range(3)])
    assert pause.reached.wait(PATIENCE)
    image.node.set_poison(RuntimeError())
    pause.resume()
    with pytest.raises(Poisoned):
        batch.done()
    assert image.disk.read(0, image.size) == image.model
    assert image.node._batches == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_that_nobody_expects_poisons(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image(*PLAIN)
    image.submit([(image.size - 1, b"t")])

    def write(offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        raise error

    image.node.file.write = write
    with pytest.raises(error):
        image.disk.submit([(WRITE_REQUEST, n * 4096, b"x") for n in range(3)])
    assert image.node.poison is not None and image.node._batches == []
    assert image.disk.read(0, image.size) == image.model
    with pytest.raises(Poisoned):
        image.disk.write(0, b"x")


def test_a_unit_that_gets_its_place_meanwhile_is_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests of a batch for the same bytes: the first finds no place for them, the second one that another thread has made since."""
    for name, options in (("x", {}), ("y", {"data_file": str(tmp_path / "d")})):
        create(tmp_path / name, "qcow2", 1 << 20, options)
        with cowhand.open(tmp_path / name, writable=True) as disk:
            node: Any = disk.root
            disk.write(1 << 19, b"table")
            seen, inner_map, inner_places = [0], node.map, node.mapping.places

            def look(offset: int, length: int, seen: Any = seen, inner: Any = inner_map, node: Any = node) -> Any:
                seen[0] += 1
                if seen[0] == 3:  # the first is looked at twice
                    node.write(8192, (b"other",))
                return inner(offset, length)

            def places(batch: Any, inner: Any = inner_places, node: Any = node) -> Any:
                first = inner(batch[:1])
                if first is None:
                    return None
                node.write(8192, (b"other",))
                return first[0], first[1] + inner(batch[1:])[1]

            with monkeypatch.context() as patch:
                patch.setattr(node, "map", look)
                patch.setattr(node, "places", places)
                disk.submit([(WRITE_REQUEST, 0, b"first"), (WRITE_REQUEST, 0, b"2nd"), (WRITE_REQUEST, 4, b"x")])
            assert disk.read(0, 5) == b"2ndsx"
            assert disk.read(8192, 5) == b"other"


# -- the columns by themselves


@pytest.mark.parametrize("seed", range(20))
def test_rows_never_share_a_copy_unit_and_hold_everything_in_its_order(seed: int) -> None:
    rng = random.Random(seed)
    unit, part = rng.choice(((4096, 4096), (16384, 512)))
    writes = UnitWrites(unit, part)
    kept: list[tuple[int, bytes]] = []
    for number in range(60):
        at = rng.randrange(3 * unit)
        if kept and rng.random() < 0.5:
            at = min(kept[-1][0] + len(kept[-1][1]), 3 * unit - 1)
        data = bytes([number + 1]) * rng.randrange(1, min(1500, unit - at % unit + 1))
        if at // unit not in writes.numbers:
            writes.add(at // unit, at, data)
        elif not writes.join(at // unit, at, data):
            assert part < unit  # with one part for each unit there is one row, which everything joins
            continue
        kept.append((at, data))
    spans = [writes.span(row) for row in range(len(writes.offsets))]
    touched = [piece for begin, end in spans for piece in range(begin, end, part)]
    assert len(touched) == len(set(touched))
    assert {piece * part for at, data in kept for piece in range(at // part, (at + len(data) - 1) // part + 1)} == set(
        touched
    )
    by_row = [request for row in range(len(spans)) for request in writes.requests(row)]
    expected, found = bytearray(3 * unit), bytearray(3 * unit)
    for model, requests in ((expected, kept), (found, by_row)):
        for at, data in requests:
            model[at : at + len(data)] = data
    assert found == expected
    for begin in range(0, 3 * unit, unit):
        assert writes.owned(begin, begin + unit) == (
            begin if any(at // unit * unit == begin for at, _ in kept) else None
        )


# -- on files


@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("backed", [False, True])
def test_a_data_file_stays_sparse_and_shows_nothing_old(extended: str, backed: bool, tmp_path: Path) -> None:
    """Around first writes nothing is written where the file has a hole; what a discarded cluster held there does not show again."""
    size, cluster = 8 << 20, 65536
    options = {"data_file": str(tmp_path / "d"), "extended_l2": extended}
    model = bytearray(size)
    if backed:
        model[: size // 2] = random.Random(1).randbytes(size // 2)
        (tmp_path / "base").write_bytes(model[: size // 2])
        options |= {"backing_file": str(tmp_path / "base"), "backing_fmt": "raw"}
    create(tmp_path / "x", "qcow2", size, options)
    with open(tmp_path / "probe", "wb") as probe:
        probe.truncate(size)
    sparse = (tmp_path / "probe").stat().st_blocks == 0
    with cowhand.open(tmp_path / "x", writable=True) as disk:
        for turn in range(3):
            writes = [(n * cluster + 5000 * turn + 10, bytes([n + turn + 1]) * 1000) for n in range(turn, 120, 2)]
            for at, data in writes:
                model[at : at + len(data)] = data
            disk.submit([(WRITE_REQUEST, at, data) for at, data in writes[:40]])
            for at, data in writes[40:]:
                disk.write(at, data)
            assert disk.read(0, size) == model
            used = (tmp_path / "d").stat().st_blocks * 512
            assert backed or not sparse or used < size // 4
            disk.discard(turn * cluster, 40 * cluster)
            model[turn * cluster : (turn + 40) * cluster] = bytes(40 * cluster)
        assert disk.read(0, size) == model
    assert check(tmp_path / "x").findings == []


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lazy_refcounts": "on"},
        {"cluster_size": "4k"},
        {"extended_l2": "on"},
        {"data_file": "d"},
        {"data_file": "d", "extended_l2": "on"},
    ],
    ids=str,
)
def test_qemu_reads_what_batches_wrote(options: dict[str, str], tmp_path: Path) -> None:
    rng = random.Random(str(options))
    size = 4 << 20
    if "data_file" in options:
        options = {**options, "data_file": str(tmp_path / "d")}
    create(tmp_path / "x", "qcow2", size, options)
    model = bytearray(size)
    with cowhand.open(tmp_path / "x", writable=True) as disk:
        for _ in range(12):
            batch: list[Request] = []
            for _ in range(48):
                data = rng.randbytes(rng.choice((100, 2048, 4096, 4096)))
                at = rng.randrange(0, size - 4096, 2048)
                batch.append((WRITE_REQUEST, at, data))
                model[at : at + len(data)] = data
            disk.submit(batch)
            buffer = bytearray(size)
            disk.submit([(READ, 0, buffer)])
            assert buffer == model
    (tmp_path / "model").write_bytes(model)
    assert_clean(tmp_path / "x")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "x", tmp_path / "model")
