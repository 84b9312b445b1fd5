"""Throttling: the accounting beside a model and beside what QEMU's documentation promises, with a clock that does not tick by itself."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings, strategies as st

from cowhand.block.disk import Disk
from cowhand.block.filters.throttle import groups
from cowhand.block.filters.throttle.groups import ThrottleGroup
from cowhand.block.filters.throttle.limits import Limits
from cowhand.block.graph import graph
from cowhand.block.node.node import READ, WRITE_REQUEST, BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidArgument
from cowhand.drivers import REGISTRY
from cowhand.testing.filters import FilterContract
from tests.block.disks import Worker


def over(inner: BlockNode, group: str) -> BlockNode:
    given = {"driver": "throttle", "throttle-group": group, "file": inner, "read-only": not inner.writable}
    return Opening(REGISTRY).open(given)


class TestThrottleContract(FilterContract):
    """Without limits the filter changes nothing."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        try:
            groups.find("unlimited")
        except InvalidArgument:
            groups.define("unlimited", Limits.parse({}))
        return over(inner, "unlimited")


class Ticking:
    """A clock that moves only when somebody waits."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        assert seconds is not None and seconds > 0
        self.time += seconds


def group_of(**limits: int) -> tuple[ThrottleGroup, Ticking]:
    ticking = Ticking()
    given = {name.replace("_", "-"): value for name, value in limits.items()}
    return ThrottleGroup("g", Limits.parse(given), now=ticking.now, wait=ticking.wait), ticking


def test_a_request_passes_while_the_bucket_is_not_over_full() -> None:
    group, ticking = group_of(bps_total=1000)
    member = group.join()
    group.admit(member, True, 100)  # fills the tenth of a second that is free
    group.admit(member, False, 1000)
    assert ticking.time == 100.0
    group.admit(member, True, 1)
    assert ticking.time == pytest.approx(101.0)


def test_reads_and_writes_have_their_own_limits() -> None:
    group, ticking = group_of(bps_read=1000)
    member = group.join()
    for _ in range(10):
        group.admit(member, True, 10_000)
    assert ticking.time == 100.0
    group.admit(member, False, 600)
    group.admit(member, False, 1)
    assert ticking.time == pytest.approx(100.5)


def test_a_large_request_counts_as_several() -> None:
    group, ticking = group_of(iops_total=10, iops_size=4096)
    member = group.join()
    group.admit(member, True, 6144)  # one and a half
    group.admit(member, True, 512)
    assert ticking.time == pytest.approx(100.05)


def test_a_burst_lasts_as_long_as_documented() -> None:
    """QEMU's example, a tenth of it: 10 a second, bursts of 200 for 60 seconds; water leaks meanwhile, so it is a little more."""
    group, ticking = group_of(iops_total=10, iops_total_max=200, iops_total_max_length=60)
    member = group.join()
    for _ in range(12_000):
        group.admit(member, True, 512)
    assert ticking.time - 100 == pytest.approx(60, abs=0.2)
    for _ in range(600):
        group.admit(member, True, 512)
    assert ticking.time - 100 == pytest.approx(63, abs=0.3)
    for _ in range(100):
        group.admit(member, True, 512)
    begin = ticking.time
    for _ in range(100):
        group.admit(member, True, 512)
    assert ticking.time - begin == pytest.approx(10, abs=0.1)  # the average from now on


