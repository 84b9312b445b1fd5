"""Sharing blocks: on a file system that can, a copy takes no space, and a change of one side leaves the other alone."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import convert
from cowhand.core import syscalls
from tests.copy.images import MIB, read_all
from tests.copy.mounts import loop, needs_root
from tests.tools.programs import require
from tests.tools.qemu import assert_clean

pytestmark = [needs_root, pytest.mark.root, pytest.mark.slow]

KINDS = [
    pytest.param("btrfs", marks=require("mkfs.btrfs", "mount")),
    pytest.param("xfs", marks=require("mkfs.xfs", "mount")),
]


def used(folder: Path) -> int:
    """Return the bytes that the file system has given out."""
    os.sync()
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
def test_a_copy_shares_its_blocks(
    tmp_path: Path, rng: random.Random, kind: str, format: str, source_format: str
) -> None:
    data = rng.randbytes(24 * MIB) + bytes(4 * MIB) + rng.randbytes(12 * MIB + 512)
    with loop(tmp_path / "mounted", kind, 512 * MIB) as folder:
        raw, source, target = folder / "raw", folder / "source", folder / "target"
        raw.write_bytes(data)
        convert(raw, source, source_format, source_format="raw", reflink=False)
        before = used(folder)
        convert(source, target, format, source_format=source_format)
        assert used(folder) - before < 4 * MIB
        with cowhand.open(target, format=format, writable=True) as disk:
            assert read_all(disk) == data
            disk.write(MIB, b"only here")
        if format == "qcow2":
            assert_clean(target)
        with cowhand.open(source, format=source_format) as disk:
            assert read_all(disk) == data


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_clusters_are_copied_the_common_way(tmp_path: Path, rng: random.Random, kind: str) -> None:
    data = (rng.randbytes(5000) * 10_000)[: 40 * MIB]
    with loop(tmp_path / "mounted", kind, 512 * MIB) as folder:
        raw, packed, target = folder / "raw", folder / "packed", folder / "target"
        raw.write_bytes(data)
        convert(raw, packed, "qcow2", source_format="raw", compressed=True)
        convert(packed, target, "qcow2")
        with cowhand.open(target) as disk:
            assert read_all(disk) == data
        assert_clean(target)


def test_where_blocks_cannot_be_shared_bytes_are_copied(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(source: int, source_offset: int, length: int, target: int, target_offset: int) -> None:
        calls.append(length)
        raise OSError(22 if len(calls) == 1 else 95, "not here")  # the question first: yes; then the first run: no

    monkeypatch.setattr(syscalls, "clone_range", refuse)
    data = rng.randbytes(9 * MIB)
    (tmp_path / "raw").write_bytes(data)
    convert(tmp_path / "raw", tmp_path / "target", "qcow2", source_format="raw")
    assert len(calls) >= 2
    with cowhand.open(tmp_path / "target") as disk:
        assert read_all(disk) == data
    assert_clean(tmp_path / "target")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_the_system_copies_when_it_is_asked_to(tmp_path: Path, rng: random.Random, format: str) -> None:
    data = rng.randbytes(5 * MIB) + bytes(MIB) + rng.randbytes(70_000)
    data = data.ljust(-(-len(data) // 512) * 512, b"\0")
    (tmp_path / "raw").write_bytes(data)
    convert(tmp_path / "raw", tmp_path / "target", format, source_format="raw", copy_range=True)
    with cowhand.open(tmp_path / "target", format=format) as disk:
        assert read_all(disk) == data
    if format == "qcow2":
        assert_clean(tmp_path / "target")
