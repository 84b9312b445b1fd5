"""The disk: range and permission, batches equal to single requests, what is stable when, counters, hooks, life."""

from __future__ import annotations

import errno
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import (
    CONSISTENT_READ,
    DISCARD,
    FLUSH,
    READ,
    WRITE_REQUEST,
    ZERO_REQUEST,
    ZERO_UNMAP,
    BlockNode,
    Capabilities,
    Request,
    Zeroing,
)
from cowhand.block.node.options import NodeOptions
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import (
    Closed,
    CowhandError,
    ImageCorrupt,
    InvalidArgument,
    IOFailed,
    NoSpace,
    NotSupported,
    OutOfRange,
    PermissionConflict,
    ReadOnly,
)
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from cowhand.testing.faults import FaultNode
from cowhand.testing.recorder import RecorderNode
from tests.block.disks import qcow2_disk, qcow2_file, qcow2_node

SIZE = 1 << 20


class PlainNode(BlockNode):
    """Bytes, and nothing else: no discard, no zeroes, no batches."""

    driver = "plain"

    def __init__(self, size: int) -> None:
        super().__init__(NodeOptions(read_only=False))
        self.content = bytearray(size)
        self.capabilities = Capabilities(writable=True)

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, offset: int, buffer: Any) -> None:
        memoryview(buffer)[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, buffers: Any, fua: bool = False) -> None:
        data = b"".join(buffers)
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass


def memory_disk(**options: Any) -> Disk:
    return Disk(MemoryNode(content=bytes(SIZE)), **{"writable": True, **options})


class TestRange:
    @pytest.mark.parametrize(
        "call",
        [
            lambda disk, o, n: disk.read(o, n),
            lambda disk, o, n: disk.read_into(o, bytearray(n)),
            lambda disk, o, n: disk.write(o, bytes(n)),
            lambda disk, o, n: disk.write(o, bytes(n - 1), b"x"),
            lambda disk, o, n: disk.write_zeroes(o, n),
            lambda disk, o, n: disk.discard(o, n),
            lambda disk, o, n: list(disk.extents(o, n)),
            lambda disk, o, n: disk.submit([(READ, 0, bytearray(1)), (READ, o, bytearray(n))]),
            lambda disk, o, n: disk.submit([(ZERO_REQUEST, o, n)]),
        ],
    )
    @pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (1 << 70, 1)])
    @pytest.mark.parametrize("make", [memory_disk, lambda: qcow2_disk(SIZE)], ids=["memory", "qcow2"])
    def test_outside(
        self, call: Callable[[Disk, int, int], object], offset: int, length: int, make: Callable[[], Disk]
    ) -> None:
        with make() as disk:
            with pytest.raises(OutOfRange) as caught:
                call(disk, offset, length)
            assert caught.value.offset == offset
            assert caught.value.errno == errno.EINVAL
            assert disk.read(0, SIZE) == bytes(SIZE)
            assert not disk.in_flight

    def test_a_negative_length(self) -> None:
        with memory_disk() as disk:
            for call in (disk.write_zeroes, disk.discard):
                with pytest.raises(OutOfRange):
                    call(10, -5)

    def test_nothing_of_a_batch_is_done_when_one_request_is_outside(self) -> None:
        with memory_disk() as disk:
            with pytest.raises(OutOfRange):
                disk.submit([(WRITE_REQUEST, 0, b"x"), (WRITE_REQUEST, SIZE, b"x")])
            assert disk.read(0, 1) == b"\0"

    @pytest.mark.parametrize("make", [memory_disk, lambda: qcow2_disk(SIZE)], ids=["memory", "qcow2"])
    def test_empty_requests_are_allowed_up_to_the_end(self, make: Callable[[], Disk]) -> None:
        with make() as disk:
            for offset in (0, 513, SIZE):
                assert disk.read(offset, 0) == b""
                disk.write(offset)
                disk.write(offset, b"")
                disk.write_zeroes(offset, 0)
                disk.discard(offset, 0)
                disk.submit([(READ, offset, bytearray()), (WRITE_REQUEST, offset, b""), (ZERO_REQUEST, offset, 0)])
                assert list(disk.extents(offset, 0)) == []
            disk.submit([])
            assert disk.read(0, SIZE) == bytes(SIZE)


