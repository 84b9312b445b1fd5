"""Copy-on-read: what is read is held afterwards, what is written meanwhile is not undone."""

from __future__ import annotations

import random
import threading

import pytest

from cowhand.block.disk import Disk
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidArgument, ReadOnly
from cowhand.core.extents import ALLOCATED, DATA, ZERO
from cowhand.drivers import REGISTRY
from cowhand.testing.filters import FilterContract
from tests.block.disks import Worker, qcow2_file, qcow2_node

MIB = 1 << 20


def over(inner: BlockNode, **options: object) -> BlockNode:
    given = {"driver": "copy-on-read", "file": inner, "read-only": not inner.writable, **options}
    return Opening(REGISTRY).open(given)


class TestCopyOnReadContract(FilterContract):
    """Over a file, which has everything, the filter changes nothing."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        if inner.writable:
            return over(inner)
        from cowhand.block.filters.copy_on_read import CopyOnReadNode, CopyOnReadOptions
        from cowhand.block.graph import graph
        from cowhand.block.node.node import Role

        node = CopyOnReadNode(CopyOnReadOptions(read_only=True))
        graph.attach(node, "file", inner, Role.FILTERED)
        node.start()
        return node


def overlay(content: bytes) -> BlockNode:
    return qcow2_node(qcow2_file(len(content)), backing=MemoryNode(content=content))


def held(disk: Disk) -> list[tuple[int, int]]:
    return [(row.start, row.length) for batch in disk.extents(depth=1) for row in batch if row.flags & ALLOCATED]


def test_whole_clusters_are_copied_and_zeroes_stay_zeroes() -> None:
    content = b"a" * 65536 + bytes(65536) + b"c" * (MIB - 131072)
    with Disk(over(overlay(content)), writable=True) as disk:
        assert disk.read(65536 - 10, 20) == b"a" * 10 + bytes(10)
        assert sum(length for _, length in held(disk)) == 131072
        second = [row for batch in disk.extents(65536, 65536, depth=1) for row in batch]
        assert all(row.flags & ZERO and not row.flags & DATA for row in second)
        assert disk.read(0, MIB) == content


def test_nothing_below_the_bottom_is_copied() -> None:
    base = qcow2_node(qcow2_file(MIB), backing=MemoryNode(content=b"z" * MIB), writable=True)
    with Disk(base, writable=True) as below:
        below.write(0, b"b" * 65536)
        file = qcow2_file(MIB)
        top = Opening(REGISTRY).open({"driver": "qcow2", "file": file, "backing": base, "read-only": False})
        with Disk(over(top, bottom=base.name), writable=True) as disk:
            assert disk.read(0, MIB) == b"b" * 65536 + b"z" * (MIB - 65536)
            assert held(disk) == [(0, 65536)]


def test_no_copy_undoes_a_write() -> None:
    content = b"o" * MIB
    disk = Disk(over(overlay(content)), writable=True)
    rng = random.Random(7)
    places = [n * 4096 for n in range(256)]
    rng.shuffle(places)
    stop = threading.Event()

    def read() -> None:
        mine = random.Random(threading.get_ident())
        while not stop.is_set():
            found = disk.read(mine.randrange(255) * 4096, 4096)
            assert set(found) <= set(b"on")

    readers = [Worker(read) for _ in range(2)]
    for place in places:
        disk.write(place, b"n" * 2048)
    stop.set()
    for reader in readers:
        reader.done()
    assert disk.read(0, MIB) == (b"n" * 2048 + b"o" * 2048) * 256
    disk.close()


def test_an_image_that_is_only_read_is_refused() -> None:
    with pytest.raises(ReadOnly):
        over(qcow2_node(qcow2_file(MIB), writable=False))


def test_a_bottom_that_is_not_in_the_chain_is_refused_when_it_is_opened() -> None:
    inner = MemoryNode(content=bytes(4096))
    with pytest.raises(InvalidArgument, match="Bottom node 'nobody' not found"):
        Opening(REGISTRY).open({"driver": "copy-on-read", "bottom": "nobody", "file": inner, "read-only": False})
