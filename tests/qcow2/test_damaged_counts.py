"""Damaged reference counts, or a lost table of snapshots, do not stop reading, and nothing is written then."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError, ImageCorrupt
from cowhand.image import snapshots
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu]
CLUSTER = 4096
Change = Callable[[bytearray, int, int], None]


def at(offset: int, fmt: str, value: int) -> Change:
    return lambda data, table, block: struct.pack_into(fmt, data, offset, value)


DAMAGES: dict[str, Change] = {
    "table unaligned": at(48, ">Q", 12800),
    "table far away": at(48, ">Q", 1 << 40),
    "table past all files": at(48, ">Q", 1 << 63),
    "no table": at(56, ">I", 0),
    "table too long": at(56, ">I", 0xFFFFFFFF),
    "counts too wide": at(96, ">I", 7),
    "counts of any width": at(96, ">I", 0xFFFFFFFF),
    "block unaligned": lambda data, table, block: struct.pack_into(">Q", data, table, block + 512),
    "block far away": lambda data, table, block: struct.pack_into(">Q", data, table, 1 << 50),
    "noise for a block": lambda data, table, block: data.__setitem__(
        slice(block, block + CLUSTER), random.Random(1).randbytes(CLUSTER)
    ),
    "noise for a table": lambda data, table, block: data.__setitem__(
        slice(table, table + CLUSTER), random.Random(2).randbytes(CLUSTER)
    ),
    "zeroes for a block": lambda data, table, block: data.__setitem__(slice(block, block + CLUSTER), bytes(CLUSTER)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_read_and_converted(tmp_path: Path, damage: str) -> None:
    path, content = tmp_path / "a.qcow2", random.Random(0).randbytes(300_000)
    (tmp_path / "raw").write_bytes(content[: len(content) // 512 * 512])
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}", tmp_path / "raw", path)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    DAMAGES[damage](data, table, struct.unpack_from(">Q", data, table)[0])
    path.write_bytes(data)
    cowhand.convert(path, tmp_path / "copy", "raw")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "raw").read_bytes()
    assert path.read_bytes() == data


@pytest.mark.parametrize("damage", ["table unaligned", "no table", "table too long", "counts too wide"])
def test_it_is_not_opened_for_writing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.qcow2"
    cowhand.create(path, "qcow2", 1 << 20, options={"cluster_size": CLUSTER})
    data = bytearray(path.read_bytes())
    DAMAGES[damage](data, 0, 0)
    path.write_bytes(data)
    with pytest.raises(CowhandError):
        cowhand.open(path, writable=True)
    assert path.read_bytes() == data


def test_snapshots_whose_entries_are_lost_are_missing_and_not_none(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, "1M")
    qemu_io(path, "write -q -P 3 0 64k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("snapshot", "-c", "two", path)
    (table,) = struct.unpack_from(">Q", path.read_bytes(), 64)
    with path.open("r+b") as file:
        file.truncate(table + 100)
    with cowhand.open(path) as disk:
        assert disk.read(0, 65536) == b"\3" * 65536
        with snapshots.open_snapshot(disk, "one") as view:
            assert view.size == 1 << 20
        with pytest.raises(ImageCorrupt, match="snapshot table"):
            snapshots.open_snapshot(disk, "two")
        with pytest.raises(ImageCorrupt):
            snapshots.list_snapshots(disk)
    with pytest.raises(ImageCorrupt):
        cowhand.open(path, writable=True)
