"""Bits and names in the header that this driver does not know, and disks that no table can hold."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError
from cowhand.image.check import check
from cowhand.image.create import create
from tests.tools.qemu import qemu_img, require_qemu

FEATURE_NAMES = 0x6803F857


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def peek(path: Path, offset: int, length: int) -> bytes:
    return path.read_bytes()[offset : offset + length]


def test_a_short_entry_at_the_end_of_the_feature_table_names_its_bit(tmp_path: Path) -> None:
    """A name table may end with the last name's last byte."""
    path = tmp_path / "a.qcow2"
    create(path, "qcow2", 1 << 20)
    length = int.from_bytes(peek(path, 100, 4), "big")
    entry = b"\0\x3fTest feature"
    poke(path, length, struct.pack(">II", FEATURE_NAMES, len(entry)) + entry + bytes(-len(entry) % 8) + bytes(8))
    poke(path, 72, struct.pack(">Q", 1 << 63))
    with pytest.raises(CowhandError) as raised:
        cowhand.open(path)
    assert raised.value.qemu().endswith("Unsupported qcow2 feature(s): Test feature")


def test_a_repair_takes_unknown_autoclear_bits_away(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path, "qcow2", 1 << 20)
    poke(path, 88, struct.pack(">Q", 1 << 63))
    assert check(path).exit_code == 0
    assert peek(path, 88, 8) == struct.pack(">Q", 1 << 63)
    assert check(path, repair="all").exit_code == 0
    assert peek(path, 88, 8) == bytes(8)


@require_qemu
def test_too_big_is_said_in_qemus_words(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path, "qcow2", 1 << 32)
    poke(path, 24, struct.pack(">Q", 1 << 60))
    with pytest.raises(CowhandError) as raised:
        cowhand.open(path)
    assert raised.value.qemu() in qemu_img("info", str(path), check=False).stderr


def test_a_folder_that_is_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(CowhandError) as raised:
        cowhand.open({"driver": "file", "filename": str(tmp_path)}, writable=True)
    assert raised.value.qemu() == f"Could not open '{tmp_path}': Is a directory"
    with pytest.raises(CowhandError, match="opens regular files only"):
        cowhand.open({"driver": "file", "filename": str(tmp_path)})
