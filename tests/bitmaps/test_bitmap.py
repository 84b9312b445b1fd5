"""A bitmap against the plainest model there is: a Python set of the numbers of dirty granules."""

from __future__ import annotations

import hashlib
import random
import threading
from functools import partial

import pytest
from hypothesis import given, settings, strategies as st

from cowhand.bitmaps import bitmap as bitmap_module
from cowhand.bitmaps.bitmap import PAGE_BYTES, Bitmap
from cowhand.core.errors import InvalidArgument
from cowhand.testing.nodes import in_threads

GRANULE = 512
#: A little more than two pages, and no whole number of granules.
SIZE = (2 * PAGE_BYTES * 8 + 77) * GRANULE + 100
BITS = -(-SIZE // GRANULE)

offsets = st.integers(0, SIZE - 1)
#: Lengths around a granule, around a page, and anything.
lengths = st.one_of(st.integers(1, 3 * GRANULE), st.integers(1, 2 * PAGE_BYTES * 8 * GRANULE), st.integers(1, SIZE))
ranges = st.tuples(offsets, lengths).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))
steps = st.lists(st.tuples(st.sampled_from(("mark", "mark", "mark", "clear")), ranges), max_size=12)


def touched(offset: int, length: int, granule: int = GRANULE) -> range:
    return range(offset // granule, (offset + length - 1) // granule + 1)


def wholly_in(offset: int, length: int) -> range:
    end = offset + length
    return range(-(-offset // GRANULE), BITS if end == SIZE else end // GRANULE)


def made_by(actions: list[tuple[str, tuple[int, int]]]) -> tuple[Bitmap, set[int]]:
    bitmap, model = Bitmap(SIZE, GRANULE), set[int]()
    for what, place in actions:
        if what == "mark":
            bitmap.mark(*place)
            model.update(touched(*place))
        else:
            bitmap.clear(*place)
            model.difference_update(wholly_in(*place))
    return bitmap, model


def content(bitmap: Bitmap) -> set[int]:
    return {bit for first, last in bitmap.runs() for bit in range(first, last)}


class TestAgainstASet:
    @settings(max_examples=60)
    @given(steps, ranges)
    def test_marks_and_clears(self, actions: list[tuple[str, tuple[int, int]]], window: tuple[int, int]) -> None:
        bitmap, model = made_by(actions)
        assert content(bitmap) == model
        assert bitmap.count() == len(model) and bool(bitmap) == bool(model)
        dirty = [
            (max(window[0], bit * GRANULE), min(sum(window), (bit + 1) * GRANULE, SIZE))
            for bit in sorted(model.intersection(touched(*window)))
        ]
        joined: list[tuple[int, int]] = []
        for begin, end in dirty:
            if joined and joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        assert [(begin, begin + length) for begin, length in bitmap.extents(*window)] == joined
        assert bitmap.dirty_bytes() == sum(length for _, length in bitmap.extents())
        assert bitmap.is_dirty(window[0]) == (window[0] // GRANULE in model)

    @settings(max_examples=40)
    @given(steps, steps, st.sampled_from((512, 4096, 1 << 20)))
    def test_merging_across_granularities(self, one: list, other: list, granule: int) -> None:  # type: ignore[type-arg]
        fine, model = made_by(one)
        coarse = Bitmap(SIZE, granule)
        for _, place in other:
            coarse.mark(*place)
        dirty = {bit for _, place in other for bit in touched(*place, granule)}
        expected = model | {
            fine_bit for bit in dirty for fine_bit in touched(bit * granule, min(granule, SIZE - bit * granule))
        }
        back = coarse.copy()
        back.merge(fine)
        fine.merge(coarse)
        assert content(fine) == expected
        assert content(back) == dirty | {bit * GRANULE // granule for bit in model}

    @settings(max_examples=40)
    @given(steps, st.integers(0, BITS // 8), st.integers(0, 3 * PAGE_BYTES))
    def test_serialising(self, actions: list, first: int, length: int) -> None:  # type: ignore[type-arg]
        bitmap, model = made_by(actions)
        plain = sum(1 << bit for bit in model).to_bytes(-(-BITS // 64) * 8, "little")
        assert bitmap.get_bytes(0, bitmap.nbytes) == plain[: bitmap.nbytes]
        assert bitmap.get_bytes(first, length) == plain[first : first + length].ljust(length, b"\0")
        assert bitmap.sha256() == hashlib.sha256(plain).hexdigest()
        again = Bitmap(SIZE, GRANULE)
        again.mark(0, 1)
        again.set_bytes(first, plain[first:])
        assert content(again) == {0} | {bit for bit in model if bit >= first * 8}

    @settings(max_examples=30)
    @given(steps, st.integers(1, 2 * SIZE))
    def test_resizing(self, actions: list, size: int) -> None:  # type: ignore[type-arg]
        bitmap, model = made_by(actions)
        bitmap.resize(size)
        assert content(bitmap) == {bit for bit in model if bit * GRANULE < size}
        bitmap.resize(2 * SIZE)
        assert content(bitmap) == {bit for bit in model if bit * GRANULE < size}, "what was cut off came back"


def test_bits_behind_the_end_of_a_stored_bitmap_are_not_taken_over() -> None:
    bitmap = Bitmap(10 * GRANULE, GRANULE)
    bitmap.set_bytes(0, b"\xff" * 64)
    assert bitmap.count() == 10


@pytest.mark.parametrize("granularity", [0, 256, 513, 3 << 20, 1 << 32])
def test_impossible_granularities_are_refused(granularity: int) -> None:
    with pytest.raises(InvalidArgument, match="granularity"):
        Bitmap(1 << 20, granularity)


def test_a_huge_disk_costs_what_is_dirty() -> None:
    bitmap = Bitmap(1 << 60, 65536)
    for place in range(0, 1 << 60, 1 << 55):
        bitmap.mark(place, 1)
    assert bitmap.count() == 32
    assert list(bitmap.extents())[-1] == ((1 << 60) - (1 << 55), 65536)
    bitmap = Bitmap(16 << 40, 65536)
    bitmap.mark(0, 16 << 40)
    assert list(bitmap.extents()) == [(0, 16 << 40)]


def test_no_mark_of_many_threads_is_lost() -> None:
    bitmap = Bitmap(1 << 20, GRANULE)
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        # Neighbouring bits of one byte belong to different threads.
        for bit in range(number, 2048, 4):
            bitmap.mark(bit * GRANULE, 1)

    in_threads([partial(work, number) for number in range(4)])
    assert bitmap.count() == 2048


@pytest.mark.parametrize("most", [1 << 24, 100, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_hook_marks_what_mark_marks(seed: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after bits were cleared, the disk changed its size, and where it keeps no byte for a granule."""
    monkeypatch.setattr(bitmap_module, "MAX_SEEN", most)
    rng = random.Random(seed)
    size, granule = 300 * 512, 512
    ours, model = Bitmap(size, granule), Bitmap(size, granule)
    hooks = [ours.marker(), ours.marker()]
    for _ in range(600):
        offset = rng.randrange(size)
        length = min(rng.choice((0, 1, 511, 512, 513, 4000, 100_000)), size - offset)
        kind = rng.randrange(20)
        if kind == 0:
            ours.clear(offset, length)
            model.clear(offset, length)
        elif kind == 1 and rng.random() < 0.3:
            ours.clear()
            model.clear()
        elif kind == 2:
            size = rng.randrange(100, 400) * 512
            ours.resize(size)
            model.resize(size)
        elif kind == 3:
            other = Bitmap(size, granule)
            other.mark(offset, length)
            ours.merge(other)
            model.merge(other)
        else:
            hooks[kind % 2](offset, length)
            model.mark(offset, length)
        assert list(ours.runs()) == list(model.runs())


def test_no_mark_of_eight_threads_is_lost_beside_clears() -> None:
    """A granule that is marked after it was last cleared is set, whatever other threads do to its neighbours."""
    ours = Bitmap(64 * 512, 512)
    hook = ours.marker()
    lost: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            for granule in range(number, 64, 8):
                ours.clear(granule * 512, 512)
                hook(granule * 512 + 5, 100)
                if not ours.is_dirty(granule * 512):
                    lost.append(granule)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert ours.count() == 64
