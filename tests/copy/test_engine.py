"""The engine by itself, on disks in memory and in small images: what it moves, and how it ends."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.protocols.memory import MemoryNode, MemoryOptions
from cowhand.copy.engine import sink as sinks
from cowhand.copy.engine.engine import PIECE, Engine
from cowhand.copy.engine.plan import Policy
from cowhand.copy.engine.source import Part, SalvagingSource, Source
from cowhand.copy.engine.throttle import Throttle
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import Cancelled, CowhandError, IOFailed
from cowhand.core.progress import CancelToken, Progress
from cowhand.image.check import check
from cowhand.image.create import create
from cowhand.testing.faults import FaultNode
from tests.copy.images import KIB, MIB, content, memory_disk, read_all

SIZE = 7 * MIB + 3 * KIB + 512


def empty_disk(size: int = SIZE) -> Disk:
    return Disk(MemoryNode(MemoryOptions(size=size)), writable=True)


def engine(
    source: Source, target: Disk, *, sparse: int = 4096, reads_zero: bool = True, **options: object
) -> tuple[Engine, Policy]:
    sink = sinks.choose(target, sparse=sparse, reads_zero=reads_zero)
    return Engine(source, sink, **options), Policy(unit=sink.unit)  # type: ignore[arg-type]


def copy(source: Source, target: Disk, **options: object) -> Engine:
    made, policy = engine(source, target, **options)  # type: ignore[arg-type]
    made.run(source.runs(policy))
    return made


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("in_order", [True, False])
def test_every_byte_arrives(rng: random.Random, workers: int, in_order: bool) -> None:
    data = content(rng, SIZE, 30)
    with memory_disk(data) as source, empty_disk() as target:
        made = copy(Source([source]), target, workers=workers, in_order=in_order)
        assert read_all(target) == data
        assert made.progress.done <= SIZE


def test_old_content_gives_way_to_zeroes(rng: random.Random) -> None:
    data = content(rng, SIZE)
    with memory_disk(data) as source, memory_disk(rng.randbytes(SIZE), writable=True) as target:
        copy(Source([source]), target, reads_zero=False)
        assert read_all(target) == data


def test_disks_and_parts_are_put_one_behind_the_other_in_whole_sectors(rng: random.Random) -> None:
    one, two, three = rng.randbytes(1000), rng.randbytes(70_000), b"x" * 5
    wanted = one.ljust(1024, b"\0") + two[512:60_000].ljust(59_904, b"\0") + three.ljust(512, b"\0")
    with memory_disk(one) as a, memory_disk(b"") as nothing, memory_disk(two) as b, memory_disk(three) as c:
        source = Source([a, nothing, Part(b, 512, 60_000 - 512), c])
        assert source.size == len(wanted)
        with empty_disk(len(wanted)) as target:
            copy(source, target)
            assert read_all(target) == wanted


def qcow2_disk(path: Path, size: int, **options: str) -> Disk:
    create(path, "qcow2", size, options)
    return cowhand.open(path, writable=True, format="qcow2")


@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_images_are_laid_out_in_the_order_of_the_disk(rng: random.Random, tmp_path: Path, cluster: str) -> None:
    data = rng.randbytes(SIZE)
    with memory_disk(data) as source, qcow2_disk(tmp_path / "x", -(-SIZE // 512) * 512, cluster_size=cluster) as target:
        copy(Source([source]), target, workers=4)
        hosts = [row.host for batch in target.extents() for row in batch if row.host < 1 << 60]
        assert hosts == sorted(hosts)
        assert target.read(0, SIZE) == data


class _Leaving(sinks.Sink):
    """Takes long over some pieces, so that others are ready before their turn; notes who placed what."""

    works_long = True

    def prepare(self, offset: int, buffer: bytearray, length: int, gaps: Sequence[tuple[int, int]] = ()) -> object:
        time.sleep(0.02 if offset // PIECE % 3 == 0 else 0)
        return super().prepare(offset, buffer, length, gaps)

    def place(
        self, offset: int, buffer: bytearray, length: int, prepared: object, gaps: Sequence[tuple[int, int]] = ()
    ) -> object:
        placed.append(offset)
        return super().place(offset, buffer, length, prepared, gaps)


placed: list[int] = []


@pytest.mark.parametrize("workers", [2, 4])
def test_what_is_ready_before_its_turn_is_placed_in_its_turn(rng: random.Random, workers: int) -> None:
    data = rng.randbytes(9 * PIECE + 512)
    placed.clear()
    with memory_disk(data) as source, empty_disk(len(data)) as target:
        sink = _Leaving(target, sparse=4096, reads_zero=True)
        made = Engine(Source([source]), sink, workers=workers)
        made.run(Source([source]).runs(Policy(unit=sink.unit)))
        assert placed == sorted(placed) and len(placed) == 10
        assert made.progress.done == len(data)
        assert read_all(target) == data


@pytest.mark.parametrize("kind", ["write", "read"])
def test_an_error_ends_all_although_pieces_were_left(rng: random.Random, kind: str) -> None:
    data = rng.randbytes(9 * PIECE)
    ends = {"read": FaultNode(MemoryNode(content=data)), "write": FaultNode(MemoryNode(MemoryOptions(size=len(data))))}
    ends[kind].fail(kind, 4, lasting=True)
    with Disk(ends["read"]) as source, Disk(ends["write"], writable=True) as target:
        sink = _Leaving(target, sparse=0, reads_zero=True)
        made = Engine(Source([source]), sink, workers=3)
        with pytest.raises(IOFailed):
            made.run(Source([source]).runs(Policy(unit=sink.unit)))


def test_the_lane_is_left_where_a_filter_stands_between(tmp_path: Path) -> None:
    with qcow2_disk(tmp_path / "x", MIB) as disk:
        assert isinstance(sinks.choose(disk, sparse=4096, reads_zero=True), sinks.LaneSink)
    file = {"driver": "file", "filename": str(tmp_path / "x")}
    description = {"driver": "blkdebug", "image": {"driver": "qcow2", "file": file}}
    with cowhand.open(description, writable=True) as disk:
        assert type(sinks.choose(disk, sparse=4096, reads_zero=True)) is sinks.Sink


def test_hooks_hear_of_what_went_by_the_lane(rng: random.Random, tmp_path: Path) -> None:
    data = content(rng, 4 * MIB)
    heard: list[tuple[int, int]] = []
    lock = threading.Lock()

    def hook(offset: int, length: int) -> None:
        with lock:
            heard.append((offset, length))

    with memory_disk(data) as source, qcow2_disk(tmp_path / "x", 4 * MIB) as target:
        graph.add_hook(target.root, hook)
        copy(Source([source]), target)
        told = set()
        for offset, length in heard:
            told.update(range(offset // 4096, -(-(offset + length) // 4096)))
        assert {at // 4096 for at in range(0, len(data), 4096) if any(data[at : at + 4096])} <= told
        assert target.read(0, len(data)) == data


def test_hooks_hear_of_what_was_copied_inside_the_kernel(rng: random.Random, tmp_path: Path) -> None:
    data = rng.randbytes(4 * MIB)
    (tmp_path / "source").write_bytes(data)
    heard: list[tuple[int, int]] = []
    with qcow2_disk(tmp_path / "x", 4 * MIB) as target:
        graph.add_hook(target.root, lambda offset, length: heard.append((offset, length)))
        convert(tmp_path / "source", target, source_format="raw", skip_create=True, copy_range=True)
        assert target.read(0, len(data)) == data
    told = {at for offset, length in heard for at in range(offset, offset + length, 65536)}
    assert told == set(range(0, len(data), 65536))


def test_the_first_error_ends_all_and_names_the_place(rng: random.Random) -> None:
    data = rng.randbytes(5 * PIECE)
    broken = FaultNode(MemoryNode(content=data))
    broken.fail("read", 3, lasting=True)
    with Disk(broken) as source, empty_disk(len(data)) as target:
        with pytest.raises(IOFailed, match="reading at 0x") as caught:
            copy(Source([source]), target, workers=3)
        assert caught.value.qemu().startswith("error while reading at byte ")


@pytest.mark.parametrize("kind", ["write", "zero"])
def test_an_error_of_the_target_names_the_place(rng: random.Random, kind: str) -> None:
    data = content(rng, 3 * MIB)
    broken = FaultNode(MemoryNode(MemoryOptions(size=len(data))))
    broken.fail(kind, lasting=True)
    with memory_disk(data) as source, Disk(broken, writable=True) as target:
        with pytest.raises(CowhandError, match="writing at 0x") as caught:
            copy(Source([source]), target, reads_zero=kind == "write")
        assert "error while writing at byte " in caught.value.qemu()


def test_a_failed_copy_leaves_an_image_without_errors(rng: random.Random, tmp_path: Path) -> None:
    data = rng.randbytes(6 * PIECE)
    broken = FaultNode(MemoryNode(content=data))
    broken.fail("read", 4)
    with Disk(broken) as source, qcow2_disk(tmp_path / "x", len(data)) as target:
        with pytest.raises(IOFailed):
            copy(Source([source]), target)
        arrived = read_all(target)
        target.write(5 * PIECE, b"goes on")
    for at in range(0, len(data), PIECE):
        assert arrived[at : at + PIECE] in (data[at : at + PIECE], bytes(PIECE))
    with cowhand.open(tmp_path / "x", format="qcow2") as disk:
        assert disk.read(5 * PIECE, 7) == b"goes on"


def test_cancelling_ends_it_soon(rng: random.Random) -> None:
    cancel = CancelToken()
    data = rng.randbytes(8 * MIB)
    slow = FaultNode(MemoryNode(content=data))
    slow.delay("read", 0.05, lasting=True)
    with Disk(slow) as source, empty_disk(len(data)) as target:
        made, policy = engine(
            Source([source]), target, cancel=cancel, progress=Progress(len(data), lambda p: cancel.cancel())
        )
        with pytest.raises(Cancelled):
            made.run(made.source.runs(policy))
        assert made.progress.done < len(data)


def test_a_throttled_copy_waits_and_can_be_cancelled(rng: random.Random) -> None:
    data = rng.randbytes(4 * MIB)
    cancel = CancelToken()
    with memory_disk(data) as source, empty_disk(len(data)) as target:
        begin = time.monotonic()
        copy(Source([source]), target, throttle=Throttle(16 * MIB))
        assert time.monotonic() - begin > 0.1
        assert read_all(target) == data
        threading.Timer(0.2, cancel.cancel).start()
        with pytest.raises(Cancelled):
            copy(Source([source]), target, throttle=Throttle(1 << 10), cancel=cancel)  # an hour and more


def test_salvaging_loses_only_the_sectors_that_cannot_be_read(rng: random.Random) -> None:
    data = bytearray(rng.randbytes(MIB))
    bad = sorted(rng.sample(range(0, MIB, 512), 5))

    class Medium(MemoryNode):
        def read_into(self, offset: int, buffer: object) -> None:
            length = len(memoryview(buffer))  # type: ignore[arg-type]
            if any(offset < at + 512 and at < offset + length for at in bad):
                raise IOFailed("bad sector", offset=offset)
            super().read_into(offset, buffer)  # type: ignore[arg-type]

    lost: list[int] = []
    with Disk(Medium(content=bytes(data))) as source, empty_disk(MIB) as target:
        copy(SalvagingSource([source], report=lambda offset, error: lost.append(offset)), target)
        for at in bad:
            data[at : at + 512] = bytes(512)
        assert read_all(target) == data
    assert sorted(lost) == bad


@pytest.mark.parametrize(
    ("cluster", "unit", "sparse"), [(4096, 4096, 4096), (512, 4096, 4096), (65536, 512, 4096), (512, 512, 65536)]
)
def test_a_fragmented_source_is_copied_in_large_pieces(
    rng: random.Random, tmp_path: Path, cluster: int, unit: int, sparse: int
) -> None:
    """Scattered units of data, also with gaps that are too short to be left out: the target allocates what a copy run by run allocates."""
    size = 6 * MIB + 512
    create(tmp_path / "s", "qcow2", size, {"cluster_size": unit})
    model = bytearray(size)
    with cowhand.open(tmp_path / "s", format="qcow2", writable=True) as source:
        for _ in range(300):
            offset = rng.randrange(size // unit) * unit
            length = min(rng.choice((1, 1, 2, 20)) * unit, size - offset)
            model[offset : offset + length] = rng.randbytes(length)
            source.write(offset, bytes(model[offset : offset + length]))
        allocated = []
        for joins in (True, False):
            name = tmp_path / f"t{joins}"
            create(name, "qcow2", size, {"cluster_size": cluster})
            with cowhand.open(name, format="qcow2", writable=True) as target:
                made, policy = engine(Source([source]), target, sparse=sparse)
                made.sink.joins = joins
                made.run(made.source.runs(policy))
                assert read_all(target) == model
                rows = [(row.start, row.length, row.flags) for batch in target.extents() for row in batch]
                allocated.append((rows, made.progress.done))
            found = check(name, format="qcow2")
            assert not found.corruptions and not found.leaks
    assert allocated[0] == allocated[1]


def test_a_system_without_more_threads_leaves_none_behind(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with memory_disk(content(rng, SIZE, 30)) as source, empty_disk() as target:
        with pytest.raises(RuntimeError, match="thread"):
            copy(Source([source]), target, throttle=Throttle(MIB), workers=2)
        assert not begun[0].is_alive()
