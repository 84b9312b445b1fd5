"""Extents through layers: each byte's row says what the layers' own answers mean together, whatever pieces they answer in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.graph import block_status, graph
from cowhand.block.node.node import BlockNode, Role
from cowhand.block.node.options import NodeOptions
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import IOFailed
from cowhand.core.extents import ALLOCATED, DATA, OFFSET, RECURSE, ZERO, Extent, ExtentBatch, merged
from cowhand.image.create import create
from cowhand.testing.faults import FaultNode
from tests.block.disks import blkdebug_over, qcow2_disk, qcow2_file, qcow2_node

UNIT = 512

#: What a layer says of one unit: nothing, data, plain zero, zero with a place, data that may be a hole.
NOTHING, DATA_ROW, ZERO_ROW, ZERO_HOST, MAYBE = (
    0,
    DATA | ALLOCATED | OFFSET,
    ZERO | ALLOCATED,
    ZERO | ALLOCATED | OFFSET,
    (DATA | ALLOCATED | OFFSET | RECURSE),
)
KINDS = (NOTHING, DATA_ROW, ZERO_ROW, ZERO_HOST, MAYBE)


class HoleyFile(BlockNode):
    """A file that knows which of its units are holes."""

    driver = "holey"

    def __init__(self, holes: Sequence[bool]) -> None:
        super().__init__(NodeOptions())
        self.holes = holes

    @property
    def size(self) -> int:
        return len(self.holes) * UNIT

    def read_into(self, offset: int, buffer: Any) -> None:
        raise AssertionError("nobody reads data to learn what is where")

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        out = ExtentBatch()
        end = offset + length
        while offset < end:
            stop = min(end, (offset // UNIT + 1) * UNIT)
            flags = ZERO if self.holes[offset // UNIT] else DATA
            out.add(offset, stop - offset, flags | ALLOCATED | OFFSET, offset, self)
            offset = stop
        return out


class Layer(HoleyFile):
    """A layer whose own answers are given, unit by unit; it answers at most *most* rows at once. Host offsets run backwards."""

    driver = "layer"
    supports_backing = True

    def __init__(self, kinds: Sequence[int], most: int, file: HoleyFile) -> None:
        super().__init__([])
        self.kinds = kinds
        self.most = most
        self.file = file

    @property
    def size(self) -> int:
        return len(self.kinds) * UNIT

    def host(self, index: int) -> int:
        return (len(self.kinds) - index) * UNIT

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        out = ExtentBatch()
        end = offset + length
        while offset < end and len(out) < self.most:
            index = offset // UNIT
            stop = min(end, (index + 1) * UNIT)
            flags = self.kinds[index]
            out.add(offset, stop - offset, flags, self.host(index) + offset % UNIT, self.file if flags else None)
            offset = stop
        return out


def chain_of(layers: Sequence[Layer]) -> Layer:
    for upper, lower in itertools.pairwise(layers):
        graph.attach(upper, "backing", lower, Role.BACKING)
    return layers[0]


def expected(layers: Sequence[Layer], index: int, depth: int | None) -> Extent:
    """Say what a single unit of the chain is, by the rules and one unit at a time."""
    start = index * UNIT
    for level, layer in enumerate(layers):
        flags = layer.kinds[index]
        if flags:
            host = layer.host(index)
            if flags & RECURSE:
                inside = host < layer.file.size
                flags = flags & ~RECURSE | (ZERO if not inside or layer.file.holes[host // UNIT] else 0)
            return Extent(start, UNIT, flags, host if flags & OFFSET else 0, layer.file, level)
        last = level + 1 == len(layers)
        if last or start >= layers[level + 1].size:
            return Extent(start, UNIT, ZERO, 0, layer, level)
        if depth is not None and level + 1 >= depth:
            return Extent(start, UNIT, 0, 0, layer, level)
    raise AssertionError("a chain has a last layer")


@st.composite
def chains(draw: st.DrawFn) -> list[Layer]:
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24))
        holes = draw(st.lists(st.booleans(), min_size=0, max_size=len(kinds) + 1))
        layers.append(Layer(kinds, draw(st.integers(1, 5)), HoleyFile(holes)))
    return layers


def by_unit(rows: Iterator[Extent]) -> list[Extent]:
    out = []
    for row in rows:
        assert row.start % UNIT == row.length % UNIT == 0
        for at in range(0, row.length, UNIT):
            host = row.host + at if row.flags & OFFSET else 0
            out.append(Extent(row.start + at, UNIT, row.flags, host, row.node, row.depth))
    return out


class TestLayered:
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(chains(), st.none() | st.integers(1, 4), st.integers(1, 9), st.data())
    def test_every_unit_follows_the_rules(
        self, layers: list[Layer], depth: int | None, most: int, data: st.DataObject
    ) -> None:
        top = chain_of(layers)
        count = len(top.kinds)
        first = data.draw(st.integers(0, count - 1))
        last = data.draw(st.integers(first + 1, count))
        with pytest.MonkeyPatch.context() as patch, Disk(top) as disk:
            patch.setattr(block_status, "MAX_ROWS", most)
            patch.setattr(block_status._Window, "_LEAST", data.draw(st.sampled_from((4 * UNIT, 65536))))
            batches = list(disk.extents(first * UNIT, (last - first) * UNIT, depth=depth))
        assert all(0 < len(batch) <= most for batch in batches)
        position = first * UNIT
        for batch in batches:
            for row in batch:
                assert row.start == position
                position = row.end
        assert position == last * UNIT
        found = by_unit(row for batch in batches for row in batch)
        assert found == [expected(layers, index, depth) for index in range(first, last)]

    def test_a_layer_of_more_rows_than_it_tells_at_once_is_walked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        most, count = 512, 1 << 14
        monkeypatch.setattr(block_status._Window, "_LEAST", 4 * UNIT)
        below = Layer([NOTHING, ZERO_ROW] * (count // 2), most, HoleyFile([]))
        top = chain_of([Layer([DATA_ROW, *[NOTHING] * 7] * (count // 8), count, HoleyFile([])), below])
        told = 0
        answer = below.map_batch

        def noted(offset: int, length: int) -> ExtentBatch:
            nonlocal told
            batch = answer(offset, length)
            told += len(batch)
            return batch

        monkeypatch.setattr(below, "map_batch", noted)
        with Disk(top) as disk:
            assert len(disk_rows(disk)) > count // 2
        assert told < 4 * count

    def test_what_is_wrong_under_a_layers_data_is_nobodys_trouble(self) -> None:
        class Damaged(Layer):
            def map_batch(self, offset: int, length: int) -> ExtentBatch:
                if offset < 8 * UNIT < offset + length:
                    raise IOFailed("a table cannot be read")
                return super().map_batch(offset, length)

        file = HoleyFile([False] * 16)
        kinds = [NOTHING] * 6 + [DATA_ROW] * 4 + [NOTHING] * 6
        with Disk(chain_of([Layer(kinds, 16, file), Damaged([ZERO_ROW] * 16, 16, file)])) as disk:
            assert [depth for depth, _ in itertools.groupby(row.depth for row in disk_rows(disk))] == [1, 0, 1]

    def test_rows_that_say_the_same_are_one(self) -> None:
        file = HoleyFile([False] * 8)
        top = chain_of([Layer([0] * 8, 1, file), Layer([0, 0, ZERO_ROW, ZERO_ROW, 0, 0, 0, 0], 1, file)])
        with Disk(top) as disk:
            rows = [(row.start // UNIT, row.length // UNIT, row.flags, row.depth) for row in merged(disk.extents())]
        assert rows == [(0, 2, ZERO, 1), (2, 2, ZERO | ALLOCATED, 1), (4, 4, ZERO, 1)]

    def test_filters_are_looked_through(self) -> None:
        base = Disk(qcow2_node(qcow2_file(65536, cluster_size=512)), writable=True)
        base.write(0, b"b" * 1024)
        filtered = FaultNode(base.root)
        top = blkdebug_over(qcow2_node(qcow2_file(65536, cluster_size=512), backing=filtered))
        with Disk(top, writable=True) as disk:
            disk.write(512, b"t" * 512)
            rows = [(row.start, row.length, row.depth, bool(row.flags & DATA)) for row in merged(disk.extents())]
        assert rows == [(0, 512, 1, True), (512, 512, 0, True), (1024, 65536 - 1024, 1, False)]
        base.close()

    def test_a_short_backing_file_ends_in_zeroes_of_the_layer_above(self) -> None:
        with qcow2_disk(4096, backing=MemoryNode(content=b"x" * 700), cluster_size=512) as disk:
            rows = [(row.start, row.length, row.depth, row.flags & (DATA | ZERO)) for row in merged(disk.extents())]
        assert rows == [(0, 700, 1, DATA), (700, 324, 1, ZERO), (1024, 3072, 0, ZERO)]

    def test_depth_one_asks_the_root_alone(self) -> None:
        with qcow2_disk(4096, backing=MemoryNode(content=b"x" * 1024), cluster_size=512) as disk:
            disk.write(512, b"y" * 512)
            rows = [(row.start, row.length, row.flags & (DATA | ZERO)) for row in disk_rows(disk, depth=1)]
        assert rows == [(0, 512, 0), (512, 512, DATA), (1024, 3072, ZERO)]

    def test_an_exbibyte_of_nothing_is_one_row(self) -> None:
        with qcow2_disk(1 << 55, cluster_size=2 << 20) as disk:
            assert [(row.start, row.length) for row in disk_rows(disk)] == [(0, 1 << 55)]

    def test_a_chain_of_two_hundred_layers(self) -> None:
        file = HoleyFile([False])
        layers = [Layer([NOTHING], 1, file) for _ in range(199)] + [Layer([DATA_ROW], 1, file)]
        with Disk(chain_of(layers)) as disk:
            assert [row.depth for row in disk_rows(disk)] == [199]


def disk_rows(disk: Disk, **options: Any) -> list[Extent]:
    return list(merged(disk.extents(**options)))


class TestHoles:
    """Preallocated metadata: the format says data, and the file knows better."""

    def test_qcow2_asks_the_file(self) -> None:
        file = qcow2_file(1 << 20, cluster_size=4096, preallocation="metadata")
        with Disk(qcow2_node(file), writable=True) as disk:
            disk.write(8192, b"x" * 4096)
            rows = [(row.start, row.length, bool(row.flags & ZERO), bool(row.flags & DATA)) for row in disk_rows(disk)]
        assert [(start, length, zero) for start, length, zero, data in rows if data] == [
            (0, 8192, True),
            (8192, 4096, False),
            (12288, (1 << 20) - 12288, True),
        ]

    def test_more_holes_than_a_batch_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_status, "MAX_ROWS", 10)
        top = Layer([MAYBE] * 64, 64, HoleyFile([bool(number % 2) for number in range(66)]))
        # One row of 64 units whose host offsets ascend.
        top.host = lambda index: index * UNIT  # type: ignore[method-assign]
        with Disk(top) as disk:
            batches = list(disk.extents())
        assert [len(batch) for batch in batches] == [10] * 6 + [4]
        assert [bool(row.flags & ZERO) for batch in batches for row in batch] == [False, True] * 32


@pytest.mark.parametrize("length", [1, 511, 513, 300_000])
def test_a_base_that_ends_inside_a_sector_answers_for_all_of_it(length: int, tmp_path: Path) -> None:
    """As qemu-img's map tells it: zeroes of the base, where its next bytes would lie."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"x" * length)
    create(top, "qcow2", 1 << 20, backing="base", backing_format="raw")
    with cowhand.open(top) as disk:
        rows = [row for batch in disk.extents() for row in batch]
    assert [(row.start, row.depth) for row in rows] == [(0, 1), (length, 1), (-(-length // 512) * 512, 0)]
    assert [bool(row.flags & ZERO) for row in rows] == [False, True, True]
    assert rows[1].flags & OFFSET
    assert rows[1].host == length
