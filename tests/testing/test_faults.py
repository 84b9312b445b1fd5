"""The fault node does what was arranged, once or from then on, and nothing else."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from cowhand.block.protocols.memory import MemoryNode, MemoryOptions
from cowhand.core.errors import CowhandError, IOFailed, NoSpace
from cowhand.testing.faults import ALL, CHANGES, FLUSH, GROWTH, HALF, READ, TRUNCATE, WRITE, ZERO, FaultNode
from tests.tools.patience import PATIENCE


def make(alignment: int = 1) -> FaultNode:
    return FaultNode(MemoryNode(MemoryOptions(request_alignment=alignment), content=b"a" * 4096))


def content(node: FaultNode) -> bytes:
    assert isinstance(node.inner, MemoryNode)
    return node.inner.snapshot_bytes()


def test_the_nth_request_of_a_kind_fails_once() -> None:
    node = make()
    node.fail(WRITE, 2, errno.ENOSPC)
    node.write(0, (b"1",))
    node.write_zeroes(10, 1)
    with pytest.raises(NoSpace) as caught:
        node.write(1, (b"2",))
    node.write(2, (b"3",))
    assert caught.value.errno == errno.ENOSPC
    assert content(node)[:11] == b"1a3aaaaaaa\0"
    assert (node.counts[WRITE], node.counts[ZERO], node.failed) == (3, 1, 1)


def test_a_lasting_fault_stays_until_the_reset() -> None:
    node = make()
    node.fail(frozenset((WRITE, FLUSH)), 2, lasting=True)
    node.write(0, (b"1",))
    for call in (node.flush, lambda: node.write(0, (b"2",)), node.flush):
        with pytest.raises(IOFailed):
            call()
    node.reset()
    node.flush()
    node.write(0, (b"4",))
    assert content(node)[:1] == b"4"


@pytest.mark.parametrize("alignment", [1, 512])
def test_a_partial_fault_does_the_first_half(alignment: int) -> None:
    node = make(alignment)
    node.fail(WRITE, done=HALF)
    with pytest.raises(IOFailed):
        node.write(0, (b"b" * 512, b"c" * 1024))
    half = 768 // alignment * alignment
    assert content(node) == (b"b" * 512 + b"c" * 1024)[:half] + b"a" * (4096 - half)
    node.fail(ZERO, done=HALF)
    with pytest.raises(IOFailed):
        node.write_zeroes(0, 1024)
    assert content(node)[:512] == bytes(512)


def test_a_failed_request_may_be_done_all_the_same() -> None:
    node = make()
    node.fail(CHANGES, lasting=True, done=ALL)
    for call in (
        lambda: node.write(0, (b"x", b"y")),
        lambda: node.resize(5000),
        lambda: node.discard(4090, 6),
        node.flush,
    ):
        with pytest.raises(IOFailed):
            call()
    assert content(node) == b"xy" + b"a" * 4088 + bytes(910)
    assert node.kinds == [WRITE, TRUNCATE, "discard", FLUSH]


def test_power_is_cut_for_every_kind() -> None:
    node = make()
    node.cut_power()
    calls = (
        lambda: node.read_into(0, bytearray(1)),
        lambda: node.write(0, (b"x",)),
        lambda: node.write_zeroes(0, 1),
        lambda: node.discard(0, 1),
        lambda: node.resize(1, shrink=True),
        node.flush,
    )
    for call in calls:
        with pytest.raises(CowhandError):
            call()
    assert content(node) == b"a" * 4096
    assert node.failed == len(calls)


@pytest.mark.parametrize("kind", sorted(CHANGES | {READ}))
def test_each_kind_can_fail(kind: str) -> None:
    node = make()
    calls = {
        READ: lambda: node.read_into(0, bytearray(1)),
        WRITE: lambda: node.write(0, (b"x",)),
        ZERO: lambda: node.write_zeroes(0, 1),
        "discard": lambda: node.discard(0, 1),
        FLUSH: node.flush,
        TRUNCATE: lambda: node.resize(5000),
    }
    node.fail(kind)
    for name, call in calls.items():
        if name == kind:
            with pytest.raises(IOFailed):
                call()
        else:
            call()
    assert GROWTH < CHANGES


def test_a_suspended_write_has_done_nothing_until_it_is_resumed() -> None:
    node = make()
    held = node.suspend(WRITE, 2)
    node.write(0, (b"1",))
    writer = threading.Thread(target=node.write, args=(1, (b"2",)))
    writer.start()
    assert held.reached.wait(PATIENCE)
    node.write(2, (b"3",))
    assert content(node)[:3] == b"1a3"
    held.resume()
    writer.join()
    assert content(node)[:3] == b"123"


def test_a_delayed_request_takes_its_time() -> None:
    node = make()
    node.delay(READ, 0.05)
    begin = time.monotonic()
    node.read_into(0, bytearray(1))
    assert time.monotonic() - begin >= 0.05
