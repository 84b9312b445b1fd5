"""The way to a node with coarse blocks: any request, whole blocks below, and no user undoes another's bytes in one block."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from cowhand.block.access.aligned import AlignedAccess
from cowhand.block.disk import Disk
from cowhand.block.filters.blkdebug.node import BlkDebugNode
from cowhand.block.graph import graph
from cowhand.block.node.node import DISCARD, READ, WRITE_REQUEST, ZERO_REQUEST
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import IOFailed, NotSupported
from cowhand.drivers import REGISTRY
from cowhand.testing.faults import FaultNode
from tests.block.disks import PATIENCE, Worker, impatient_interpreter, qcow2_file, qcow2_node

SIZE = 1 << 20


class BlockyNode(FaultNode):
    """A medium of whole blocks that notes what it is asked, and refuses anything else."""

    def __init__(self, block: int, content: bytes = bytes(SIZE), *, memory: int = 1) -> None:
        super().__init__(MemoryNode(content=content), sector=block)
        self.limits = self.limits._replace(memory_alignment=memory)
        self.asked: list[tuple[str, int, int]] = []

    def note(self, what: str, offset: int, length: int) -> None:
        block = self.limits.request_alignment
        assert offset % block == length % block == 0, f"{what} of {length} at {offset}"
        assert length, f"an empty {what}"
        self.asked.append((what, offset, length))

    def read_into(self, offset: int, buffer: Any) -> None:
        self.note("read", offset, len(buffer))
        super().read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Any], fua: bool = False) -> None:
        self.note("write", offset, sum(map(len, buffers)))
        super().write(offset, buffers, fua)

    def write_zeroes(self, offset: int, length: int, **options: Any) -> None:
        self.note("zero", offset, length)
        super().write_zeroes(offset, length, **options)

    def discard(self, offset: int, length: int) -> None:
        self.note("discard", offset, length)
        super().discard(offset, length)


@pytest.mark.parametrize("block", [512, 4096])
def test_random_requests_equal_the_model(block: int, rng: random.Random) -> None:
    content = rng.randbytes(SIZE)
    node, model = BlockyNode(block, content), bytearray(content)
    with Disk(node, writable=True) as disk:
        for _ in range(600):
            offset = rng.randrange(SIZE - 20_000)
            length = rng.choice((1, 3, 511, 512, 513, block, block + 1, 3 * block, rng.randrange(1, 20_000)))
            if rng.random() < 0.4:
                offset -= offset % block
            end = offset + length
            kind = rng.randrange(5)
            if kind == 0:
                cut = rng.randrange(length + 1)
                data = rng.randbytes(length)
                disk.write(offset, data[:cut], memoryview(data)[cut:], fua=rng.random() < 0.2)
                model[offset:end] = data
            elif kind == 1:
                disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                model[offset:end] = bytes(length)
            elif kind == 2:
                disk.discard(offset, length)
                found = disk.read(offset, length)
                assert all(now in (0, was) for now, was in zip(found, model[offset:end], strict=True))
                model[offset:end] = found
            elif kind == 3:
                data = rng.randbytes(length)
                buffer = bytearray(length)
                disk.submit([(WRITE_REQUEST, offset, data), (READ, offset, buffer)])
                model[offset:end] = data
                assert buffer == data
            else:
                assert disk.read(offset, length) == model[offset:end]
        assert disk.read(0, SIZE) == model


class TestWhatIsAsked:
    """A partial block costs one read of it; whole ones cost nothing."""

    @pytest.mark.parametrize(
        ("offset", "length", "asked"),
        [
            (0, 4096, [("write", 0, 4096)]),
            (512, 100, [("read", 0, 4096), ("write", 0, 4096)]),
            (0, 100, [("read", 0, 4096), ("write", 0, 4096)]),
            (4000, 200, [("read", 0, 8192), ("write", 0, 8192)]),
            (0, 4097, [("read", 4096, 4096), ("write", 0, 8192)]),
            (1, 12287, [("read", 0, 4096), ("write", 0, 12288)]),
            (4095, 4098, [("read", 0, 4096), ("read", 8192, 4096), ("write", 0, 12288)]),
        ],
    )
    def test_by_a_write(self, offset: int, length: int, asked: list[tuple[str, int, int]]) -> None:
        node = BlockyNode(4096)
        with Disk(node, writable=True) as disk:
            disk.write(offset, b"x" * length)
        assert node.asked == asked

    def test_by_a_read(self) -> None:
        node = BlockyNode(4096)
        with Disk(node) as disk:
            disk.read(4095, 2)
            disk.read(8192, 4096)
        assert node.asked == [("read", 0, 8192), ("read", 8192, 4096)]

    def test_by_zeroes(self) -> None:
        node = BlockyNode(4096)
        with Disk(node, writable=True) as disk:
            disk.write_zeroes(4000, 4096 + 96 + 200)
        assert [entry for entry in node.asked if entry[0] != "read"] == [
            ("write", 0, 4096),
            ("zero", 4096, 4096),
            ("write", 8192, 4096),
        ]

    def test_by_a_discard(self) -> None:
        node = BlockyNode(4096)
        with Disk(node, writable=True) as disk:
            disk.discard(4095, 2)
            disk.discard(1, 12288)
        assert node.asked == [("discard", 4096, 8192)]

    def test_zeroes_without_fallback_are_whole_blocks_or_refused(self) -> None:
        node = BlockyNode(4096, b"x" * SIZE)
        with Disk(node, writable=True) as disk:
            disk.write_zeroes(4096, 4096, fallback=False)
            for offset, length in ((1, 8191), (0, 4097), (10, 10)):
                with pytest.raises(NotSupported):
                    disk.write_zeroes(offset, length, fallback=False)
            assert disk.read(0, 12288) == b"x" * 4096 + bytes(4096) + b"x" * 4096
        assert [entry for entry in node.asked if entry[0] != "read"] == [("zero", 4096, 4096)]

    def test_a_fine_node_is_reached_without_padding(self) -> None:
        node = MemoryNode(content=bytes(SIZE))
        with Disk(node) as disk:
            assert disk.edge.lane is node
            assert not isinstance(getattr(disk.edge.read_into, "__self__", None), AlignedAccess)

    def test_a_format_over_coarse_blocks(self, rng: random.Random) -> None:
        file = qcow2_file(SIZE, cluster_size=512)
        content = file.snapshot_bytes()
        node = BlockyNode(4096, content.ljust(-(-len(content) // 4096) * 4096, b"\0"))
        model = bytearray(SIZE)
        with Disk(qcow2_node(node), writable=True) as disk:
            for _ in range(100):
                offset, data = rng.randrange(SIZE - 3000), rng.randbytes(rng.randrange(1, 3000))
                disk.write(offset, data)
                model[offset : offset + len(data)] = data
            assert disk.read(0, SIZE) == model


class TestSharedBlocks:
    """Users of one block do not undo one another."""

    def test_halves_written_at_once(self) -> None:
        node = BlockyNode(4096)
        rounds = 400

        def write(disk: Disk, part: int) -> None:
            for number in range(rounds):
                disk.write(number % 200 * 4096 + part * 1024, bytes([part + 1]) * 1024)

        # Two of the writers have disks of their own: the lock belongs to the node.
        disks = [Disk(node, writable=True) for _ in range(2)]
        with impatient_interpreter():
            for worker in [Worker(write, disks[part % 2], part) for part in range(4)]:
                worker.done()
        assert disks[0].read(0, 200 * 4096) == b"".join(bytes([part + 1]) * 1024 for part in range(4)) * 200
        for disk in disks:
            disk.close()

    @pytest.mark.parametrize("kind", [WRITE_REQUEST, ZERO_REQUEST, DISCARD])
    def test_a_whole_block_waits_for_a_partial_one(self, kind: int) -> None:
        node = BlockyNode(4096, b"o" * SIZE)
        suspended = node.suspend("write")
        with Disk(node, writable=True) as disk:
            partial = Worker(disk.write, 100, b"p" * 100)
            assert suspended.reached.wait(PATIENCE)
            what: Any = b"w" * 4096 if kind == WRITE_REQUEST else 4096
            whole = Worker(disk.submit, [(kind, 0, what)])
            whole.join(0.05)
            assert whole.is_alive()
            suspended.resume()
            partial.done()
            whole.done()
            found = disk.read(0, 4096)
            if kind == WRITE_REQUEST:
                assert found == b"w" * 4096
            elif kind == ZERO_REQUEST:
                assert found == bytes(4096)

    def test_a_failed_read_changes_nothing(self) -> None:
        node = BlockyNode(4096, b"o" * SIZE)
        with Disk(node, writable=True) as disk:
            node.fail("read")
            with pytest.raises(IOFailed):
                disk.write(10, b"x")
            disk.write(20, b"y")
            assert disk.read(0, 30) == b"o" * 20 + b"y" + b"o" * 9

    def test_hooks_hear_of_the_padded_range(self) -> None:
        node = BlockyNode(4096)
        heard: list[tuple[int, int]] = []
        with Disk(node, writable=True) as disk:
            graph.add_hook(node, lambda offset, length: heard.append((offset, length)))
            disk.write(5000, b"x")
        assert heard == [(4096, 4096)]

    def test_a_batch_goes_on_after_an_error(self) -> None:
        node = BlockyNode(4096)
        with Disk(node, writable=True) as disk:
            node.fail("write", 2)
            with pytest.raises(IOFailed):
                disk.submit([(WRITE_REQUEST, at, b"x" * 10) for at in (0, 5000, 10_000)])
            assert [disk.read(at, 1) for at in (0, 5000, 10_000)] == [b"x", b"\0", b"x"]


def test_a_partial_write_that_waits_holds_back_its_own_block_alone() -> None:
    inner = MemoryNode(content=bytes(16384))
    node = Opening(REGISTRY).open({"driver": "blkdebug", "image": inner, "align": 4096, "read-only": False})
    assert isinstance(node, BlkDebugNode)
    with Disk(node, writable=True) as disk:
        node.breakpoint("pwritev_rmw_after_head", "A")
        first = Worker(lambda: disk.write(512, b"a" * 512))
        assert node.wait_suspended("A", 10)
        disk.write(8192 + 512, b"b" * 512)  # another block
        second = Worker(lambda: disk.write(1024, b"c" * 512))
        second.join(0.05)
        assert second.is_alive()
        node.resume("A")
        first.done()
        second.done()
        assert disk.read(0, 2048) == bytes(512) + b"a" * 512 + b"c" * 512 + bytes(512)
