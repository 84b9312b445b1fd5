"""Compressed clusters that share host clusters: where the next one goes, after some of them have gone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cowhand.block.disk import Disk
from cowhand.block.format_io.reservations import Kind
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError, NoSpace
from cowhand.testing.faults import WRITE, FaultNode
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape

UNIT = 4096
SHAPE = Shape(cluster=UNIT, size=64 * UNIT)


def packable(rng: random.Random, stored: int) -> bytes:
    """Return a cluster's content that takes about *stored* bytes when it is compressed."""
    return rng.randbytes(stored - 40).ljust(UNIT, b"\0")


@contextmanager
def opened(file: MemoryNode | FaultNode) -> Iterator[tuple[Disk, Qcow2Node]]:
    with images.open_over(file, writable=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        yield disk, node


def store(node: Qcow2Node, number: int, data: bytes) -> None:
    payload = node.codec.compress(data)
    assert payload is not None
    node.write_compressed(number * UNIT, payload)


def check(file: MemoryNode, expected: dict[int, bytes]) -> None:
    image = oracle.Image(file.snapshot_bytes())
    assert image.check() == oracle.Findings()
    content = image.content()
    for number, data in expected.items():
        assert content[number * UNIT : (number + 1) * UNIT] == data, f"cluster {number}"


def test_nothing_is_packed_into_a_cluster_that_was_freed_and_taken_for_data(rng: random.Random) -> None:
    """The discarded one spans two host clusters, of which the first is shared, and stays, and the second goes to somebody else."""
    file = images.create(SHAPE)
    keeper = Disk(file)
    first, spanning, plain, later = packable(rng, 3000), packable(rng, 2000), rng.randbytes(UNIT), packable(rng, 1500)
    with opened(file) as (disk, node):
        store(node, 0, first)
        store(node, 1, spanning)
        disk.discard(UNIT, UNIT)
        disk.flush()
        disk.flush()
        disk.write(2 * UNIT, plain)
        store(node, 3, later)
    check(file, {0: first, 1: bytes(UNIT), 2: plain, 3: later})
    keeper.close()


@pytest.mark.parametrize("before", [0, 3000])
def test_nothing_is_packed_behind_what_failed_to_be_written(rng: random.Random, before: int) -> None:
    file = images.create(SHAPE)
    keeper = Disk(file)
    expected = {2: rng.randbytes(UNIT), 3: packable(rng, 1500)}
    faults = FaultNode(file)
    with opened(faults) as (disk, node):
        if before:
            expected[0] = packable(rng, before)
            store(node, 0, expected[0])
        disk.flush()
        faults.fail(WRITE)
        with pytest.raises(CowhandError):
            store(node, 1, packable(rng, 2000))
        disk.write(2 * UNIT, expected[2])
        store(node, 3, expected[3])
    check(file, expected)
    keeper.close()


def test_units_that_somebody_writes_are_left_out_of_those_taken_together(rng: random.Random) -> None:
    """Not only where the first of them is somebody's."""
    file = images.create(SHAPE)
    keeper = Disk(file)
    with opened(file) as (_, node):
        node.check_writable()
        theirs = node.claim(2 * UNIT, UNIT, Kind.DATA)
        assert theirs is not None
        made = node.claim_compressed([(number * UNIT, 100) for number in range(4)])
        assert [reservation.offset for reservation in made] == [0, UNIT]
        for reservation in (theirs, *made):
            node.withdraw(reservation)
    keeper.close()


def test_what_no_descriptor_can_name_is_not_taken() -> None:
    """With clusters of 2 MiB, offsets of compressed data have 49 bits."""
    file = images.create(Shape(cluster=2 << 20, size=8 << 20))
    keeper = Disk(file)
    with opened(file) as (disk, node):
        node.refcounts.free_index = 1 << 49 - 21
        with pytest.raises(NoSpace):
            node.write_compressed(0, b"x" * 100)
        node.refcounts.free_index = 0
        assert disk.read(0, 100) == bytes(100)
    keeper.close()


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.COMPRESSED])
def test_what_is_taken_back_after_a_flush_is_not_lost(kind: Kind) -> None:
    file = images.create(SHAPE)
    keeper = Disk(file)
    with opened(file) as (disk, node):
        node.check_writable()
        reservation = node.claim(0, UNIT, kind, 100)
        assert reservation is not None
        disk.flush()
        node.withdraw(reservation)
    check(file, {0: bytes(UNIT)})
    keeper.close()
