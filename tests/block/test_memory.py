"""The memory protocol: a sparse, growing file without a disk."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowhand.block.node.node import BlockNode
from cowhand.block.protocols.memory import PAGE, MemoryNode, MemoryOptions
from cowhand.core.errors import InvalidArgument, NotSupported, ReadOnly
from cowhand.core.extents import DATA, MAX_ROWS, ZERO
from cowhand.core.units import MAX_SIZE
from cowhand.testing.nodes import NodeContract


def read(node: MemoryNode, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    node.read_into(offset, buffer)
    return bytes(buffer)


def test_random_writes_equal_a_bytearray(rng: random.Random) -> None:
    node, model = MemoryNode(MemoryOptions(size=60_000)), bytearray(60_000)
    for _ in range(400):
        offset = rng.randrange(70_000)
        length = rng.choice((1, 7, 512, PAGE, 3 * PAGE + 11))
        action = rng.randrange(3)
        if action == 0:
            data = rng.randbytes(length)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
            node.write(offset, (data[: length // 2], memoryview(data)[length // 2 :]))
        elif action == 1:
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = bytes(length)
            node.write_zeroes(offset, length)
        else:
            end = min(offset + length, len(model))
            model[offset:end] = bytes(max(0, end - offset))
            node.discard(offset, length)
        assert node.size == len(model)
        assert read(node, offset, length) == bytes(model[offset : offset + length]).ljust(length, b"\0")
    assert node.snapshot_bytes() == model


def test_an_exbibyte_costs_what_was_written() -> None:
    node = MemoryNode(MemoryOptions(size=1 << 60))
    node.write((1 << 60) - 3, (b"end",))
    node.discard(0, (1 << 60) - PAGE)
    node.write_zeroes(0, 1 << 59)
    assert node.allocated_size() == PAGE
    assert read(node, (1 << 60) - 4, 4) == b"\0end"
    rows = [(row.start, row.length, row.flags & (DATA | ZERO)) for row in node.map_batch(0, 1 << 60)]
    assert rows == [(0, (1 << 60) - PAGE, ZERO), ((1 << 60) - PAGE, PAGE, DATA)]


def test_a_copy_shares_pages_and_no_changes() -> None:
    node = MemoryNode(content=bytes(range(256)) * 64)
    before = node.snapshot_bytes()
    twin = node.copy()
    node.write(100, (b"original",))
    twin.write(PAGE, (b"twin",))
    twin.resize(PAGE + 4, shrink=True)
    assert node.snapshot_bytes() == before[:100] + b"original" + before[108:]
    assert twin.snapshot_bytes() == before[:PAGE] + b"twin"


def test_punched_parts_of_a_page_are_cleared_and_whole_pages_given_back() -> None:
    node = MemoryNode(content=b"\x55" * (3 * PAGE))
    node.write_zeroes(PAGE - 1, PAGE + 2, unmap=True, fallback=False)
    assert node.allocated_size() == 2 * PAGE
    assert node.snapshot_bytes() == b"\x55" * (PAGE - 1) + bytes(PAGE + 2) + b"\x55" * (PAGE - 1)


def test_what_was_cut_off_does_not_come_back() -> None:
    node = MemoryNode(content=b"\x55" * 5000)
    with pytest.raises(InvalidArgument):
        node.resize(10)
    node.resize(10, shrink=True)
    node.resize(5000)
    assert node.snapshot_bytes() == b"\x55" * 10 + bytes(4990)


def test_a_map_of_many_holes_keeps_to_the_limit_of_rows() -> None:
    node = MemoryNode()
    for index in range(0, 2 * MAX_ROWS, 2):
        node.write(index * PAGE, (b"x",))
    position = rows = 0
    while position < node.size:
        batch = node.map_batch(position, node.size - position)
        assert 0 < len(batch) <= MAX_ROWS
        assert batch.begin == position
        position = batch.end
        rows += len(batch)
    assert position == node.size
    assert rows == 2 * MAX_ROWS - 1


def test_requests_keep_to_the_configured_alignment() -> None:
    node = MemoryNode(MemoryOptions(size=8192, request_alignment=4096))
    node.write(4096, (bytes(2048), bytes(2048)))
    for call in (
        lambda: node.write(512, (bytes(4096),)),
        lambda: node.write(0, (bytes(512),)),
        lambda: node.read_into(0, bytearray(100)),
        lambda: node.discard(0, 512),
        lambda: node.write_zeroes(1, 4096),
    ):
        with pytest.raises(InvalidArgument):
            call()
    with pytest.raises(InvalidArgument):
        MemoryNode(MemoryOptions(request_alignment=3))


def test_refuses_what_it_cannot_do() -> None:
    node = MemoryNode(MemoryOptions(size=10))
    with pytest.raises(InvalidArgument):
        node.write(MAX_SIZE, (b"x",))
    with pytest.raises(NotSupported):
        node.resize(20, preallocation="full")
    assert node.size == 10
    fixed = MemoryNode(MemoryOptions(read_only=True), content=b"abc")
    for call in (
        lambda: fixed.write(0, (b"x",)),
        lambda: fixed.write_zeroes(0, 1),
        lambda: fixed.discard(0, 1),
        lambda: fixed.resize(9),
    ):
        with pytest.raises(ReadOnly):
            call()
    assert read(fixed, 0, 3) == b"abc"


def pages_of(node: BlockNode) -> bytes:
    """Put the pages together without asking the node."""
    assert isinstance(node, MemoryNode)
    content = bytearray(node.size + PAGE)
    for index, page in node._pages.items():
        content[index * PAGE : (index + 1) * PAGE] = page
    return bytes(content[: node.size])


class TestMemory(NodeContract):
    """The contract of nodes."""

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> MemoryNode:
        return MemoryNode(MemoryOptions(read_only=not writable), content)

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        return pages_of(node)


class TestMemoryWithLargeSectors(TestMemory):
    """The contract through the padding of an edge."""

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> MemoryNode:
        return MemoryNode(MemoryOptions(read_only=not writable, request_alignment=4096), content)
