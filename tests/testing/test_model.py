"""The model of a disk, by examples that can be checked by eye."""

from __future__ import annotations

import pytest

from cowhand.testing.model import DiskModel, ModelMismatch


def test_snapshots_keep_content_and_size() -> None:
    model = DiskModel(4, b"base-is-longer")
    model.snapshot_create("first")
    model.write(1, b"XY")
    model.resize(6)
    model.snapshot_create("second")
    model.write_zeroes(0, 2)
    assert model.read(0, 6) == b"\0\0Ye\0\0"
    model.snapshot_apply("first")
    assert model.content == b"base"
    model.snapshot_apply("second")
    assert model.content == b"bXYe\0\0"
    model.snapshot_delete("second")
    assert list(model.snapshots) == ["first"]


def test_growth_over_a_longer_backing_file_is_zeroes() -> None:
    model = DiskModel(4, b"base-is-longer")
    model.resize(2)
    model.resize(8)
    assert model.content == b"ba" + bytes(6)


def test_a_discard_keeps_or_clears_and_nothing_else() -> None:
    model = DiskModel(6, b"abcdef")
    model.discard(0, 4, b"ab\0\0")
    assert model.content == b"ab\0\0ef"
    with pytest.raises(ModelMismatch, match="0x5"):
        model.discard(4, 2, b"e!")


def test_a_difference_is_located() -> None:
    model = DiskModel(4, b"abcd")
    model.compare(b"abcd")
    with pytest.raises(ModelMismatch, match="differs in 2 bytes, first at 0x2"):
        model.compare(b"ab..")
    with pytest.raises(ModelMismatch, match="has 3 bytes, expected 4"):
        model.compare(b"abc", "snapshot x")
