"""What every node has to keep to, as a class of tests: a driver's test file inherits it and says how a node is made.

    class TestMine(NodeContract):
        def make_node(self, folder, content, writable=True): ...
        def raw_content(self, folder, node): ...

What a node's capabilities rule out is not tested; each such test says so by being skipped with the reason.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import (
    DISCARD,
    FLUSH,
    READ,
    WRITE_REQUEST,
    ZERO_REQUEST,
    ZERO_UNMAP,
    BlockNode,
    Request,
    Zeroing,
)
from cowhand.core.buffers import Buffer
from cowhand.core.errors import Closed, CowhandError, NotSupported, OutOfRange, ReadOnly
from cowhand.core.extents import ALLOCATED, DATA, MAX_ROWS, NO_HOST, OFFSET, ZERO, ExtentBatch
from cowhand.testing.model import DiskModel, compare


class NodeContract:
    """Tests of any node. Override :meth:`make_node` and :meth:`raw_content`; ``size`` is the content's length, a multiple of 64 KiB."""

    size = 512 << 10

    # -- what the driver's test says

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        """Return an open node that nobody uses yet, holding *content*; whatever it needs lies in *folder*."""
        raise NotImplementedError

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        """Return what the flushed *node* holds, by a way around the code under test (the medium itself, another implementation)."""
        raise NotImplementedError

    # -- what the tests use

    def content(self) -> bytes:
        """Return the content that nodes begin with: no two sectors are alike, the third quarter is zeroes."""
        quarter = self.size // 4
        data = bytearray(random.Random(4096).randbytes(self.size))
        data[2 * quarter : 3 * quarter] = bytes(quarter)
        return bytes(data)

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[BlockNode]:
        """A writable node, closed at the end."""
        node = self.make_node(tmp_path, self.content())
        yield node
        if not node.closed:
            graph.close_node(node)

    @pytest.fixture
    def disk(self, node: BlockNode) -> Iterator[Disk]:
        """A disk over the node; its requests may have any alignment."""
        if not node.capabilities.writable:
            pytest.skip(f"driver '{node.driver}' only reads")
        with Disk(node, writable=True) as disk:
            yield disk

    @pytest.fixture
    def model(self) -> DiskModel:
        """The model that begins with the same content."""
        return DiskModel(self.size, self.content())

    # -- facts

    def test_facts_are_plausible(self, node: BlockNode) -> None:
        limits = node.limits
        for value in (
            limits.request_alignment,
            limits.memory_alignment,
            limits.zero_alignment,
            limits.discard_alignment,
        ):
            assert value >= 1
            assert value & (value - 1) == 0, f"{value} is not a power of two"
        assert limits.preferred_io <= limits.maximum_io
        assert node.size == self.size
        assert node.driver
        assert node.name
        assert not node.closed
        assert node.writable or not node.capabilities.writable
        assert node.allocated_size() is None or node.allocated_size() >= 0  # type: ignore[operator]

    # -- reading

    def test_reads_are_total_at_any_offset(self, node: BlockNode) -> None:
        content = self.content()
        with Disk(node) as disk:
            for offset, length in (
                (0, self.size),
                (0, 1),
                (1, 511),
                (511, 2),
                (4095, 8194),
                (self.size - 1, 1),
                (7, 0),
            ):
                compare(content[offset : offset + length], disk.read(offset, length), f"a read at {offset}")

    def test_a_read_changes_its_buffer_and_nothing_around_it(self, node: BlockNode) -> None:
        buffer = bytearray(b"\xaa" * 3000)
        with Disk(node) as disk:
            disk.read_into(1000, memoryview(buffer)[500:2500])
        compare(b"\xaa" * 500 + self.content()[1000:3000] + b"\xaa" * 500, bytes(buffer), "the buffer")

    def test_requests_outside_of_the_disk_are_refused(self, disk: Disk) -> None:
        for call in (
            lambda: disk.read(self.size, 1),
            lambda: disk.read(-1, 1),
            lambda: disk.write(self.size - 1, b"xx"),
            lambda: disk.write_zeroes(0, self.size + 1),
            lambda: disk.discard(self.size, 1),
            lambda: disk.submit([(READ, self.size - 1, bytearray(2))]),
        ):
            with pytest.raises(OutOfRange):
                call()
        compare(self.content(), disk.read(0, self.size), "the disk after refused requests")

    # -- writing

    def test_writes_of_any_alignment_and_kind_of_buffer(self, disk: Disk, model: DiskModel, tmp_path: Path) -> None:
        pieces: list[Buffer] = [b"bytes", bytearray(b"array" * 200), memoryview(b"view" * 2000)[4:], b""]
        joined = b"".join(pieces)
        for offset in (0, 1, 4096, 65536 - 3, self.size - len(joined)):
            disk.write(offset, *pieces)
            model.write(offset, joined)
        disk.write(512, b"x" * 512)
        model.write(512, b"x" * 512)
        model.compare(disk.read(0, self.size))
        disk.flush()
        model.compare(self.raw_content(tmp_path, disk.root), "the medium after a flush")

    def test_a_written_buffer_is_only_borrowed(self, disk: Disk) -> None:
        buffer = bytearray(b"first" * 1000)
        disk.write(100, buffer)
        assert buffer == b"first" * 1000
        buffer[:] = b"later" * 1000
        compare(b"first" * 1000, disk.read(100, 5000), "what was written before the buffer changed")

    def test_a_write_with_fua_is_on_the_medium(self, disk: Disk, model: DiskModel, tmp_path: Path) -> None:
        disk.write(5000, b"forced" * 100, fua=True)
        model.write(5000, b"forced" * 100)
        model.compare(self.raw_content(tmp_path, disk.root), "the medium without a flush")

    @pytest.mark.parametrize("unmap", [False, True])
    def test_zeroed_ranges_read_as_zeroes(self, disk: Disk, model: DiskModel, tmp_path: Path, unmap: bool) -> None:
        for offset, length in ((0, 4096), (5000, 1), (8191, 70000), (self.size - 65536, 65536), (9, 0)):
            disk.write_zeroes(offset, length, unmap=unmap)
            model.write_zeroes(offset, length)
        model.compare(disk.read(0, self.size))
        disk.flush()
        model.compare(self.raw_content(tmp_path, disk.root), "the medium after a flush")

    def test_native_zeroing_needs_no_fallback(self, disk: Disk, model: DiskModel) -> None:
        if disk.root.capabilities.zeroes is not Zeroing.NATIVE:
            with pytest.raises(NotSupported):
                disk.write_zeroes(0, self.size, fallback=False)
        else:
            disk.write_zeroes(0, self.size, fallback=False)
            model.write_zeroes(0, self.size)
        model.compare(disk.read(0, self.size))

    def test_discarded_ranges_keep_their_content_or_become_zeroes(self, disk: Disk, model: DiskModel) -> None:
        if not disk.root.capabilities.discard:
            pytest.skip(f"driver '{disk.format}' does not discard")
        for offset, length in ((0, 65536), (70000, 3), (131071, 65539), (self.size - 4096, 4096), (3, 0)):
            disk.discard(offset, length)
            model.discard(offset, length, disk.read(offset, length))
        model.compare(disk.read(0, self.size))

    def test_random_requests_equal_the_model(self, disk: Disk, model: DiskModel, tmp_path: Path) -> None:
        rng = random.Random(self.size)
        for step in range(300):
            length = min(self.size, rng.choice((1, 511, 512, 4096, 5000, 65536, 100_000)))
            offset = rng.randrange(self.size - length + 1)
            if rng.random() < 0.5:
                offset -= offset % 4096
            action = rng.randrange(6)
            if action == 0:
                disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                model.write_zeroes(offset, length)
            elif action == 1 and disk.root.capabilities.discard:
                disk.discard(offset, length)
                model.discard(offset, length, disk.read(offset, length))
            elif action == 2:
                compare(model.read(offset, length), disk.read(offset, length), f"step {step}: a read at {offset:#x}")
            else:
                data = rng.randbytes(length)
                disk.write(offset, data)
                model.write(offset, data)
        model.compare(disk.read(0, self.size))
        disk.flush()
        model.compare(self.raw_content(tmp_path, disk.root), "the medium after a flush")

    # -- many requests and many threads

    def test_a_batch_does_what_single_calls_do(self, disk: Disk, model: DiskModel) -> None:
        buffers = [bytearray(5000) for _ in range(4)]
        batch: list[Request] = [
            (WRITE_REQUEST, 4096, b"one" * 1000),
            (WRITE_REQUEST, 4096 + 3000, memoryview(b"two" * 1000)),
            (ZERO_REQUEST, 65536, 65536),
            (WRITE_REQUEST, 200_001, bytearray(b"three")),
            (READ, self.size - 5000, buffers[0]),
            (FLUSH, 0, 0),
        ]
        if disk.root.capabilities.zeroes is not Zeroing.NONE:
            batch.append((ZERO_UNMAP, 150_000, 5))
            model.write_zeroes(150_000, 5)
        if disk.root.capabilities.discard:
            batch.append((DISCARD, 262_144, 65536))
        disk.submit(batch)
        model.write(4096, b"one" * 1000 + b"two" * 1000)
        model.write_zeroes(65536, 65536)
        model.write(200_001, b"three")
        model.discard(262_144, 65536, disk.read(262_144, 65536))
        compare(model.read(self.size - 5000, 5000), bytes(buffers[0]), "a read of the batch")
        model.compare(disk.read(0, self.size))
        disk.submit(
            [(READ, offset, buffer) for offset, buffer in zip((0, 5000, 10_000, 300_000), buffers, strict=True)]
        )
        for offset, buffer in zip((0, 5000, 10_000, 300_000), buffers, strict=True):
            compare(model.read(offset, 5000), bytes(buffer), f"the read at {offset}")
        disk.submit([])

    def test_disjoint_writes_of_threads_all_survive(self, disk: Disk, model: DiskModel) -> None:
        rng = random.Random(8)
        cuts = sorted(rng.sample(range(1, 262_144), 399))
        pieces = [(begin, rng.randbytes(end - begin)) for begin, end in zip([0, *cuts], [*cuts, 262_144], strict=True)]
        for begin, data in pieces:
            model.write(begin, data)
        rng.shuffle(pieces)

        def write(part: list[tuple[int, bytes]]) -> None:
            for offset, data in part:
                disk.write(offset, data)

        in_threads([partial(write, pieces[index::8]) for index in range(8)])
        model.compare(disk.read(0, self.size))

    def test_readers_see_old_or_new_bytes(self, disk: Disk) -> None:
        old, new = b"o" * 65536, b"n" * 65536
        disk.write(0, old)
        seen: list[bytes] = []

        def read() -> None:
            for _ in range(50):
                seen.append(disk.read(0, 65536))

        def write() -> None:
            for content in (new, old) * 25:
                disk.write(0, content)

        in_threads([read, read, write])
        # Not even sectors are whole: the kernel copies out of its page cache while it is written.
        for found in seen:
            assert set(found) <= set(b"on"), "a reader saw bytes that nobody wrote"

    # -- what is where

    def test_the_map_tells_the_truth(self, disk: Disk) -> None:
        disk.write_zeroes(65536, 131072, unmap=True)
        disk.write(70_000, b"island")
        disk.flush()
        self.check_map(disk.root, 0, self.size)
        rng = random.Random(5)
        block = disk.root.limits.request_alignment
        for _ in range(20):
            offset = rng.randrange(self.size - 1) // block * block
            length = max(block, rng.randrange(self.size - offset) // block * block)
            self.check_map(disk.root, offset, length)

    def check_map(self, node: BlockNode, offset: int, length: int) -> None:
        """Check every batch that tells of the range against the contract and against what reads give."""
        position, end = offset, offset + length
        while position < end:
            batch = node.map_batch(position, end - position)
            check_batch(batch, position, end - position)
            for row in batch:
                if row.flags & ZERO:
                    found = bytearray(row.length)
                    node.read_into(row.start, found)
                    assert not any(found), f"bytes at {row.start:#x} are said to be zeroes and are not"
            position = batch.end

    # -- shape and life

    def test_growth_reads_as_zeroes_and_shrinking_needs_consent(self, disk: Disk, model: DiskModel) -> None:
        if not disk.root.capabilities.resizable:
            pytest.skip(f"driver '{disk.format}' cannot be resized")
        for size in (self.size + 65536, self.size + 131072):
            disk.resize(size)
            model.resize(size)
            assert disk.size == disk.root.size == size
            model.compare(disk.read(0, size))
            disk.write(size - 512, b"e" * 512)
            model.write(size - 512, b"e" * 512)
        with pytest.raises(CowhandError):
            disk.resize(self.size)
        with pytest.raises(CowhandError):
            disk.root.resize(self.size)
        model.compare(disk.read(0, disk.size), "the disk after a refused resize")
        try:
            disk.resize(65536, shrink=True)
        except NotSupported:
            return
        model.resize(65536)
        disk.resize(self.size)
        model.resize(self.size)
        model.compare(disk.read(0, self.size), "the disk after shrinking and growing")

    def test_flush_may_be_repeated(self, disk: Disk) -> None:
        disk.flush()
        disk.write(0, b"x")
        disk.flush()
        disk.flush()
        assert disk.read(0, 1) == b"x"

    def test_closing_is_once_and_final(self, node: BlockNode) -> None:
        disk = Disk(node)
        disk.close()
        assert node.closed
        assert node.parents == []
        assert node.children == {}
        disk.close()
        with pytest.raises(Closed):
            disk.read(0, 1)

    def test_a_node_opened_for_reading_is_not_written(self, tmp_path: Path) -> None:
        content = self.content()
        node = self.make_node(tmp_path, content, writable=False)
        try:
            assert not node.writable
            assert not node.capabilities.writable
            with pytest.raises(ReadOnly):
                Disk(node, writable=True)
            with Disk(node) as disk:
                calls: tuple[Callable[[], object], ...] = (
                    lambda: disk.write(0, b"x"),
                    lambda: disk.write_zeroes(0, 1),
                    lambda: disk.discard(0, 1),
                    lambda: disk.resize(self.size * 2),
                    lambda: disk.submit([(WRITE_REQUEST, 0, b"x")]),
                )
                for call in calls:
                    with pytest.raises(ReadOnly):
                        call()
                compare(content, disk.read(0, self.size), "the disk")
                compare(content, self.raw_content(tmp_path, node), "the medium")
        finally:
            if not node.closed:
                graph.close_node(node)

    # -- hooks

    def test_hooks_hear_of_every_change(self, disk: Disk) -> None:
        heard: list[tuple[int, int]] = []

        def hook(offset: int, length: int) -> None:
            heard.append((offset, length))

        graph.add_hook(disk.root, hook)
        disk.write(4096, b"x" * 4096, b"y" * 4096)
        assert covers(heard, 4096, 8192)
        heard.clear()
        disk.write_zeroes(65536, 65536)
        assert covers(heard, 65536, 65536)
        heard.clear()
        disk.submit([(WRITE_REQUEST, 0, b"z" * 4096), (ZERO_REQUEST, 131072, 4096)])
        assert covers(heard, 0, 4096)
        assert covers(heard, 131072, 4096)
        heard.clear()
        disk.read(0, 4096)
        disk.flush()
        assert heard == []
        graph.remove_hook(disk.root, hook)
        disk.write(0, b"x" * 4096)
        assert heard == []


def covers(heard: Sequence[tuple[int, int]], offset: int, length: int) -> bool:
    """Tell whether the ranges of *heard* cover ``[offset, offset + length)``."""
    position = offset
    for begin, count in sorted(heard):
        if begin <= position:
            position = max(position, begin + count)
    return position >= offset + length


def check_batch(batch: ExtentBatch, offset: int, length: int) -> None:
    """Assert that *batch* is a well-formed answer about ``[offset, offset + length)``."""
    assert 1 <= len(batch) <= MAX_ROWS, "a batch has at least one row, and not too many"
    position = offset
    for row in batch:
        assert row.start == position, f"a row begins at {row.start:#x} where {position:#x} was due"
        assert row.length > 0, "a row is empty"
        if row.flags & (DATA | ZERO):
            assert row.flags & (ALLOCATED | ZERO), "data that no layer decides on"
        if row.flags & OFFSET:
            assert row.host != NO_HOST
            assert isinstance(row.node, BlockNode), "an offset needs the node that it lies in"
        else:
            assert row.host == NO_HOST
        position = row.end
    assert position <= offset + length, "the batch tells of more than it was asked"


def in_threads(jobs: Sequence[Callable[[], object]]) -> None:
    """Run every callable of *jobs* in a thread of its own, all at once and switching often; raise the first error."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> None:
        try:
            start.wait(30)
            job()
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
