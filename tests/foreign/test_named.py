"""What drawn images have shown, each by itself."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.core.errors import NotSupported
from cowhand.image import snapshots
from cowhand.image.create import create
from tests.compat.sides import run_own, run_real
from tests.hostile.layout import COPIED, make, pattern
from tests.tools.qemu import assert_clean, qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


def test_l2_tables_that_parts_of_the_disk_share(tmp_path: Path) -> None:
    """Two entries of the active L1 table name one table: each part gets its own with its first write, and the other one stays as it was."""
    path, image = tmp_path / "shared.qcow2", make()
    image.put_words(image.places["L1 table"] + 16, image.places["L2 table 1"])
    for name in ("L2 table 1", "data 4"):
        image.set_count(image.places[name], 4)
    path.write_bytes(image.data)
    span = image.cluster * image.cluster // 8
    with cowhand.open(path, writable=True) as disk:
        assert disk.read(span, span) == disk.read(2 * span, span)
        disk.write(2 * span + 512, b"2" * 512)
        assert disk.read(span + 512, 512) == pattern(4, 512)
        disk.write(span + 1024, b"1" * 512)
        disk.flush()
        disk.write(span + 512, b"3" * 512)
    assert_clean(path)
    with cowhand.open(path) as disk:
        assert disk.read(span + 512, 1024) == b"3" * 512 + b"1" * 512
        assert disk.read(2 * span + 512, 1024) == b"2" * 512 + bytes(512)
        with snapshots.open_snapshot(disk, "1") as view:
            assert view.read(span + 512, 512) == pattern(4, 512)


def test_but_not_with_the_copied_flag(tmp_path: Path) -> None:
    path, image = tmp_path / "shared.qcow2", make()
    image.put_words(image.places["L1 table"] + 16, image.places["L2 table 0"] | COPIED)
    path.write_bytes(image.data)
    with pytest.raises(cowhand.errors.ImageCorrupt), cowhand.open(path, writable=True) as disk:
        disk.write(0, b"x")


def test_tables_of_bitmaps_in_use_may_be_too_large(tmp_path: Path) -> None:
    """The disk was larger when the bitmap was used last: nothing of it is lost space."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "8M")
    qemu_img("bitmap", "--add", "-g", "512", path, "b")
    qemu_io(path, "write -q 0 100k")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack(">II", 0x23852875, 24))
    (directory,) = struct.unpack_from(">Q", data, at + 8 + 16)
    struct.pack_into(">I", data, directory + 12, 1)
    struct.pack_into(">Q", data, 24, 1 << 20)
    path.write_bytes(data)
    words = ["qemu-img", "check", "disk.qcow2"]
    ours = run_own(words, tmp_path)
    assert ours == run_real(words, tmp_path)
    assert ours.status == 0


@pytest.mark.parametrize("name", [b"", b"raw\0\0"])
def test_a_backing_format_that_is_empty_or_padded(name: bytes, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"base" * 128)
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "b", "-F", "raw", path, "64k")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack(">II", 0xE2792ACA, 3))
    # After the empty one comes another, that nobody knows, in the place of the name.
    data[at : at + 16] = struct.pack(">II", 0xE2792ACA, len(name)) + (
        name.ljust(8, b"\0") if name else bytes([0, 0, 0, 1, 0, 0, 0, 0])
    )
    path.write_bytes(data)
    for words in (["info", "--output=json"], ["map", "--output=json"]):
        command = ["qemu-img", *words, "disk.qcow2"]
        assert run_own(command, tmp_path) == run_real(command, tmp_path)


def test_version_2_keeps_its_size_when_a_snapshot_is_applied(tmp_path: Path) -> None:
    path, image = tmp_path / "disk.qcow2", make(version=2)
    image.put_words(image.places["snapshot table"] + 48, image.get("size") // 2)
    path.write_bytes(image.data)
    with cowhand.open(path, writable=True) as disk, pytest.raises(NotSupported, match="v2 image which has snapshots"):
        snapshots.apply_snapshot(disk, "1")
    words = ["qemu-img", "snapshot", "-a", "1", "disk.qcow2"]
    assert run_own(words, tmp_path) == run_real(words, tmp_path)


def test_discard_ignore_ignores_discards(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2", 1 << 20)
    with cowhand.open(path, writable=True, options={"discard": "ignore"}) as disk:
        disk.write(0, b"x" * 65536)
        disk.discard(0, 65536)
        disk.submit([(4, 0, 65536)])
        assert disk.read(0, 65536) == b"x" * 65536


def test_nothing_compressed_replaces_what_has_a_place(tmp_path: Path) -> None:
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "disk.qcow2"
        create(path, "qcow2", 1 << 20)
        qemu_io(path, "write -q 0 128k", "write -q -z 0 64k")
        qemu_img("snapshot", "-c", "s", path)
    words = ["qemu-io", *(w for at in ("0", "64k", "128k") for w in ("-c", f"write -c {at} 64k")), "disk.qcow2"]
    assert run_own(words, tmp_path / "ours") == run_real(words, tmp_path / "theirs")


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc"])
def test_a_larger_disk_shows_nothing_of_what_lay_behind_its_end(mode: str, tmp_path: Path) -> None:
    """The table of its last part is that of another part as well, and names more than the disk had."""
    path, image = tmp_path / "shared.qcow2", make()
    image.put_words(image.places["L1 table"] + 16, image.places["L2 table 1"])
    for name in ("L2 table 1", "data 4"):
        image.set_count(image.places[name], 4)
    span = image.cluster * image.cluster // 8
    image.set("size", 2 * span)
    path.write_bytes(image.data)
    with cowhand.open(path, writable=True) as disk:
        seen = disk.read(0, disk.size)
        assert any(seen[span:])
        disk.resize(3 * span - 512, preallocation=mode)
        assert disk.read(0, disk.size) == seen + bytes(span - 512)
    assert_clean(path)
    with cowhand.open(path) as disk:
        assert disk.read(0, disk.size) == seen + bytes(span - 512)


def test_version_2_compresses_by_deflate_at_once(tmp_path: Path) -> None:
    """What was compressed before, and is gone, was zstd."""
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2", 1 << 20, {"compression_type": "zstd"})
    with cowhand.open(path, writable=True) as disk:
        node: Any = disk.root
        node.write_compressed(0, node.codec.compress(b"ab" * 32768))
        disk.discard(0, 65536)
        disk.flush()
        node.amend({"compat": "0.10"})
        node.write_compressed(65536, node.codec.compress(b"cd" * 32768))
    with cowhand.open(path) as disk:
        assert disk.read(65536, 65536) == b"cd" * 32768
    assert_clean(path)
