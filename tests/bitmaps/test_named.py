"""Named bitmaps: what each state allows, and what successors do."""

from __future__ import annotations

import pytest

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.bitmaps.named import BitmapSet, DirtyBitmap
from cowhand.core.errors import BitmapUnusable, InvalidArgument

SIZE = 1 << 20


def one(name: str = "b", **states: bool) -> tuple[BitmapSet, DirtyBitmap]:
    known = BitmapSet()
    bitmap = DirtyBitmap(name, Bitmap(SIZE, 65536), **states)
    known.add(bitmap)
    return known, bitmap


def dirty(bitmap: DirtyBitmap) -> list[int]:
    return [
        offset // 65536 for offset, length in bitmap.bits.extents() for offset in range(offset, offset + length, 65536)
    ]


@pytest.mark.parametrize(
    ("states", "follows"), [({}, True), ({"enabled": False}, False), ({"inconsistent": True}, False)], ids=str
)
def test_only_enabled_consistent_bitmaps_follow_writes(states: dict[str, bool], follows: bool) -> None:
    known, bitmap = one(**states)
    known.mark(0, 512)
    assert bool(bitmap.recent) == known.active == follows


def test_a_name_is_there_once() -> None:
    known, _ = one()
    with pytest.raises(InvalidArgument, match="Bitmap already exists: b"):
        known.add(DirtyBitmap("b", Bitmap(SIZE, 512)))


def test_states_forbid() -> None:
    for state, text in (
        ("inconsistent", "Bitmap 'b' is inconsistent and cannot be used"),
        ("read_only", "Bitmap 'b' is readonly and cannot be modified"),
    ):
        _, bitmap = one(**{state: True})
        with pytest.raises(BitmapUnusable) as caught:
            bitmap.check()
        assert caught.value.qemu() == text
        bitmap.check(**{state: True})


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("end", "kept"), [("abdicate", False), ("reclaim", True)])
def test_a_successor_takes_the_writes(enabled: bool, end: str, kept: bool) -> None:
    known, bitmap = one(enabled=enabled)
    bitmap.bits.mark(0, 1)
    known.freeze(bitmap)
    known.mark(65536, 1)
    assert dirty(bitmap) == [0], "a frozen bitmap moved"
    assert bitmap.recording == enabled
    with pytest.raises(BitmapUnusable, match="in use by another operation"):
        bitmap.check()
    getattr(known, end)(bitmap)
    known.mark(3 * 65536, 1)
    assert dirty(bitmap) == [0] * kept + [1, 3] * enabled
    assert bitmap.enabled == enabled and not bitmap.busy


def test_stored_content_is_read_when_it_is_asked_for_and_joins_what_was_marked() -> None:
    asked = []

    def source(bits: Bitmap) -> None:
        asked.append(1)
        bits.mark(0, 1)

    bitmap = DirtyBitmap("b", Bitmap(SIZE, 65536), persistent=True, source=source)
    known = BitmapSet()
    known.add(bitmap)
    known.mark(65536, 1)
    assert not asked
    assert dirty(bitmap) == [0, 1] and dirty(bitmap) == [0, 1] and asked == [1]
    bitmap.resize(65536)
    assert dirty(bitmap) == [0]
    assert bitmap.info() == {
        "name": "b", "count": 65536, "granularity": 65536, "recording": True, "busy": False, "persistent": True,
    }  # fmt: skip


def test_clearing_forgets_what_is_stored() -> None:
    bitmap = DirtyBitmap("b", Bitmap(SIZE, 65536), source=lambda bits: bits.mark(0, SIZE))
    bitmap.clear()
    assert not bitmap.bits and not bitmap.partial
