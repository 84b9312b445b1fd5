"""What the reference counts call free is verified before it is reused, given back or cut off (QEMU ``docs/interop/qcow2``)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core import diagnostics
from cowhand.core.errors import ImageCorrupt
from cowhand.image.snapshots import create_snapshot, delete_snapshot, open_snapshot
from tests.qcow2 import images
from tests.qcow2.images import Shape

_CONTENT = b"a" * 40000


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what users are told meanwhile."""
    told: list[str] = []
    monkeypatch.setattr(diagnostics, "report", lambda message, **more: told.append(message))
    return told


def _image(*, snapshot: bool = False) -> bytearray:
    keeper = Disk(images.create(Shape(), _CONTENT))
    if snapshot:
        with images.open_over(keeper.root, writable=True) as disk:
            create_snapshot(disk, "kept")
    data = bytearray(keeper.root.snapshot_bytes())  # type: ignore[attr-defined]
    keeper.close()
    return data


def _counts(data: bytearray) -> tuple[int, int]:
    """Return (offset of the first block of 16-bit counts, clusters that are counted)."""
    block: int = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
    size = 1 << struct.unpack_from(">I", data, 20)[0]
    return block, -(-len(data) // size)


def _lowered(data: bytearray, change: Callable[[int], int]) -> bytearray:
    """Return *data* with the count of every cluster but the header's changed."""
    block, clusters = _counts(data)
    for number in range(1, clusters):
        (count,) = struct.unpack_from(">H", data, block + 2 * number)
        struct.pack_into(">H", data, block + 2 * number, change(count))
    return data


def _used(data: bytearray, work: Callable[[Disk], Any]) -> bytes:
    """Return the file after *work* with the image in *data*, flushed and closed."""
    keeper = Disk(MemoryNode(content=bytes(data)))
    with images.open_over(keeper.root, writable=True) as disk:
        work(disk)
    out: bytes = keeper.root.snapshot_bytes()  # type: ignore[attr-defined]
    keeper.close()
    return out


def _read(data: bytes, snapshot: str | None = None) -> bytes:
    keeper = Disk(MemoryNode(content=data))
    with images.open_over(keeper.root) as disk:
        if snapshot is None:
            found = disk.read(0, min(disk.size, len(_CONTENT)))
        else:
            with open_snapshot(disk, snapshot) as view:
                found = view.read(0, len(_CONTENT))
    keeper.close()
    return bytes(found)


def test_a_first_write_goes_elsewhere_and_the_user_hears_why(heard: list[str]) -> None:
    data = _lowered(_image(), lambda count: 0)
    after = _used(data, lambda disk: disk.write(len(_CONTENT) + 4096, b"new" * 500))
    assert _read(after) == _CONTENT
    assert any("too low" in line and "Run check" in line for line in heard)


def test_a_discard_gives_nothing_back_that_a_snapshot_holds(heard: list[str]) -> None:
    data = _lowered(_image(snapshot=True), lambda count: min(count, 1))
    after = _used(data, lambda disk: (disk.discard(0, len(_CONTENT)), disk.flush(), disk.flush()))
    assert _read(after, "kept") == _CONTENT


def test_deleting_one_snapshot_leaves_the_other_its_clusters(heard: list[str]) -> None:
    data = _lowered(_image(snapshot=True), lambda count: min(count, 1))

    def work(disk: Disk) -> None:
        create_snapshot(disk, "other")
        delete_snapshot(disk, "other")
        disk.write(0, b"b" * len(_CONTENT))
        disk.flush()
        disk.write(0, b"c" * len(_CONTENT))

    after = _used(data, work)
    assert _read(after, "kept") == _CONTENT
    assert _read(after) == b"c" * len(_CONTENT)


def test_shrinking_cuts_off_nothing_that_is_named(heard: list[str]) -> None:
    data = _lowered(_image(), lambda count: 0)
    after = _used(data, lambda disk: disk.resize(len(_CONTENT) // 512 * 512, shrink=True))
    whole = len(_CONTENT) // 512 * 512
    assert _read(after)[:whole] == _CONTENT[:whole]


def test_counts_that_know_nothing_of_the_header_are_refused_before_a_change(heard: list[str]) -> None:
    data = _image(snapshot=True)
    block, _ = _counts(data)
    struct.pack_into(">H", data, block, 0)
    keeper = Disk(MemoryNode(content=bytes(data)))
    disk = images.open_over(keeper.root, writable=True)
    with pytest.raises(ImageCorrupt, match="call the header free"):
        delete_snapshot(disk, "kept")
    disk.close()
    after = keeper.root.snapshot_bytes()  # type: ignore[attr-defined]
    assert _read(after, "kept") == _CONTENT
    keeper.close()


def test_where_a_snapshot_cannot_be_followed_nothing_before_the_end_is_taken(heard: list[str]) -> None:
    data = _lowered(_image(snapshot=True), lambda count: 0)
    table = struct.unpack_from(">Q", data, 64)[0]
    data[table + 7] |= 1  # its L1 table lies nowhere now
    after = _used(data, lambda disk: disk.write(len(_CONTENT) + 4096, b"new" * 500))
    assert after.index(b"new" * 100) >= len(data)
    assert any("could be followed" in line for line in heard)
    restored = bytearray(after)
    restored[struct.unpack_from(">Q", after, 64)[0] + 7] &= 0xFE
    assert _read(bytes(restored), "kept") == _CONTENT
