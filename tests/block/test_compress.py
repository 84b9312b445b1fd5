"""The filter "compress": what goes through it is compressed, whole units, and nothing is compressed over data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.core.errors import IOFailed, NotSupported
from cowhand.core.extents import COMPRESSED
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from tests.tools.qemu import assert_clean, require_qemu

UNIT = 65536


def over(path: Path, driver: str = "qcow2") -> BlockNode:
    file = {"driver": driver, "file": {"driver": "file", "filename": str(path)}}
    return Opening(REGISTRY).open({"driver": "compress", "read-only": False, "file": file})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", 5 * UNIT + 512)
    return path


def compressed(path: Path) -> list[int]:
    """Return the numbers of the units that are stored compressed."""
    node = Opening(REGISTRY).open({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}})
    with Disk(node) as disk:
        rows = [row for batch in disk.extents() for row in batch if row.flags & COMPRESSED]
        return [unit for row in rows for unit in range(row.start // UNIT, -(-row.end // UNIT))]


@require_qemu
def test_what_is_written_is_stored_compressed_and_reads_the_same(image: Path) -> None:
    with Disk(over(image), writable=True) as disk:
        disk.write(0, b"a" * UNIT)
        disk.write(UNIT + 100, b"b" * 1000)  # a part of a unit, padded
        disk.write(5 * UNIT, b"c" * 512)  # the last, short unit
        disk.write_zeroes(3 * UNIT, UNIT)
        assert disk.read(0, 1) + disk.read(UNIT + 99, 2) + disk.read(5 * UNIT + 511, 1) == b"a\0bc"
    assert compressed(image) == [0, 1, 5]
    assert_clean(image)


def test_hooks_of_the_format_hear_of_every_unit(image: Path) -> None:
    heard: list[tuple[int, int]] = []
    root = over(image)
    with Disk(root, writable=True) as disk:
        graph.add_hook(root.children["file"].node, lambda offset, length: heard.append((offset, length)))
        disk.write(UNIT, b"a" * UNIT + os.urandom(UNIT))
        disk.write(5 * UNIT, b"c" * 512)
    assert heard == [(UNIT, UNIT), (2 * UNIT, UNIT), (5 * UNIT, 512)]


def test_a_unit_that_does_not_shrink_is_stored_as_it_is(image: Path) -> None:
    noise = os.urandom(UNIT)
    with Disk(over(image), writable=True) as disk:
        disk.write(2 * UNIT, noise)
        assert disk.read(2 * UNIT, UNIT) == noise
    assert compressed(image) == []


def test_data_is_not_compressed_over(image: Path) -> None:
    with Disk(over(image), writable=True) as disk:
        disk.write(0, b"a" * UNIT)
        with pytest.raises(IOFailed):
            disk.write(512, b"b" * 512)
        disk.discard(0, UNIT)
        disk.write(512, b"b" * 512)
        assert disk.read(0, 1024) == bytes(512) + b"b" * 512


def test_a_format_that_does_not_compress_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(UNIT))
    with pytest.raises(NotSupported, match="Compression is not supported for underlying format: raw"):
        over(path, "raw")
