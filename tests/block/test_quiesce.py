"""Quiesce: requests are held back and waited for, those of its own thread pass, and whoever stays is named."""

from __future__ import annotations

import threading
import time

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core import clock
from cowhand.core.errors import DeadlineExceeded
from cowhand.core.locks import RANK_ALLOCATION, RANK_FLUSH, RANK_GRAPH, RANK_LEAF, LockOrderError, ranked_lock
from cowhand.testing.faults import FaultNode
from tests.block.disks import PATIENCE, Worker, qcow2_disk, qcow2_file, qcow2_node

SIZE = 1 << 20


def faulty() -> tuple[FaultNode, Disk]:
    node = FaultNode(MemoryNode(content=bytes(SIZE)))
    return node, Disk(node, writable=True, name="d")


def wait_until(condition: threading.Event) -> None:
    assert condition.wait(PATIENCE)


class TestWaiting:
    def test_it_waits_for_requests_in_flight(self) -> None:
        node, disk = faulty()
        suspended = node.suspend("write")
        writer = Worker(disk.write, 0, b"x")
        wait_until(suspended.reached)
        inside = threading.Event()

        def quiesce() -> None:
            with graph.quiesce(node):
                inside.set()
                assert not disk.in_flight

        other = Worker(quiesce)
        assert not inside.wait(0.1)
        suspended.resume()
        other.done()
        writer.done()
        assert inside.is_set()
        disk.close()

    def test_it_holds_new_requests_back(self) -> None:
        node, disk = faulty()
        with graph.quiesce(node):
            calls = [
                Worker(disk.write, 0, b"x"),
                Worker(disk.read, 0, 1),
                Worker(disk.write_zeroes, 512, 512),
                Worker(disk.discard, 0, 512),
                Worker(disk.flush),
                Worker(disk.submit, [(0, 0, bytearray(1))]),
                Worker(list, disk.extents()),
            ]
            time.sleep(0.1)
            assert all(call.is_alive() for call in calls)
            assert not node.kinds
        for call in calls:
            call.done()
        assert len(node.kinds) == 6
        disk.close()

    def test_requests_of_its_own_thread_pass(self) -> None:
        node, disk = faulty()
        with graph.quiesce(node):
            disk.write(0, b"mine")
            with graph.quiesce(node):
                assert disk.read(0, 4) == b"mine"
            disk.resize(SIZE * 2)
            assert disk.gate.closed
        assert not disk.gate.closed
        disk.close()

    def test_requests_nested_in_one_that_is_waited_for_pass(self) -> None:
        node, disk = faulty()
        leased, shut = threading.Event(), threading.Event()

        def work() -> None:
            with disk.lease():
                leased.set()
                wait_until(shut)
                assert disk.read(0, 4) == bytes(4)

        worker = Worker(work)
        wait_until(leased)

        def quiesce() -> None:
            with graph.quiesce(node):
                assert not disk.in_flight

        other = Worker(quiesce)
        while not disk.gate.closed:
            time.sleep(0.001)
        shut.set()
        worker.done()
        other.done()
        disk.close()

    def test_every_disk_above_is_held(self) -> None:
        base = MemoryNode(content=bytes(SIZE))
        upper = Disk(qcow2_node(qcow2_file(SIZE), backing=base), writable=True)
        reader, stranger = Disk(base), qcow2_disk(SIZE)
        with graph.quiesce(base):
            assert upper.gate.closed
            assert reader.gate.closed
            assert not stranger.gate.closed
        assert not upper.gate.closed
        for disk in (upper, reader, stranger):
            disk.close()


