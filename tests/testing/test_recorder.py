"""The recorder, the replay and the expected content: a toy format, right and wrong in known ways, shows what they catch."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import IOFailed
from cowhand.testing import faults, replay
from cowhand.testing.expected import SECTOR, ContentLost, ExpectedContent
from cowhand.testing.recorder import END_OF_LOG, Change, Flush, Log, RecorderNode, copy_of
from tests.tools.patience import PATIENCE

BLOCK = 1024
BLOCKS = 32


class ToyFormat:
    """Copy-on-write blocks behind a table of pointers at the beginning of the file; each write goes to a new place."""

    def __init__(self, node: RecorderNode | MemoryNode, fault: str = "") -> None:
        self.node = node
        self.fault = fault
        self.end = max(node.size, BLOCK)
        self.free: list[int] = []

    def write(self, block: int, data: bytes) -> None:
        place = self._place()
        old = self._pointer(block)
        if self.fault == "link first":
            self._link(block, place)
        self.node.write(place, (data,))
        if self.fault not in ("no flush between", "link first"):
            self.node.flush()
        if self.fault == "pointer in halves":
            pointer = place.to_bytes(8, "big")
            self.node.write(block * 8, (pointer[:7],))
            self.node.write(block * 8 + 7, (pointer[7:],))
        elif self.fault != "link first":
            self._link(block, place)
        if old and self.fault == "reuses at once":
            self.free.append(old)

    def _place(self) -> int:
        if self.free:
            return self.free.pop()
        place = self.end
        self.end += BLOCK + 8  # so that both halves of a pointer change
        return place

    def _pointer(self, block: int) -> int:
        pointer = bytearray(8)
        self.node.read_into(block * 8, pointer)
        return int.from_bytes(pointer, "big")

    def _link(self, block: int, place: int) -> None:
        self.node.write(block * 8, (place.to_bytes(8, "big"),))

    def flush(self) -> None:
        if self.fault != "ignores flushes":
            self.node.flush()

    def content(self) -> bytes:
        content = bytearray()
        for block in range(BLOCKS):
            data = bytearray(BLOCK)
            place = self._pointer(block)
            if place:
                self.node.read_into(place, data)
            content += data
        return bytes(content)


def workload(fault: str, rng: random.Random, *, sector: int = 1) -> tuple[RecorderNode, ExpectedContent]:
    recorder = RecorderNode(MemoryNode(), sector=sector)
    toy = ToyFormat(recorder, fault)
    expected = ExpectedContent(recorder.log, BLOCKS * BLOCK)
    for _ in range(25):
        block, data = rng.randrange(BLOCKS), rng.randbytes(BLOCK)
        with expected.writing(block * BLOCK, data):
            toy.write(block, data)
        if rng.random() < 0.3:
            with expected.flushing():
                toy.flush()
    assert toy.content() == expected.now
    return recorder, expected


def judge(expected: ExpectedContent) -> object:
    def check(state: replay.CrashState) -> None:
        expected.check(ToyFormat(state.image).content(), state.moment)

    return check


def test_equal_states_are_checked_once(rng: random.Random) -> None:
    recorder, _ = workload("", rng)
    checked: list[tuple[int, bytes]] = []
    count = replay.replay(
        replay.crash_states(recorder.log, samples=50),
        lambda state: checked.append((state.moment, state.image.snapshot_bytes())),
    )
    assert len(set(checked)) == len(checked) < count
    every = {(state.moment, state.image.snapshot_bytes()) for state in replay.crash_states(recorder.log, samples=50)}
    assert every == set(checked)


def test_a_right_order_survives_everything(rng: random.Random) -> None:
    recorder, expected = workload("", rng)
    count = replay.replay(replay.crash_states(recorder.log, samples=200), judge(expected))
    assert count > 300


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("link first", ("prefixes", "singles", "sampled")),
        ("no flush between", ("singles", "sampled")),
        ("pointer in halves", ("prefixes", "singles", "sampled")),
        ("reuses at once", ("singles", "sampled")),
        ("ignores flushes", ("singles", "sampled")),
    ],
)
def test_a_wrong_order_is_caught(fault: str, kinds: tuple[str, ...], rng: random.Random) -> None:
    recorder, expected = workload(fault, rng)
    log = recorder.log
    states = {"prefixes": replay.prefixes(log), "singles": replay.singles(log), "sampled": replay.sampled(log, 200)}
    for kind, sequence in states.items():
        if kind in kinds:
            with pytest.raises(ContentLost) as caught:
                replay.replay(sequence, judge(expected))
            assert "after a power failure" in caught.value.__notes__[0]
        else:
            replay.replay(sequence, judge(expected))


def test_a_write_of_several_sectors_tears_and_one_of_a_sector_does_not() -> None:
    recorder = RecorderNode(MemoryNode(content=b"a" * 8192))
    recorder.write(512, (b"b" * 512,))
    recorder.write(0, (b"c" * 4096, b"c" * 4096))
    contents = [state.image.snapshot_bytes() for state in replay.torn(recorder.log)]
    assert len(contents) == 6, "the small write is not torn; the large one thrice at each size"
    before = b"a" * 512 + b"b" * 512 + b"a" * 7168
    for content in contents:
        changed = {content[at : at + 512] == b"c" * 512 for at in range(0, 8192, 512)}
        assert changed == {True, False} or content == before or content == b"c" * 8192
        assert all(content[at : at + 512] in (b"c" * 512, before[at : at + 512]) for at in range(0, 8192, 512))


def test_what_a_flush_covered_is_in_every_state_and_what_it_did_not_in_some(rng: random.Random) -> None:
    recorder = RecorderNode(MemoryNode())
    recorder.write(0, (b"stable",))
    recorder.flush()
    recorder.mark("flushed", 6)
    recorder.write(6, (b"loose1",))
    recorder.write(12, (b"direct",), fua=True)
    recorder.write(18, (b"loose2",))
    seen = set()
    for state in replay.sampled(recorder.log, 300, seed=rng.randrange(1 << 30)):
        content = state.image.snapshot_bytes().ljust(24, b"\0")
        if recorder.log.last_mark(state.moment, "flushed") is not None:
            assert content[:6] == b"stable"
        if content[18:] == b"loose2":
            assert content[12:18] == b"direct", "FUA is stable when it is acknowledged"
        seen.add(content[6:12] + content[18:])
    assert {b"loose1loose2", bytes(12), b"loose1" + bytes(6), bytes(6) + b"loose2"} <= seen


def test_a_flush_covers_only_what_was_acknowledged_before_it_began() -> None:
    slow = faults.FaultNode(MemoryNode())
    recorder = RecorderNode(slow)
    held = slow.suspend(faults.WRITE)
    writer = threading.Thread(target=recorder.write, args=(0, (b"late",)))
    writer.start()
    assert held.reached.wait(PATIENCE)
    recorder.flush()
    held.resume()
    writer.join()
    recorder.mark("acknowledged")
    contents = {state.image.snapshot_bytes() for state in replay.singles(recorder.log)}
    assert contents == {b"", b"late"}
    recorder.flush()
    assert recorder.log.horizon(END_OF_LOG) > recorder.log.marks[0].moment


def test_a_failed_write_stays_uncertain_for_ever() -> None:
    broken = faults.FaultNode(MemoryNode(content=bytes(1024)))
    recorder = RecorderNode(broken)
    expected = ExpectedContent(recorder.log, 1024)
    broken.fail(faults.WRITE, done=faults.HALF)
    with pytest.raises(IOFailed), expected.writing(0, b"x" * 1024):
        recorder.write(0, (b"x" * 1024,))
    with expected.flushing():
        recorder.flush()
    assert expected.allowed(0) == {bytes(512), b"x" * 512}
    contents = {state.image.snapshot_bytes() for state in replay.sampled(recorder.log, 50)}
    assert {bytes(1024), b"x" * 1024} <= contents


def test_zeroes_discards_and_sizes_are_recorded() -> None:
    recorder = RecorderNode(MemoryNode(content=b"a" * 2048))
    recorder.write_zeroes(0, 512)
    recorder.discard(512, 512)
    recorder.resize(1536, shrink=True)
    recorder.resize(4096)
    whole = [state.image.snapshot_bytes() for state in replay.prefixes(recorder.log)]
    assert whole == [
        b"a" * 2048,
        bytes(512) + b"a" * 1536,
        bytes(1024) + b"a" * 1024,
        bytes(1024) + b"a" * 512,
        bytes(1024) + b"a" * 512 + bytes(2560),
    ]
    assert recorder.inner.size == 4096


def test_recording_by_sectors_makes_small_writes_whole(rng: random.Random) -> None:
    recorder, _ = workload("", rng, sector=512)
    assert recorder.limits.request_alignment == 512


def test_many_states_share_their_pages() -> None:
    recorder = RecorderNode(MemoryNode(content=bytes(16 << 20)))
    for index in range(1000):
        recorder.write(index * 4096, (b"x" * 4096,))
    assert sum(1 for _ in replay.prefixes(recorder.log)) == 1001


def test_copy_of_a_foreign_node_keeps_holes() -> None:
    node = faults.FaultNode(MemoryNode())
    node.write(1 << 40, (b"far",))
    copy = copy_of(node)
    assert copy.size == node.size
    assert copy.allocated_size() == 4096


class TestExpectedContent:
    """The guest's side alone."""

    def make(self) -> tuple[RecorderNode, ExpectedContent]:
        recorder = RecorderNode(MemoryNode())
        return recorder, ExpectedContent(recorder.log, 4 * SECTOR, b"i" * SECTOR)

    def test_unflushed_writes_may_all_be_there_and_flushed_ones_replace_what_was(self) -> None:
        recorder, expected = self.make()
        one, two, three = (bytes([n]) * SECTOR for n in (1, 2, 3))
        with expected.writing(0, one):
            pass
        with expected.writing(0, two):
            pass
        assert expected.allowed(0) == {b"i" * SECTOR, one, two}
        with expected.flushing():
            pass
        assert expected.allowed(0) == {two}
        moment = recorder.log.now()
        with expected.writing(0, three):
            pass
        assert expected.allowed(0) == {two, three}
        assert expected.allowed(0, moment) == {two}

    def test_a_discard_may_leave_the_old_content_even_after_a_flush(self) -> None:
        _, expected = self.make()
        with expected.discarding(0, SECTOR), expected.flushing():
            pass
        with expected.flushing():
            pass
        assert expected.allowed(0) == {b"i" * SECTOR, bytes(SECTOR)}

    def test_growth_and_replacement(self) -> None:
        recorder, expected = self.make()
        before = recorder.log.now()
        with expected.resizing(6 * SECTOR):
            during = recorder.log.now()
        assert expected.sizes(before) == {4 * SECTOR}
        assert expected.sizes(during) == {4 * SECTOR, 6 * SECTOR}
        assert expected.sizes() == {6 * SECTOR}
        with expected.replacing(b"s" * 4 * SECTOR):
            middle = recorder.log.now()
        assert expected.allowed(0, middle) == {b"i" * SECTOR, b"s" * SECTOR}
        assert expected.allowed(0) == {b"s" * SECTOR}
        expected.check(b"s" * 4 * SECTOR)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"i" * SECTOR + bytes(2 * SECTOR), "bytes, not one of"),
            (b"i" * SECTOR + b"w" * SECTOR + bytes(SECTOR) + b"\1" * SECTOR, "never written"),
            (b"i" * SECTOR + bytes(3 * SECTOR), "an older content"),
            (b"i" * SECTOR + b"z" * SECTOR + bytes(2 * SECTOR), "never written there"),
        ],
    )
    def test_what_is_wrong_is_said(self, content: bytes, reason: str) -> None:
        _, expected = self.make()
        with expected.writing(SECTOR, b"w" * SECTOR):
            pass
        with expected.flushing():
            pass
        with pytest.raises(ContentLost, match=reason):
            expected.check(content)


