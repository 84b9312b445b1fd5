"""The contracts accept what is right and reject nodes that are wrong in one known way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.node.node import BlockNode, Request
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.buffers import Buffer
from cowhand.core.extents import DATA, OFFSET, ZERO, ExtentBatch
from cowhand.testing.faults import FaultNode
from cowhand.testing.filters import FilterContract
from cowhand.testing.model import DiskModel
from cowhand.testing.nodes import NodeContract
from cowhand.testing.recorder import RecorderNode
from cowhand.testing.wrapper import WrapperNode


class TestWrapper(FilterContract):
    """The plain wrapper is a filter."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return WrapperNode(inner)


class TestRecorder(FilterContract):
    """The recorder changes nothing."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return RecorderNode(inner)


class TestSectorRecorder(FilterContract):
    """Nor does one that records whole sectors."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return RecorderNode(inner, sector=512)


class TestFaults(FilterContract):
    """The fault node without arrangements changes nothing."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return FaultNode(inner)


class ShortReads(MemoryNode):
    """Fills at most 4 KiB of a buffer."""

    def read_into(self, offset: int, buffer: Buffer) -> None:
        super().read_into(offset, memoryview(buffer)[:4096])


class OneBuffer(MemoryNode):
    """Writes the first buffer only."""

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        super().write(offset, buffers[:1], fua)


class KeepsBuffers(MemoryNode):
    """Writes what it was given at the next flush."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content=content)
        self.kept: list[tuple[int, Buffer]] = []

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self.kept.append((offset, b"".join(buffers) if len(buffers) > 1 else buffers[0]))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        for place, data in self.kept:
            super().write(place, (data,))
        super().read_into(offset, buffer)


class ForgetsFua(KeepsBuffers):
    """Acknowledges FUA before the medium has it."""


class WritesOnes(MemoryNode):
    """Says zero and writes something else."""

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.write(offset, (b"\1" * length,))


class DiscardsTooMuch(MemoryNode):
    """Rounds a discard outwards."""

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset - offset % 4096, length + 4096)


class WrongMap(MemoryNode):
    """Answers :meth:`map_batch` in a wrong way of choice."""

    wrong: Callable[[ExtentBatch, int, int], None]

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        self.wrong(batch, offset, length)
        return batch


class LosesBatches(MemoryNode):
    """Stops a batch at its third request."""

    def submit(self, batch: Sequence[Request]) -> None:
        super().submit(batch[:3])


class Racy(MemoryNode):
    """Reads, changes and writes 4 KiB without a lock."""

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        for buffer in buffers:
            begin, end = offset // 4096 * 4096, -(-(offset + len(buffer)) // 4096) * 4096
            block = bytearray(end - begin)
            self.read_into(begin, block)
            time.sleep(0)
            block[offset - begin : offset - begin + len(buffer)] = buffer
            for position in range(0, len(block), 512):
                super().write(begin + position, (block[position : position + 512],))
            offset += len(buffer)


class GrowsDirty(MemoryNode):
    """New bytes are not zeroes."""

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        old = self.size
        super().resize(size, shrink=shrink)
        if size > old:
            self.write(old, (b"\xee" * (size - old),))


class Shrinks(MemoryNode):
    """Cuts data off unasked."""

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        super().resize(size, shrink=True)


class Contract(NodeContract):
    """The contract over a node that the test gives."""

    def __init__(self, node: MemoryNode) -> None:
        self.node_under_test = node

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        return self.node_under_test

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        content = bytearray(node.size)
        assert isinstance(node, MemoryNode)
        MemoryNode.read_into(node, 0, content)
        return bytes(content)


CONTENT = NodeContract().content()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (ShortReads, "test_reads_are_total_at_any_offset"),
        (OneBuffer, "test_writes_of_any_alignment_and_kind_of_buffer"),
        (KeepsBuffers, "test_a_written_buffer_is_only_borrowed"),
        (ForgetsFua, "test_a_write_with_fua_is_on_the_medium"),
        (WritesOnes, "test_zeroed_ranges_read_as_zeroes"),
        (WritesOnes, "test_native_zeroing_needs_no_fallback"),
        (DiscardsTooMuch, "test_discarded_ranges_keep_their_content_or_become_zeroes"),
        (DiscardsTooMuch, "test_random_requests_equal_the_model"),
        (LosesBatches, "test_a_batch_does_what_single_calls_do"),
        (Racy, "test_disjoint_writes_of_threads_all_survive"),
        (GrowsDirty, "test_growth_reads_as_zeroes_and_shrinking_needs_consent"),
        (Shrinks, "test_growth_reads_as_zeroes_and_shrinking_needs_consent"),
    ],
)
def test_a_broken_node_fails_the_contract(broken: type[MemoryNode], test: str, tmp_path: Path) -> None:
    node = broken(content=CONTENT)
    contract = Contract(node)
    given = {"node": node, "model": DiskModel(len(CONTENT), CONTENT), "tmp_path": tmp_path, "unmap": False}
    method = getattr(contract, test)
    wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]
    if "disk" not in wanted:
        with pytest.raises(AssertionError):
            method(**{name: given[name] for name in wanted})
        return
    with Disk(node, writable=True) as disk:
        given["disk"] = disk
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            method(**{name: given[name] for name in wanted})


def empty(batch: ExtentBatch, offset: int, length: int) -> None:
    pass


def too_far(batch: ExtentBatch, offset: int, length: int) -> None:
    batch.add(offset, length + 1, DATA)


def gap(batch: ExtentBatch, offset: int, length: int) -> None:
    batch.add(offset, 1, DATA | 4)
    batch.add(offset + 2, length - 2, DATA | 4)


def late(batch: ExtentBatch, offset: int, length: int) -> None:
    batch.add(offset + 1, length - 1, DATA | 4)


def lie(batch: ExtentBatch, offset: int, length: int) -> None:
    batch.add(offset, length, ZERO | 4)


def nowhere(batch: ExtentBatch, offset: int, length: int) -> None:
    batch.add(offset, length, DATA | 4 | OFFSET, offset, None)


@pytest.mark.parametrize("wrong", [empty, too_far, gap, late, lie, nowhere])
def test_a_wrong_map_fails_the_contract(wrong: Callable[[ExtentBatch, int, int], None]) -> None:
    node = WrongMap(content=CONTENT)
    node.wrong = wrong
    with pytest.raises(AssertionError):
        Contract(node).check_map(node, 0, node.size)