class TestPermission:
    @pytest.mark.parametrize(
        "call",
        [
            lambda disk: disk.write(0, b"x"),
            lambda disk: disk.write_zeroes(0, 512),
            lambda disk: disk.discard(0, 512),
            lambda disk: disk.resize(2 * SIZE),
            lambda disk: disk.submit([(READ, 0, bytearray(1)), (DISCARD, 0, 512)]),
            lambda disk: disk.write_vmstate(0, b"x"),
        ],
    )
    def test_a_read_only_disk_changes_nothing(self, call: Callable[[Disk], object]) -> None:
        recorder = RecorderNode(MemoryNode(content=bytes(SIZE)))
        with Disk(recorder) as disk:
            with pytest.raises(ReadOnly) as caught:
                call(disk)
            assert caught.value.errno == errno.EACCES
            disk.flush()
            assert not recorder.log.changes
            assert not recorder.log.flushes

    def test_a_read_only_node_is_not_opened_for_writing(self) -> None:
        node = qcow2_node(qcow2_file(SIZE), writable=False)
        with pytest.raises(ReadOnly):
            Disk(node, writable=True)
        graph.close_node(node)

    def test_what_one_disk_does_not_share_another_does_not_get(self) -> None:
        node = MemoryNode(content=bytes(SIZE))
        first = Disk(node, writable=True, shared=CONSISTENT_READ)
        with pytest.raises(PermissionConflict, match=f"disk '{first.name}' does not share write"):
            Disk(node, writable=True)
        with Disk(node) as reader:
            first.write(0, b"x")
            assert reader.read(0, 1) == b"x"
            with pytest.raises(PermissionConflict, match="uses what would be refused"):
                Disk(node, shared=CONSISTENT_READ)
        first.close()

    def test_shrinking_has_to_be_insisted_on(self) -> None:
        with memory_disk() as disk:
            with pytest.raises(InvalidArgument, match="would lose its last 512 bytes"):
                disk.resize(SIZE - 512)
            disk.resize(SIZE - 512, shrink=True)
            with pytest.raises(OutOfRange):
                disk.read(SIZE - 512, 1)


def nodes_of(folder: Path) -> dict[str, Callable[[], BlockNode]]:
    """Return ways to make the same empty disk."""

    def file(format: str, **options: Any) -> BlockNode:
        path = folder / f"{format}{len(list(folder.iterdir()))}"
        create(path, format, SIZE)
        return Opening(REGISTRY).open(str(path), format=format, options={"read-only": False, **options})

    return {
        "memory": lambda: MemoryNode(content=bytes(SIZE)),
        "plain": lambda: PlainNode(SIZE),
        "raw file": lambda: file("raw"),
        "raw file with discard": lambda: file("raw", discard="unmap"),
        "qcow2 file": lambda: file("qcow2"),
        "qcow2 in memory": lambda: qcow2_node(qcow2_file(SIZE, cluster_size=512)),
        "qcow2 over a backing file": lambda: qcow2_node(
            qcow2_file(SIZE, cluster_size=4096), backing=MemoryNode(content=bytes(SIZE))
        ),
        "coarse": lambda: FaultNode(MemoryNode(content=bytes(SIZE)), sector=4096),
        "guarded": lambda: Opening(REGISTRY).open({"driver": "raw", "file": MemoryNode(content=bytes(SIZE))}),
    }


NODES = list(nodes_of(Path()))


