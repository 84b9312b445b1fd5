"""Files that end before what their tables name: damage with a place, not zeroes. The last cluster of data may be short."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError, ImageCorrupt
from tests.compat.sides import run_own, run_real
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu]
CLUSTER = 65536


def whole(path: Path, options: str = "cluster_size=64k", clusters: int = 8) -> bytes:
    """Make an image of *clusters* clusters, all of them data, one behind the other; return its content."""
    content = random.Random(7).randbytes(clusters * CLUSTER)
    (path.parent / "content").write_bytes(content)
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(len(content)))
    qemu_io(path, f"write -q -s {path.parent / 'content'} 0 {len(content)}")
    return content


def cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)


def place_of(path: Path, guest: int) -> int:
    """Return where QEMU says that the data of *guest* lies."""
    for row in json.loads(qemu_img("map", "--output=json", path).stdout):
        if row["start"] <= guest < row["start"] + row["length"]:
            return int(row["offset"] + guest - row["start"])
    raise AssertionError(guest)


@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=64k,extended_l2=on", "cluster_size=64k,compat=0.10"]
)
def test_data_behind_the_end_is_an_error_and_the_rest_is_read(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    content = whole(path, options)
    cut(path, place_of(path, 5 * CLUSTER))
    with cowhand.open(path) as disk:
        assert disk.read(0, 5 * CLUSTER) == content[: 5 * CLUSTER]
        with pytest.raises(ImageCorrupt, match="cut off") as caught:
            disk.read(5 * CLUSTER, 512)
        assert caught.value.path == str(path)
        assert caught.value.offset == path.stat().st_size
        with pytest.raises(ImageCorrupt):
            disk.read(0, len(content))
        rows = [(row.start, bool(row.flags & 8)) for batch in disk.extents(0, disk.size) for row in batch]
        assert rows == [(0, True), (5 * CLUSTER, False)]


def test_the_last_cluster_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    content = whole(path)
    cut(path, place_of(path, 7 * CLUSTER) + 1000)
    with cowhand.open(path) as disk:
        assert disk.read(0, disk.size) == content[: 7 * CLUSTER + 1000].ljust(len(content), b"\0")


def test_tables_behind_the_end(tmp_path: Path) -> None:
    """Of a table that ends with the file only the entries are lost that are not there."""
    path = tmp_path / "a.qcow2"
    content = whole(path)
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FFFFFFFFFFFE00
    moved = bytearray(data + data[l2 : l2 + CLUSTER])
    struct.pack_into(">Q", moved, l1, len(data) | 1 << 63)
    path.write_bytes(moved)
    cut(path, len(data) + 8 * 3 + 2)
    with cowhand.open(path) as disk:
        assert disk.read(0, 3 * CLUSTER) == content[: 3 * CLUSTER]
        for guest in range(3 * CLUSTER, len(content), CLUSTER):
            with pytest.raises(ImageCorrupt, match="L2 table") as caught:
                disk.read(guest, 512)
            assert caught.value.offset == len(data) + guest // CLUSTER * 8
    cut(path, len(data))
    with cowhand.open(path) as disk, pytest.raises(ImageCorrupt, match="L2 table"):
        disk.read(0, 512)
    cut(path, l1 + 4)
    with cowhand.open(path) as disk, pytest.raises(ImageCorrupt, match="L1 table"):
        disk.read(0, 512)


def test_compressed_clusters(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "a.qcow2"
    rng = random.Random(1)
    content = b"".join(bytes(rng.choices(range(8), k=4096)) * 16 for _ in range(8))
    raw.write_bytes(content)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    stored = path.read_bytes()
    length = len(stored)
    for size in range(length - 700, length, 61):
        path.write_bytes(stored[:size])
        with cowhand.open(path) as disk:
            assert disk.read(0, 7 * CLUSTER) == content[: 7 * CLUSTER]
            with contextlib.suppress(ImageCorrupt):
                assert disk.read(7 * CLUSTER, CLUSTER) == content[7 * CLUSTER :]


@pytest.mark.parametrize("raw", ["off", "on"])
def test_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.qcow2"
    content = whole(path, f"data_file=data,data_file_raw={raw}")
    cut(tmp_path / "data", 3 * CLUSTER + 10)
    with cowhand.open(path) as disk:
        assert disk.read(0, 4 * CLUSTER) == content[: 3 * CLUSTER + 10].ljust(4 * CLUSTER, b"\0")
        with pytest.raises(ImageCorrupt, match="cut off") as caught:
            disk.read(4 * CLUSTER, 1)
        assert caught.value.path == "data"
    before = path.read_bytes(), (tmp_path / "data").read_bytes()
    with cowhand.open(path, writable=True) as disk, pytest.raises(ImageCorrupt, match="cut off"):
        disk.write(0, b"x" * 512)
    assert (path.read_bytes(), (tmp_path / "data").read_bytes()) == before


def test_encrypted_sectors_are_there_or_are_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    options = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10, "cluster_size": 4096}
    from cowhand.crypto import secrets

    secrets.add("s", b"passphrase")
    try:
        cowhand.create(path, "qcow2", 64 << 10, options=options)
        content = random.Random(3).randbytes(64 << 10)
        described = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(path)},
            "encrypt": {"key-secret": "s"},
        }
        with cowhand.open(described, writable=True) as disk:
            disk.write(0, content)
        cut(path, path.stat().st_size - 1000)
        with cowhand.open(described) as disk:
            assert disk.read(0, (64 << 10) - 1024) == content[:-1024]
            with pytest.raises(ImageCorrupt):
                disk.read((64 << 10) - 1024, 512)
    finally:
        secrets.remove("s")


def test_a_cut_off_layer_is_not_committed(tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    whole(base)
    before = base.read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    qemu_io(path, "write -q -P 5 0 300k")
    cut(path, path.stat().st_size - 3 * CLUSTER)
    with pytest.raises(CowhandError, match="cut off"):
        cowhand.commit(path)
    assert base.read_bytes() == before


def test_the_drop_in_tools_do_as_qemu(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    whole(path)
    cut(path, place_of(path, 5 * CLUSTER))
    for words in (["convert", "-O", "raw", "a.qcow2"], ["map", "--output=json", "a.qcow2"]):
        more = ["theirs"] if words[0] == "convert" else []
        theirs = run_real(["qemu-img", *words, *more], tmp_path)
        ours = run_own(["qemu-img", *words, *(["ours"] if more else [])], tmp_path)
        assert ours == theirs
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_zeroes_are_no_entries_of_version_2(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    content = whole(path, "compat=0.10")
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FFFFFFFFFFFE00
    data[l2 + 7] |= 1
    struct.pack_into(">Q", data, l2 + 16, 1)
    path.write_bytes(data)
    with cowhand.open(path) as disk:
        for guest in (0, 2 * CLUSTER):
            with pytest.raises(ImageCorrupt, match="pre-v3"):
                disk.read(guest, 512)
        assert disk.read(CLUSTER, CLUSTER) == content[CLUSTER : 2 * CLUSTER]
        with pytest.raises(ImageCorrupt):
            list(disk.extents(0, disk.size))
    for guest in (0, 2 * CLUSTER):
        path.write_bytes(data)
        with pytest.raises(ImageCorrupt), cowhand.open(path, writable=True) as disk:
            disk.write(guest, b"x" * 512)
    assert run_own(["qemu-img", "convert", "-O", "raw", "a.qcow2", "x"], tmp_path).status != 0