@settings(max_examples=60, deadline=None)
@given(
    average=st.integers(1, 10_000),
    factor=st.integers(0, 5),
    requests=st.lists(st.tuples(st.integers(1, 20_000), st.floats(0, 2)), min_size=1, max_size=40),
)
def test_no_window_lets_more_pass_than_promised(average: int, factor: int, requests: list[tuple[int, float]]) -> None:
    """In every window at most: the average, what the bucket holds, and the one request that over-fills it. And nobody waits without need."""
    burst = average * factor
    group, ticking = group_of(bps_total=average, bps_total_max=burst)
    member = group.join()
    holds = burst or average / 10
    passed: list[tuple[float, int]] = []
    level, last = 0.0, ticking.time
    for size, pause in requests:
        ticking.time += pause
        group.admit(member, True, size)
        passed.append((ticking.time, size))
        asked = last if last > ticking.time else ticking.time
        level = max(0.0, level - average * (asked - last))
        last = asked
        assert level <= holds + average * 1e-5 + 1e-6
        level += size
    for index, (begin, _) in enumerate(passed):
        total = 0
        for moment, size in passed[index:]:
            assert total <= average * (moment - begin) + holds + max(s for _, s in passed) + 1e-3
            total += size


def test_members_take_turns() -> None:
    group, ticking = group_of(iops_total=10)
    first, second = group.join(), group.join()
    queues = group._queues[1]
    order: list[str] = []
    gate = threading.Event()
    held = threading.Condition()

    def wait(changed: threading.Condition, seconds: float | None) -> None:
        if not gate.is_set() or seconds is None:
            changed.wait(0.01)
        else:
            ticking.time += seconds

    group._wait = wait
    group.admit(first, True, 1)
    group.admit(first, True, 1)

    def one(member: object, name: str) -> None:
        group.admit(member, True, 1)  # type: ignore[arg-type]
        with held:
            order.append(name)

    workers = []
    for member, name in ((first, "a"), (first, "a"), (first, "a"), (second, "b"), (second, "b"), (second, "b")):
        before = sum(map(len, queues.values()))
        workers.append(Worker(one, member, name))
        while sum(map(len, queues.values())) == before:
            pass
    gate.set()
    for worker in workers:
        worker.done()
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert ticking.time == pytest.approx(100.6, abs=0.11)


def test_a_quiesce_does_not_wait_for_the_limit() -> None:
    groups.define("slow", Limits.parse({"bps-total": 1}))
    disk = Disk(over(MemoryNode(content=bytes(4096)), "slow"), writable=True)
    disk.write(0, b"x" * 1000)  # the next one would wait for a quarter of an hour
    worker = Worker(disk.write, 0, b"y")
    while not disk.in_flight:
        pass
    with graph.quiesce(disk.root, deadline=10):
        worker.done()
    with pytest.raises(InvalidArgument):
        groups.define("slow", Limits.parse({}))
    disk.close()
    groups.remove("slow")


def test_a_batch_is_counted_by_its_requests() -> None:
    group = groups.define("batch", Limits.parse({"iops-total": 1000}))
    with Disk(over(MemoryNode(content=bytes(4096)), "batch"), writable=True) as disk:
        ticking = Ticking()
        group._now, group._wait = ticking.now, ticking.wait
        group.set_limits(Limits.parse({"iops-total": 10}))
        disk.submit([(READ, 0, bytearray(512)), (WRITE_REQUEST, 512, b"z" * 512), (READ, 512, bytearray(512))])
        assert ticking.time == pytest.approx(100.1)
        assert disk.read(512, 512) == b"z" * 512
    groups.remove("batch")


@pytest.mark.parametrize(
    "wrong",
    [
        {"bps-total": -1},
        {"bps-total-max": 5},
        {"bps-total": 5, "bps-total-max-length": 0},
        {"bps-total": 5, "bps-total-max-length": 5},
        {"bps-total": 5, "bps-read": 5},
        {"bps-total": 10**17},
        {"iops-total": 5, "iops-total-max": 2},
        {"iops-size": 9},
        {"iops-total": "abc"},
        {"nothing": 1},
        {"iops-total": 5, "iops-total-max": 10**14, "iops-total-max-length": 1000},
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Limits.parse(wrong)


def test_a_group_must_exist() -> None:
    with pytest.raises(InvalidArgument, match="does not exist"):
        over(MemoryNode(), "nobody")