def test_the_inner_node_may_be_any_node(tmp_path: Path) -> None:
    wrapped = RecorderNode(faults.FaultNode(MemoryNode(content=b"abc")))
    wrapped.write(1, (b"X",))
    assert wrapped.log.initial.snapshot_bytes() == b"abc"
    assert wrapped.log.changes[0].data == b"X"


def test_check_accepts_exactly_what_is_allowed(rng: random.Random) -> None:
    recorder = RecorderNode(MemoryNode())
    expected = ExpectedContent(recorder.log, 2 * SECTOR)
    moments, contents = [], {bytes(SECTOR)}
    for _ in range(60):
        data = bytes([rng.randrange(1, 256)]) * SECTOR
        action = rng.randrange(6)
        if action == 0:
            with expected.flushing():
                pass
        elif action == 1:
            with expected.discarding(0, SECTOR):
                moments.append(recorder.log.now())
        else:
            contents.add(data)
            with expected.writing(0, data, fua=action == 2):
                moments.append(recorder.log.now())
        moments.append(recorder.log.now())
    for moment in moments:
        allowed = expected.allowed(0, moment)
        for content in contents:
            if content in allowed:
                expected.check(content + bytes(SECTOR), moment)
            else:
                with pytest.raises(ContentLost):
                    expected.check(content + bytes(SECTOR), moment)


