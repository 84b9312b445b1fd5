"""The format layer: reserve, bytes, link over any driver; what happens when one of the steps fails, waits or is interrupted."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.format_io.reservations import Kind
from cowhand.block.node.node import READ, WRITE_REQUEST, Zeroing
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import ImageCorrupt, IOFailed, NoSpace, NotSupported, Poisoned, ReadOnly
from cowhand.testing.faults import FaultNode
from cowhand.testing.model import DiskModel
from tests.block.disks import PATIENCE, Worker
from tests.block.toyformat import Interrupted, ToyNode, at

UNIT = 4096
SIZE = 32 * UNIT


def toy(file: Any = None, size: int = SIZE, **options: Any) -> tuple[ToyNode, Disk]:
    node = ToyNode(file or MemoryNode(), size, unit=UNIT, **options)
    return node, Disk(node, writable=True)


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


class TestSteps:
    def test_a_write_reserves_puts_and_links(self) -> None:
        node, disk = toy()
        disk.write(100, b"x" * 10)
        assert node.steps == ["begin", "reserve DATA", "store 100+10", "link"]
        disk.write(200, b"y" * 10)
        assert len(node.steps) == 4
        disk.close()

    def test_readers_see_the_old_content_until_the_link(self) -> None:
        node, disk = toy(backing=MemoryNode(content=b"b" * SIZE))
        seen = []
        node.before = at("link", lambda: seen.append(bytes(_read_nolock(node, 0, 200))))
        disk.write(100, b"x" * 10)
        assert seen == [b"b" * 200]
        assert disk.read(0, 200) == b"b" * 100 + b"x" * 10 + b"b" * 90
        disk.close()

    def test_one_request_takes_as_many_reservations_as_the_driver_gives(self) -> None:
        node, disk = toy()
        node.one_unit_at_a_time = True
        data = random.Random(1).randbytes(5 * UNIT)
        disk.write(UNIT // 2, data[:700], data[700:9000], data[9000:])
        assert node.steps.count("link") == 6
        assert disk.read(UNIT // 2, len(data)) == data
        assert disk.read(0, UNIT // 2) == bytes(UNIT // 2)
        disk.close()

    def test_what_surrounds_a_write_is_copied_once(self) -> None:
        backing = FaultNode(MemoryNode(content=b"b" * SIZE))
        node, disk = toy(backing=backing)
        disk.write(UNIT + 10, b"x" * (2 * UNIT))
        assert backing.counts["read"] == 2
        assert "store 4096+12288" in node.steps
        assert disk.read(0, 5 * UNIT) == b"b" * (UNIT + 10) + b"x" * (2 * UNIT) + b"b" * (2 * UNIT - 10)
        disk.close()

    def test_a_whole_unit_needs_no_copy(self) -> None:
        backing = FaultNode(MemoryNode(content=b"b" * SIZE))
        _, disk = toy(backing=backing)
        disk.write(UNIT, b"x" * UNIT)
        assert not backing.counts
        disk.close()

    def test_a_preparation_is_made_without_the_lock_and_begun_again(self) -> None:
        node, disk = toy()
        node.unprepared = 2
        node.before = at("prepare", lambda: _assert_unlocked(node), times=2)
        disk.write(0, b"x")
        assert node.steps[1:6] == ["reserve DATA", "prepare", "reserve DATA", "prepare", "reserve DATA"]
        disk.close()

    def test_compressed_units_are_stored_and_decoded(self) -> None:
        node, disk = toy()
        node.write_compressed(UNIT, b"ab")
        assert disk.read(UNIT - 1, 4) == b"\0aba"
        disk.write(UNIT + 1, b"X")
        assert disk.read(UNIT, 4) == b"aXab"
        assert UNIT // UNIT not in node.packed
        with pytest.raises(NotSupported):
            node.write_compressed(UNIT, b"cd")
        disk.close()


def _read_nolock(node: ToyNode, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    node.read_into(offset, buffer)
    return buffer


def _assert_unlocked(node: ToyNode) -> None:
    assert not node.lock.locked()


class TestErrors:
    """An error in a step leaves readers with what they saw, and the unit to the next writer."""

    @pytest.mark.parametrize("step", ["reserve DATA", "store 10+4", "link"])
    @pytest.mark.parametrize("error", [NoSpace("full"), ImageCorrupt("damaged")], ids=["no space", "corrupt"])
    def test_a_step_that_fails(self, step: str, error: Exception) -> None:
        node, disk = toy()
        disk.write(UNIT, b"other")
        node.before = at(step, fail(error))
        with pytest.raises(type(error)):
            disk.write(10, b"lost")
        assert ("abandon" in node.steps) == (step != "reserve DATA")
        assert disk.read(0, 100) == bytes(100)
        assert disk.read(UNIT, 5) == b"other"
        disk.write(10, b"kept")
        assert disk.read(10, 4) == b"kept"
        assert not node._reserved
        disk.close()

    def test_bytes_that_fail(self) -> None:
        fault = FaultNode(MemoryNode())
        node, disk = toy(fault)
        fault.fail("write", 1, errno.ENOSPC, done=0.5)
        with pytest.raises(NoSpace):
            disk.write(0, b"x" * UNIT)
        assert node.steps[-1] == "abandon"
        assert disk.read(0, UNIT) == bytes(UNIT)
        disk.close()

    def test_a_backing_file_that_fails(self) -> None:
        backing = FaultNode(MemoryNode(content=b"b" * SIZE))
        node, disk = toy(backing=backing)
        backing.fail("read")
        with pytest.raises(IOFailed):
            disk.write(10, b"x")
        assert node.steps[-1] == "abandon"
        disk.write(10, b"x")
        assert disk.read(9, 3) == b"bxb"
        disk.close()

    @pytest.mark.parametrize("step", ["reserve DATA", "store 10+4", "link"])
    def test_an_interruption_poisons(self, step: str) -> None:
        node, disk = toy()
        disk.write(UNIT, b"there")
        node.before = at(step, fail(Interrupted()))
        with pytest.raises(Interrupted):
            disk.write(10, b"lost")
        calls: list[Callable[[], object]] = [
            lambda: disk.write(10, b"x"),
            lambda: disk.write(UNIT, b"x"),
            lambda: disk.write_zeroes(0, UNIT),
            lambda: disk.discard(0, UNIT),
            lambda: disk.submit([(WRITE_REQUEST, UNIT, b"x")]),
            lambda: node.write_compressed(0, b"x"),
        ]
        for call in calls:
            with pytest.raises(Poisoned, match="interrupted by Interrupted"):
                call()
        assert disk.read(UNIT, 5) == b"there"
        assert "abandon" not in node.steps
        disk.close()

    def test_who_waits_goes_on_after_an_error(self) -> None:
        self._wait_for(NoSpace("full"), b"second")

    def test_who_waits_hears_of_the_poison(self) -> None:
        with pytest.raises(Poisoned):
            self._wait_for(Interrupted(), b"")

    @staticmethod
    def _wait_for(error: BaseException, expected: bytes) -> None:
        node, disk = toy()
        reached, go = threading.Event(), threading.Event()

        def pause() -> None:
            reached.set()
            assert go.wait(PATIENCE)
            raise error

        node.before = at("store 0+5", pause)
        first = Worker(disk.write, 0, b"first")
        assert reached.wait(PATIENCE)
        second = Worker(disk.write, 100, b"second")
        second.join(0.05)
        assert second.is_alive()
        go.set()
        with pytest.raises(type(error)):
            first.done()
        try:
            second.done()
            assert disk.read(0, 106) == bytes(100) + expected
        finally:
            disk.close()

    def test_a_reader_refuses_writers(self) -> None:
        node = ToyNode(MemoryNode(), SIZE, unit=UNIT)
        node.writable = False
        with Disk(node) as disk:
            assert disk.read(0, 10) == bytes(10)
            with pytest.raises(ReadOnly):
                node.write(0, (b"x",))

    def test_a_batch_does_the_rest(self) -> None:
        node, disk = toy()
        node.before = at("reserve DATA", fail(NoSpace("full")))
        buffer = bytearray(1)
        with pytest.raises(NoSpace):
            disk.submit([(WRITE_REQUEST, 0, b"a"), (WRITE_REQUEST, UNIT, b"b"), (READ, UNIT, buffer)])
        assert buffer == b"b"
        disk.close()


class TestZeroes:
    def test_whole_units_are_marked(self) -> None:
        node, disk = toy()
        disk.write(0, b"x" * (4 * UNIT))
        node.steps.clear()
        disk.write_zeroes(UNIT, 2 * UNIT)
        disk.write_zeroes(0, UNIT, unmap=True)
        assert node.steps == ["reserve ZERO", "link", "reserve ZERO_UNMAP", "link"]
        assert disk.read(0, 4 * UNIT) == bytes(3 * UNIT) + b"x" * UNIT
        disk.close()

    def test_parts_of_units_with_data_are_written(self) -> None:
        node, disk = toy()
        disk.write(0, b"x" * (3 * UNIT))
        node.steps.clear()
        disk.write_zeroes(UNIT - 10, UNIT + 20)
        assert node.steps == ["reserve ZERO", "link"]
        assert disk.read(0, 3 * UNIT) == b"x" * (UNIT - 10) + bytes(UNIT + 20) + b"x" * (UNIT - 10)
        with pytest.raises(NotSupported):
            disk.write_zeroes(10, 20, fallback=False)
        assert disk.read(10, 20) == b"x" * 20
        disk.close()

    def test_a_part_whose_unit_reads_as_zeroes_marks_the_unit(self) -> None:
        backing = MemoryNode(content=bytes(UNIT) + b"b" * UNIT)
        node, disk = toy(backing=backing)
        disk.write_zeroes(2 * UNIT + 100, 100, fallback=False)
        assert node.hosts == {2: -1}
        disk.write_zeroes(UNIT + 100, 100)
        assert node.hosts[1] >= 0
        assert disk.read(UNIT, 300) == b"b" * 100 + bytes(100) + b"b" * 100
        disk.close()

    def test_the_part_behind_the_end_does_not_count(self) -> None:
        node, disk = toy(size=SIZE + 512)
        disk.write(SIZE, b"x" * 512)
        node.steps.clear()
        disk.write_zeroes(SIZE, 512, fallback=False)
        assert node.hosts[SIZE // UNIT] == -1
        disk.close()

    def test_who_writes_between_the_look_and_the_mark_keeps_its_bytes(self) -> None:
        node, disk = toy()
        disk.write_zeroes(0, UNIT)
        node.steps.clear()

        def write_meanwhile() -> None:
            # The driver is about to reserve for the partial zeroes: the unit was written just before.
            node.hosts[0] = node.next
            node.file.write(node.next, (b"n" * UNIT,))
            node.next += UNIT

        node.before = at("reserve ZERO", write_meanwhile)
        disk.write_zeroes(100, 100)
        assert disk.read(0, UNIT) == b"n" * 100 + bytes(100) + b"n" * (UNIT - 200)
        assert "abandon" in node.steps
        disk.close()

    @pytest.mark.parametrize("zeroes", [Zeroing.NATIVE, Zeroing.EMULATED])
    def test_a_format_that_cannot_mark_writes_bytes(self, zeroes: Zeroing) -> None:
        node, disk = toy(backing=MemoryNode(content=b"b" * SIZE), zeroes=zeroes, zero_kinds=())
        disk.write_zeroes(100, 3 * UNIT)
        assert disk.read(0, 4 * UNIT) == b"b" * 100 + bytes(3 * UNIT) + b"b" * (UNIT - 100)
        assert "link" in node.steps
        with pytest.raises(NotSupported):
            disk.write_zeroes(4 * UNIT, UNIT, fallback=False)
        assert disk.read(4 * UNIT, 1) == b"b"
        disk.close()

    @pytest.mark.parametrize(
        ("mode", "steps"), [("off", ["link"]), ("on", ["reserve ZERO"]), ("unmap", ["reserve ZERO_UNMAP"])]
    )
    @pytest.mark.parametrize("how", ["write", "pieces", "submit"])
    def test_detected_zeroes(self, mode: str, steps: list[str], how: str) -> None:
        node, disk = toy(detect_zeroes=mode)
        disk.write(0, b"x" * (3 * UNIT))
        node.steps.clear()
        if how == "write":
            disk.write(UNIT, bytes(UNIT))
        elif how == "pieces":
            disk.write(UNIT, bytes(10), bytes(UNIT - 10))
        else:
            disk.submit([(WRITE_REQUEST, UNIT, bytes(UNIT))])
        if mode == "off":
            assert node.steps == []
            assert node.hosts[1] >= 0
        else:
            assert node.steps[:1] == steps
            assert node.hosts[1] == -1
        disk.write(2 * UNIT, bytes(UNIT - 1) + b"y")
        assert disk.read(0, 3 * UNIT) == b"x" * UNIT + bytes(2 * UNIT - 1) + b"y"
        disk.close()


class TestDiscards:
    def test_only_whole_units(self) -> None:
        node, disk = toy()
        disk.write(0, b"x" * (4 * UNIT))
        node.steps.clear()
        disk.discard(1, UNIT)
        disk.discard(UNIT + 1, UNIT - 2)
        assert node.steps == []
        disk.discard(UNIT - 1, 2 * UNIT + 2)
        assert node.steps == ["reserve DISCARD", "link"]
        assert disk.read(0, 4 * UNIT) == b"x" * UNIT + bytes(2 * UNIT) + b"x" * UNIT
        disk.close()

    def test_the_last_unit_may_be_cut_by_the_end(self) -> None:
        node, disk = toy(size=SIZE + 512)
        disk.write(SIZE, b"x" * 512)
        disk.discard(SIZE, 512)
        assert node.hosts[SIZE // UNIT] == -1
        disk.close()


class TestBacking:
    def test_it_ends_in_zeroes(self) -> None:
        _, disk = toy(backing=MemoryNode(content=b"b" * 100))
        assert disk.read(0, 200) == b"b" * 100 + bytes(100)
        disk.write(150, b"x")
        assert disk.read(0, 200) == b"b" * 100 + bytes(50) + b"x" + bytes(49)
        disk.close()

    def test_emptying_shows_it_again(self) -> None:
        node, disk = toy(backing=MemoryNode(content=b"b" * SIZE))
        disk.write(0, b"x" * (2 * UNIT))
        node.change(0, UNIT, Kind.EMPTY)
        assert disk.read(0, 2 * UNIT) == b"b" * UNIT + b"x" * UNIT
        disk.close()

    def test_reads_zero_looks_through_it(self) -> None:
        backing = ToyNode(MemoryNode(), 4 * UNIT, unit=512)
        with Disk(backing, writable=True) as lower:
            lower.write(UNIT, b"x")
            node, disk = toy(backing=backing)
            assert node.reads_zero(0, UNIT)
            assert not node.reads_zero(UNIT, 512)
            assert node.reads_zero(2 * UNIT, 20 * UNIT)
            disk.write(0, b"x")
            assert not node.reads_zero(0, UNIT)
            disk.close()


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("detect", ["off", "unmap"])
def test_random_requests_equal_the_model(backed: bool, detect: str, rng: random.Random) -> None:
    base = rng.randbytes(SIZE // 2 + 333) if backed else b""
    size = SIZE + 777
    node, disk = toy(size=size, backing=MemoryNode(content=base) if backed else None, detect_zeroes=detect)
    model = DiskModel(size, base)
    for _ in range(600):
        node.one_unit_at_a_time = rng.random() < 0.3
        offset = rng.randrange(size)
        length = min(rng.choice((1, 512, UNIT, 2 * UNIT, rng.randrange(1, 5 * UNIT))), size - offset)
        if rng.random() < 0.5:
            offset -= offset % UNIT
        kind = rng.randrange(5)
        if kind < 2:
            data = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
            cut = rng.randrange(length + 1)
            disk.write(offset, data[:cut], data[cut:])
            model.write(offset, data)
        elif kind == 2:
            disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            model.write_zeroes(offset, length)
        elif kind == 3:
            disk.discard(offset, length)
            model.discard(offset, length, disk.read(offset, length))
        elif offset + UNIT <= size and offset % UNIT == 0 and offset // UNIT not in node.hosts:
            node.write_compressed(offset, b"abcd")
            model.write(offset, b"abcd" * (UNIT // 4))
        model.compare(disk.read(offset, length) and disk.read(0, size))
    disk.close()
