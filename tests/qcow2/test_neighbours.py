"""Writes over neighbouring clusters of which some hold data and some preallocated zeroes."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape


class _CountingNode(MemoryNode):
    """Remembers where it was written."""

    writes: list[tuple[int, int]]

    def write(self, offset: int, buffers: Any, fua: bool = False) -> None:
        self.writes.append((offset, sum(len(buffer) for buffer in buffers)))
        super().write(offset, buffers, fua)


@pytest.mark.parametrize("zeroed", [(1,), (0,), (2,), (0, 2), (0, 1, 2), (1, 3), ()])
@pytest.mark.parametrize(("head", "tail"), [(0, 0), (512, 0), (0, 512), (512, 512)])
def test_preallocated_zeroes_between_data_are_written_with_it(zeroed: tuple[int, ...], head: int, tail: int) -> None:
    """One request where the host clusters adjoin, whatever entries have to change; never more bytes than the guest gave beside zero clusters."""
    unit = 4096
    shape = Shape(cluster=unit, size=64 << 10)
    node = _CountingNode(content=images.create(shape, b"\1" * (4 * unit)).snapshot_bytes())
    node.writes = []
    keeper = Disk(node)
    model = bytearray(b"\1" * (4 * unit))
    with images.open_over(node, writable=True) as disk:
        for number in zeroed:
            disk.write_zeroes(number * unit, unit)
            model[number * unit : (number + 1) * unit] = bytes(unit)
        disk.flush()
        before = next(iter(disk.extents(0, 4 * unit))).host[0]
        node.writes.clear()
        data = b"\2" * (4 * unit - head - tail)
        disk.write(head, data)
        model[head : head + len(data)] = data
        written = list(node.writes)
        assert disk.read(0, 4 * unit) == model
        assert {row.host - row.start for batch in disk.extents(0, 4 * unit) for row in batch} == {before}
    if not head and not tail:
        assert written == [(before, 4 * unit)]
    keeper.close()
    image = oracle.Image(node.snapshot_bytes())
    assert image.check() == oracle.Findings()
    assert image.content()[: 4 * unit] == model