def test_a_flush_of_one_medium_orders_nothing_of_another() -> None:
    """An image and its data file share a log: every subset of what is loose on either is tried."""
    first = RecorderNode(MemoryNode(content=bytes(512)))
    second = RecorderNode(MemoryNode(content=bytes(512)), log=first.log)
    second.write(0, (b"data",))
    first.flush()
    first.write(0, (b"link",))
    first.flush()
    seen = {
        (state.image.snapshot_bytes()[:4], state.others[0].snapshot_bytes()[:4])
        for state in replay.crash_states(first.log, samples=50)
    }
    nothing = bytes(4)
    assert seen == {(nothing, nothing), (nothing, b"data"), (b"link", nothing), (b"link", b"data")}
    last = list(replay.prefixes(first.log))[-1]
    assert last.story.startswith("all up to change 1 (write 0x0+0x4")


def test_a_flush_of_the_other_medium_is_an_order() -> None:
    first = RecorderNode(MemoryNode(content=bytes(512)))
    second = RecorderNode(MemoryNode(content=bytes(512)), log=first.log)
    second.write(0, (b"data",))
    second.flush()
    first.write(0, (b"link",))
    assert repr(first.log.changes[0]) == "write 0x0+0x4 of medium 1"
    for state in replay.crash_states(first.log, samples=50):
        if state.image.snapshot_bytes().startswith(b"link"):
            assert state.others[0].snapshot_bytes().startswith(b"data")


def test_a_torn_write_knows_nothing_of_what_another_thread_wrote_and_flushed_meanwhile() -> None:
    log = Log(MemoryNode(content=bytes(8192)))
    slow = Change("write", 0, 1024, b"s" * 1024, False, log.now())
    quick = Change("write", 4096, 512, b"q" * 512, False, log.now())
    quick.end = log.now()
    log.flushes.append(Flush(log.now(), log.now()))
    slow.end = log.now()
    log.changes += [slow, quick]
    states = list(replay.torn(log, (512,)))
    assert len(states) == 3
    for state in states:
        assert state.image.snapshot_bytes()[4096:4608] == bytes(512)
        assert state.moment <= quick.begin, "the flush had not happened yet"