class TestResize:
    def test_users_of_what_lies_below_are_held_back_and_learn_the_size(self) -> None:
        below = FaultNode(MemoryNode(content=bytes(SIZE)))
        upper, lower = Disk(FaultNode(below), writable=True), Disk(below, writable=True)
        suspended = below.suspend("truncate")
        resizing = Worker(lambda: upper.resize(SIZE // 2, shrink=True))
        wait_until(suspended.reached)
        assert lower.gate.closed
        suspended.resume()
        resizing.done()
        assert lower.size == upper.size == SIZE // 2
        upper.close()
        lower.close()


class TestDeadline:
    def test_it_names_who_stays(self) -> None:
        node, disk = faulty()
        suspended = node.suspend("write")
        writer = Worker(disk.write, 0x1000, b"x" * 0x200)
        wait_until(suspended.reached)
        said = r"disk 'd' did not end in 0\.1 s: write at 0x1000\+0x200"
        with pytest.raises(DeadlineExceeded, match=said), graph.quiesce(node, deadline=0.1):
            pytest.fail("the request is still there")
        assert not disk.gate.closed
        assert disk.read(0, 1) == b"\0"
        suspended.resume()
        writer.done()
        disk.close()

    def test_an_interrupt_while_it_waits_lets_everybody_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        node, disk = faulty()
        suspended = node.suspend("write")
        writer = Worker(disk.write, 0x1000, b"x" * 0x200)
        wait_until(suspended.reached)

        def interrupt() -> float:
            if disk.gate.closed:
                raise KeyboardInterrupt
            return time.monotonic()

        monkeypatch.setattr(clock, "monotonic", interrupt)
        with pytest.raises(KeyboardInterrupt), graph.quiesce(node):
            pass
        monkeypatch.undo()
        assert not disk.gate.closed
        suspended.resume()
        writer.done()
        assert disk.read(0x1000, 1) == b"x"
        disk.close()

    def test_one_that_stays_lets_the_others_go(self) -> None:
        node = FaultNode(MemoryNode(content=bytes(SIZE)))
        disks = [Disk(node) for _ in range(3)]
        suspended = node.suspend("read")
        reader = Worker(disks[1].read, 0, 512)
        wait_until(suspended.reached)
        with pytest.raises(DeadlineExceeded), graph.quiesce(node, deadline=0.05):
            pytest.fail("the request is still there")
        assert [disk.gate.closed for disk in disks] == [False] * 3
        suspended.resume()
        reader.done()
        for disk in disks:
            disk.close()

    def test_a_holder_that_stays_is_an_error(self) -> None:
        node, disk = faulty()
        held, end = threading.Event(), threading.Event()

        def hold() -> None:
            with graph.quiesce(node):
                held.set()
                wait_until(end)

        holder = Worker(hold)
        wait_until(held)
        with (
            pytest.raises(DeadlineExceeded, match="disk 'd' is being changed by another thread"),
            graph.quiesce(node, deadline=0.05),
        ):
            pytest.fail("another thread holds the gate")
        end.set()
        holder.done()
        disk.close()


class TestExclusion:
    def test_one_thread_at_a_time(self) -> None:
        node, disk = faulty()
        inside: list[int] = []
        most = []

        def hold() -> None:
            for _ in range(50):
                with graph.quiesce(node):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0)
                    inside.pop()

        workers = [Worker(hold) for _ in range(4)]
        for worker in workers:
            worker.done()
        assert set(most) == {1}
        disk.close()

    def test_two_that_hold_the_same_disks_do_not_wait_for_one_another(self) -> None:
        nodes = [MemoryNode(content=bytes(SIZE)) for _ in range(4)]
        disks = [Disk(node) for node in nodes]

        def hold(order: list[MemoryNode]) -> None:
            for _ in range(200):
                with graph.quiesce(*order, deadline=5):
                    pass

        for worker in [Worker(hold, nodes), Worker(hold, nodes[::-1]), Worker(hold, nodes[1:] + nodes[:1])]:
            worker.done()
        for disk in disks:
            disk.close()

    def test_resizing_and_closing_at_once(self) -> None:
        disk = qcow2_disk(SIZE, cluster_size=512)

        def grow(step: int) -> None:
            for _ in range(20):
                disk.resize(disk.size + step, shrink=True)

        for worker in [Worker(grow, 512), Worker(grow, 1024)]:
            worker.done()
        assert disk.size > SIZE
        for closer in [Worker(disk.close), Worker(disk.close)]:
            closer.done()
        assert disk.closed


class TestRankedLocks:
    """A thread takes locks in rising rank; in tests, taking one out of order raises."""

    def test_out_of_order_raises(self) -> None:
        low, high = ranked_lock(RANK_FLUSH, "flush"), ranked_lock(RANK_ALLOCATION, "allocation")
        with low, high:
            pass
        with high, pytest.raises(LockOrderError, match=r"flush \(rank 30\) taken while holding"):
            low.acquire()
        assert not low.locked()

    def test_twice_raises(self) -> None:
        lock = ranked_lock(RANK_LEAF, "leaf")
        with lock, pytest.raises(LockOrderError, match="leaf taken twice"):
            lock.acquire()

    def test_another_thread_has_an_order_of_its_own(self) -> None:
        low, high = ranked_lock(RANK_GRAPH, "graph"), ranked_lock(RANK_LEAF, "leaf")
        with high:
            Worker(low.acquire).done()
        assert low.locked()

    def test_a_try_never_raises(self) -> None:
        low, high = ranked_lock(RANK_FLUSH, "flush"), ranked_lock(RANK_ALLOCATION, "allocation")
        with high:
            assert low.acquire(blocking=False)
            low.release()

    def test_production_locks_are_plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cowhand.core.locks._enforced", False)
        assert isinstance(ranked_lock(RANK_LEAF, "plain"), type(threading.Lock()))

    def test_a_nodes_locks_are_checked_in_tests(self) -> None:
        with qcow2_disk(SIZE) as disk:
            node = disk.root
            with node.lock, pytest.raises(LockOrderError, match="allocation taken twice"):  # type: ignore[attr-defined]
                disk.write(0, b"x")