class TestSubmit:
    """A batch does what its requests would do one by one."""

    @pytest.mark.parametrize("kind", NODES)
    def test_a_batch_equals_single_requests(self, kind: str, tmp_path: Path, rng: random.Random) -> None:
        make = nodes_of(tmp_path)[kind]
        with Disk(make(), writable=True) as batched, Disk(make(), writable=True) as single:
            model = bytearray(SIZE)
            for _ in range(25):
                batch, reads = self._draw(rng, model)
                batched.submit(batch)
                for request_kind, offset, what in batch:
                    self._single(single, request_kind, offset, what)
                for buffer, expected in reads:
                    assert buffer == expected
                assert batched.read(0, SIZE) == single.read(0, SIZE) == model
            counts = [disk.counters() for disk in (batched, single)]
            assert counts[0] == {**counts[1], "read": counts[0]["read"]}
            assert counts[0]["read"]["bytes"] == counts[1]["read"]["bytes"]

    @staticmethod
    def _draw(rng: random.Random, model: bytearray) -> tuple[list[Request], list[tuple[bytearray, bytes]]]:
        """Draw requests that do not overlap, many of them adjoining; apply them to *model*."""
        position = rng.randrange(0, SIZE // 2, 512)
        batch: list[Request] = []
        reads: list[tuple[bytearray, bytes]] = []
        while len(batch) < 40:
            length = rng.choice((0, 512, 512, 4096, 4096, 700, 65536))
            if position + length > SIZE:
                break
            kind = rng.choice(
                (READ, READ, WRITE_REQUEST, WRITE_REQUEST, WRITE_REQUEST, ZERO_REQUEST, ZERO_UNMAP, FLUSH)
            )
            if kind == READ:
                buffer = bytearray(b"\xee" * length)
                reads.append((buffer, bytes(model[position : position + length])))
                batch.append((READ, position, buffer))
            elif kind == WRITE_REQUEST:
                data = rng.choice((bytes, bytearray, memoryview))(rng.randbytes(length))
                batch.append((WRITE_REQUEST, position, data))
                model[position : position + length] = data
            elif kind == FLUSH:
                batch.append((FLUSH, 0, 0))
            else:
                batch.append((kind, position, length))
                model[position : position + length] = bytes(length)
            position += length + rng.choice((0, 0, 0, 0, 512, 33))
        return batch, reads

    @staticmethod
    def _single(disk: Disk, kind: int, offset: int, what: Any) -> None:
        if kind == READ:
            disk.read_into(offset, bytearray(len(what)))
        elif kind == WRITE_REQUEST:
            disk.write(offset, what)
        elif kind == FLUSH:
            disk.flush()
        else:
            disk.write_zeroes(offset, what, unmap=kind == ZERO_UNMAP)

    @pytest.mark.parametrize("kind", NODES)
    def test_discards_keep_or_zero(self, kind: str, tmp_path: Path) -> None:
        with Disk(nodes_of(tmp_path)[kind](), writable=True) as disk:
            disk.write(0, b"a" * SIZE)
            disk.submit([(DISCARD, 65536, 65536), (WRITE_REQUEST, 0, b"b" * 512), (DISCARD, 200_000, 33)])
            found = disk.read(0, SIZE)
            assert found[:512] == b"b" * 512
            assert found[65536:131072] in (b"a" * 65536, bytes(65536))
            assert found[200_000:200_033] in (b"a" * 33, bytes(33))
            assert set(found[512:65536] + found[131072:200_000] + found[200_033:]) == {ord("a")}

    @pytest.mark.parametrize("under", ["protocol", "qcow2"])
    def test_the_rest_is_done_when_one_fails(self, under: str) -> None:
        file = qcow2_file(SIZE) if under == "qcow2" else MemoryNode(content=bytes(SIZE))
        fault = FaultNode(file)
        with Disk(qcow2_node(fault) if under == "qcow2" else fault, writable=True) as disk:
            disk.write(0, b"a" * 65536)
            fault.fail("write", 2, errno.ENOSPC)
            with pytest.raises(NoSpace):
                disk.submit([(WRITE_REQUEST, at, b"b" * 512) for at in (0, 1024, 2048)])
            assert [disk.read(at, 1) for at in (0, 1024, 2048)] == [b"b", b"a", b"b"]

    def test_a_damaged_table_ends_the_batch_with_an_error(self) -> None:
        file = qcow2_file(SIZE, cluster_size=4096)
        with Disk(qcow2_node(file), writable=True) as disk:
            disk.write(0, b"x" * 4096)
        content = file.snapshot_bytes()
        table = int.from_bytes(content[40:48], "big")
        first = int.from_bytes(content[table : table + 8], "big") & (1 << 56) - 512
        file = MemoryNode(content=content)
        file.write(first + 6, (b"\x02\x00",))  # no cluster begins at 512 bytes
        with Disk(qcow2_node(file, writable=False)) as disk:
            buffer = bytearray(b"x" * 4096)
            with pytest.raises(ImageCorrupt, match="unaligned"):
                disk.submit([(READ, 0, bytearray(4096)), (READ, 4096, buffer)])
            assert buffer == bytes(4096)


class TestStability:
    """What a flush, FUA and the write-through mode make stable."""

    @pytest.mark.parametrize("format", ["memory", "qcow2", "raw"])
    @pytest.mark.parametrize("how", ["flush", "fua", "through", "through submit"])
    def test_acknowledged_data_is_stable(self, format: str, how: str) -> None:
        recorder = RecorderNode(
            qcow2_file(SIZE, cluster_size=512) if format == "qcow2" else MemoryNode(content=bytes(SIZE))
        )
        node: BlockNode = recorder
        if format == "qcow2":
            node = qcow2_node(recorder)
        elif format == "raw":
            node = Opening(REGISTRY).open({"driver": "raw", "file": recorder})
        log = recorder.log
        with Disk(node, writable=True, write_through=how.startswith("through")) as disk:
            for number in range(40):
                offset = number % 30 * 1000
                if how == "through submit":
                    disk.submit([(WRITE_REQUEST, offset, b"x" * 300), (ZERO_REQUEST, offset + 300, 300)])
                else:
                    disk.write(offset, b"x" * 300, fua=how == "fua")
                    disk.write_zeroes(offset + 300, 300, fua=how == "fua")
                if how == "flush":
                    disk.flush()
                horizon = log.horizon(log.now())
                unstable = [change for change in log.changes if not change.fua and (change.end or 0) > horizon]
                assert not unstable, f"step {number}: {unstable}"
            assert log.changes

    def test_a_flush_without_changes_does_nothing(self) -> None:
        recorder = RecorderNode(qcow2_file(SIZE))
        with Disk(qcow2_node(recorder), writable=True) as disk:
            disk.write(0, b"x")
            disk.flush()
            count = len(recorder.log.flushes)
            disk.flush()
            disk.read(0, 512)
            disk.flush()
            assert len(recorder.log.flushes) == count

    def test_writeback_does_not_flush_by_itself(self) -> None:
        recorder = RecorderNode(MemoryNode(content=bytes(SIZE)))
        with Disk(recorder, writable=True) as disk:
            disk.write(0, b"x")
            disk.submit([(WRITE_REQUEST, 0, b"y")])
            assert not recorder.log.flushes
        assert recorder.log.flushes

    def test_a_flush_that_returned_covers_other_threads_writes(self) -> None:
        from tests.block.disks import Worker

        recorder = RecorderNode(qcow2_file(SIZE, cluster_size=512))
        log = recorder.log
        with Disk(qcow2_node(recorder), writable=True) as disk:

            def live(number: int) -> None:
                rng = random.Random(number)
                for _ in range(60):
                    disk.write((rng.randrange(200) * 8 + number) * 512, rng.randbytes(512))
                    before = log.now()
                    disk.flush()
                    assert log.horizon(log.now()) > 0
                    mine = [change for change in list(log.changes) if change.end is not None and change.end < before]
                    horizon = log.horizon(log.now())
                    assert all(change.end < horizon for change in mine if change.end is not None)

            for worker in [Worker(live, number) for number in range(6)]:
                worker.done()

    def test_a_failed_flush_is_told_and_told_again(self) -> None:
        fault = FaultNode(qcow2_file(SIZE))
        disk = Disk(qcow2_node(fault), writable=True)
        disk.write(0, b"x")
        fault.fail("flush", lasting=True)
        for _ in range(2):
            with pytest.raises(IOFailed):
                disk.flush()
        with pytest.raises(IOFailed):
            disk.close()
        assert disk.closed

    def test_closing_tells_what_could_not_be_written(self) -> None:
        fault = FaultNode(qcow2_file(SIZE))
        disk = Disk(qcow2_node(fault), writable=True)
        disk.write(0, b"x")
        fault.cut_power()
        with pytest.raises(CowhandError):
            disk.close()
        disk.close()

    def test_an_error_on_the_way_out_does_not_hide_the_first(self) -> None:
        fault = FaultNode(qcow2_file(SIZE))
        disk = Disk(qcow2_node(fault), writable=True)
        disk.write(0, b"x")
        fault.cut_power()
        with pytest.raises(ZeroDivisionError) as caught, disk:
            raise ZeroDivisionError
        assert "failed too" in caught.value.__notes__[0]


class TestWithoutZeroesAndDiscard:
    """A node that can only write bytes is given bytes."""

    def test_zeroes_are_written(self) -> None:
        node = PlainNode(3 << 20)
        with Disk(node, writable=True) as disk:
            disk.write(0, b"x" * disk.size)
            disk.write_zeroes(100, disk.size - 200)
            assert node.content == b"x" * 100 + bytes(disk.size - 200) + b"x" * 100
            with pytest.raises(NotSupported):
                disk.write_zeroes(0, 512, fallback=False)
            assert node.content[:1] == b"x"

    def test_discards_are_left_out(self) -> None:
        with Disk(PlainNode(SIZE), writable=True) as disk:
            disk.write(0, b"x")
            disk.discard(0, SIZE)
            disk.submit([(DISCARD, 0, SIZE)])
            assert disk.read(0, 1) == b"x"

    def test_native_zeroes_do_without_bytes(self) -> None:
        recorder = RecorderNode(qcow2_file(SIZE))
        with Disk(qcow2_node(recorder), writable=True) as disk:
            assert disk.root.capabilities.zeroes is Zeroing.NATIVE
            disk.write_zeroes(0, SIZE, fallback=False)
            assert not recorder.log.changes


class TestCounters:
    def test_requests_and_bytes_by_kind(self) -> None:
        with memory_disk() as disk:
            disk.write(0, b"ab", b"c")
            disk.read(0, 10)
            disk.read_into(0, bytearray(20))
            disk.write_zeroes(0, 512, unmap=True)
            disk.discard(0, 1024)
            disk.flush()
            disk.submit([(READ, 0, bytearray(5)), (WRITE_REQUEST, 0, b"12"), (ZERO_REQUEST, 0, 7)])
            counters = disk.counters()
        assert counters["read"] == {"requests": 3, "bytes": 35}
        assert counters["write"] == {"requests": 2, "bytes": 5}
        assert counters["write zeroes"]["bytes"] + counters["write zeroes (unmap)"]["bytes"] == 519
        assert counters["discard"] == {"requests": 1, "bytes": 1024}
        assert counters["flush"]["requests"] == 1

    def test_failed_requests_are_not_counted_and_not_left_in_flight(self) -> None:
        fault = FaultNode(MemoryNode(content=bytes(SIZE)))
        with Disk(fault, writable=True) as disk:
            fault.fail(frozenset(("read", "write", "zero", "discard", "flush")), lasting=True)
            calls: list[Callable[[], object]] = [
                lambda: disk.read(0, 1),
                lambda: disk.write(0, b"x"),
                lambda: disk.write_zeroes(0, 512),
                lambda: disk.discard(0, 512),
                disk.flush,
                lambda: disk.submit([(READ, 0, bytearray(1))]),
            ]
            for call in calls:
                with pytest.raises(IOFailed):
                    call()
            assert not disk.in_flight
            assert not any(disk.statistics)
            fault.reset()


class TestHooks:
    """A hook hears of every write, zero and discard before it is acknowledged, on failure too."""

    @pytest.mark.parametrize("kind", ["memory", "qcow2 in memory", "coarse"])
    def test_it_hears_of_every_change(self, kind: str, tmp_path: Path) -> None:
        node = nodes_of(tmp_path)[kind]()
        heard: list[tuple[int, int]] = []
        with Disk(node, writable=True) as disk:
            graph.add_hook(node, lambda offset, length: heard.append((offset, length)))
            disk.write(4096, b"a" * 4000, b"b" * 96)
            disk.write_zeroes(8192, 4096)
            disk.discard(16384, 4096)
            disk.read(0, 4096)
            disk.flush()
            disk.submit(
                [(READ, 0, bytearray(1)), (WRITE_REQUEST, 0, b"x" * 4096), (ZERO_UNMAP, 4096, 4096), (FLUSH, 0, 0)]
            )
            assert heard == [(4096, 4096), (8192, 4096), (16384, 4096), (0, 4096), (4096, 4096)]

    def test_it_hears_of_failures(self) -> None:
        fault = FaultNode(MemoryNode(content=bytes(SIZE)))
        heard: list[tuple[int, int]] = []
        with Disk(fault, writable=True) as disk:
            graph.add_hook(fault, lambda offset, length: heard.append((offset, length)))
            fault.fail(frozenset(("write", "zero", "discard")), lasting=True)
            for call in (
                lambda: disk.write(0, b"x" * 10),
                lambda: disk.write_zeroes(10, 10),
                lambda: disk.discard(20, 10),
                lambda: disk.submit([(WRITE_REQUEST, 30, b"x" * 10), (DISCARD, 40, 10)]),
            ):
                with pytest.raises(IOFailed):
                    call()
            assert heard == [(0, 10), (10, 10), (20, 10), (30, 10), (40, 10)]
            fault.reset()

    def test_it_hears_before_the_caller_does(self) -> None:
        node = MemoryNode(content=bytes(SIZE))
        seen: list[bytes] = []
        with Disk(node, writable=True) as disk:

            def hook(offset: int, length: int) -> None:
                buffer = bytearray(length)
                node.read_into(offset, buffer)
                seen.append(bytes(buffer))
                assert disk.in_flight

            graph.add_hook(node, hook)
            disk.write(0, b"new")
            assert seen == [b"new"]

    def test_it_hears_nothing_after_it_was_removed(self) -> None:
        node = MemoryNode(content=bytes(SIZE))
        first: list[int] = []
        second: list[int] = []
        with Disk(node, writable=True) as disk:

            def hook(offset: int, length: int) -> None:
                first.append(offset)

            graph.add_hook(node, hook)
            graph.add_hook(node, lambda offset, length: second.append(offset))
            disk.write(1, b"x")
            graph.remove_hook(node, hook)
            disk.write(2, b"x")
            assert (first, second) == ([1], [1, 2])
            assert disk.edge.lane is None

    def test_other_users_of_the_node_are_heard_too(self) -> None:
        base = MemoryNode(content=bytes(SIZE))
        heard: list[int] = []
        with Disk(base, writable=True) as first, Disk(base, writable=True) as second:
            graph.add_hook(base, lambda offset, length: heard.append(offset))
            first.write(1, b"x")
            second.write(2, b"x")
        assert heard == [1, 2]


class TestLife:
    def test_a_closed_disk_refuses(self) -> None:
        disk = memory_disk()
        disk.close()
        disk.close()
        for call in (lambda: disk.read(0, 1), lambda: disk.write(0, b"x"), disk.flush, lambda: disk.submit([])):
            with pytest.raises(Closed) as caught:
                call()
            assert caught.value.errno == errno.EBADF
        assert "closed" in repr(disk)

    def test_open_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.qcow2"
        create(path, "qcow2", SIZE)
        with cowhand.open(path, writable=True) as disk:
            assert (disk.size, disk.format, disk.filename) == (SIZE, "qcow2", str(path))
            assert "writable" in repr(disk)
            disk.write(SIZE - 1, b"z")
        with cowhand.open(path) as disk:
            assert disk.read(SIZE - 1, 1) == b"z"

    @pytest.mark.parametrize("cache", ["none", "writethrough", "writeback", "directsync", "unsafe"])
    def test_every_cache_mode_keeps_data(self, cache: str, tmp_path: Path) -> None:
        path = tmp_path / "a.qcow2"
        create(path, "qcow2", SIZE)
        with cowhand.open(path, writable=True, cache=cache) as disk:
            disk.write(1000, b"odd bytes")
            disk.write_zeroes(70_000, 100)
        with cowhand.open(path) as disk:
            assert disk.read(1000, 9) == b"odd bytes"

    def test_an_unknown_cache_mode(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="Invalid cache mode 'fast'"):
            cowhand.open(tmp_path / "a", cache="fast")

    def test_everybody_learns_a_new_size(self) -> None:
        node = MemoryNode(content=bytes(SIZE))
        with Disk(node, writable=True) as first, Disk(node, writable=True) as second:
            first.resize(2 * SIZE)
            assert second.size == 2 * SIZE
            second.write(2 * SIZE - 1, b"x")

    def test_a_request_learns_the_size_inside_the_gate(self) -> None:
        from tests.block.disks import Worker

        with memory_disk() as disk:
            with graph.quiesce(disk.root):
                late = Worker(disk.read, SIZE - 512, 512)
                late.join(0.05)
                disk.resize(SIZE - 512, shrink=True)
            with pytest.raises(OutOfRange):
                late.done()


class TestAsFile:
    """as_file() gives a binary file: what libraries that know only files need."""

    def test_a_tar_archive_lives_on_a_disk(self) -> None:
        with qcow2_disk(SIZE, cluster_size=512) as disk:
            with disk.as_file() as file, tarfile.open(fileobj=file, mode="w") as archive:
                entry = tarfile.TarInfo("hello")
                entry.size = 70_000
                archive.addfile(entry, io.BytesIO(b"h" * 70_000))
            with disk.as_file() as file, tarfile.open(fileobj=file) as archive:
                member = archive.extractfile("hello")
                assert member is not None
                assert member.read() == b"h" * 70_000

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("seek"), st.integers(0, 9000), st.just(0)),
                st.tuples(st.just("seek"), st.integers(-2000, 0), st.just(2)),
                st.tuples(st.just("write"), st.binary(max_size=3000)),
                st.tuples(st.just("read"), st.integers(-1, 5000)),
                st.tuples(st.just("tell")),
                st.tuples(st.just("flush")),
            ),
            max_size=30,
        )
    )
    def test_it_behaves_as_a_file_of_fixed_size(self, steps: list[tuple[Any, ...]]) -> None:
        size = 8192
        model = io.BytesIO(bytes(size))
        with Disk(MemoryNode(content=bytes(size)), writable=True) as disk:
            with disk.as_file() as file:
                for name, *arguments in steps:
                    if name == "write" and model.tell() + len(arguments[0]) > size:
                        continue
                    if name == "write" and not arguments[0]:
                        continue
                    assert getattr(file, name)(*arguments) == getattr(model, name)(*arguments)
            assert disk.read(0, size) == model.getvalue()

    def test_its_end_is_the_disks(self) -> None:
        from cowhand.block.disk_file import DiskFile

        with memory_disk() as disk, DiskFile(disk) as raw:
            file = io.BufferedWriter(raw, buffer_size=4)
            file.seek(SIZE - 2)
            file.write(b"four")
            with pytest.raises(NoSpace) as caught:
                file.flush()
            assert caught.value.errno == errno.ENOSPC
            assert isinstance(caught.value, OSError)
            assert disk.read(SIZE - 2, 2) == b"fo"
            # What does not fit stays in the buffer, and would be tried again.
            disk.resize(SIZE + 2)
            file.flush()
            assert disk.read(SIZE - 2, 4) == b"four"

    def test_a_read_only_disk_gives_a_read_only_file(self) -> None:
        with memory_disk(writable=False) as disk, disk.as_file() as file:
            assert not file.writable()
            assert file.readable()
            assert file.seekable()
            assert file.read() == bytes(SIZE)
            assert file.read() == b""
            with pytest.raises(io.UnsupportedOperation):
                file.write(b"x")

    def test_closing_it_flushes_and_leaves_the_disk_open(self) -> None:
        recorder = RecorderNode(MemoryNode(content=bytes(SIZE)))
        with Disk(recorder, writable=True) as disk:
            with disk.as_file() as file:
                file.write(b"x")
            assert recorder.log.flushes
            assert disk.read(0, 1) == b"x"
            with pytest.raises(ValueError):
                file.read(1)

    def test_odd_arguments(self) -> None:
        from cowhand.block.disk_file import DiskFile

        with memory_disk() as disk, DiskFile(disk) as file:
            assert (file.name, file.mode) == (disk.filename, "rb+")
            with pytest.raises(ValueError):
                file.seek(-1)
            with pytest.raises(ValueError):
                file.seek(0, 7)
            with pytest.raises(NotSupported):
                file.truncate(5)
            file.seek(SIZE * 3)
            assert file.read(10) == b""

    def test_a_file_that_outlives_its_disk_closes_quietly(self) -> None:
        disk = memory_disk()
        file = disk.as_file()
        disk.close()
        with pytest.raises(Closed):
            file.read(1)
        file.close()
