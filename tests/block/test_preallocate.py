"""The filter "preallocate": a growing file takes space ahead, its users do not see it, and it is given back at the end."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import CONSISTENT_READ, BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidArgument
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from cowhand.testing.faults import FaultNode
from cowhand.testing.filters import FilterContract
from tests.block.disks import Worker
from tests.tools.qemu import assert_clean, require_qemu

KIB, MIB = 1 << 10, 1 << 20


def over(inner: object, **options: object) -> BlockNode:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    return Opening(REGISTRY).open({"driver": "preallocate", "read-only": False, "file": inner, **given})


def file_at(path: Path) -> dict[str, str]:
    return {"driver": "file", "filename": str(path)}


def raw_over(path: Path, **options: object) -> Disk:
    """Return a disk whose file grows behind the filter (a raw format over it writes past the end as a format's metadata does)."""
    return Disk(over(file_at(path), **options), writable=True)


class TestPreallocateContract(FilterContract):
    def wrap(self, inner: BlockNode) -> BlockNode:
        return Opening(REGISTRY).open({"driver": "preallocate", "file": inner, "read-only": not inner.writable})


def test_space_is_taken_ahead_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4 * KIB)
    disk = raw_over(path, prealloc_size=2 * MIB, prealloc_align=MIB)
    disk.resize(8 * KIB)
    node = disk.root
    node.write(8 * KIB, (b"y" * KIB,))
    assert (node.size, path.stat().st_size) == (9 * KIB, 3 * MIB)
    node.write(9 * KIB, (b"z" * KIB,))
    assert (node.size, path.stat().st_size) == (10 * KIB, 3 * MIB)
    disk.close()
    assert path.read_bytes() == b"x" * 4 * KIB + bytes(4 * KIB) + b"y" * KIB + b"z" * KIB


def test_zeroes_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    faults = FaultNode(MemoryNode(content=b"x" * 4 * KIB))
    node = over(faults, prealloc_size=MIB, prealloc_align=MIB)
    with Disk(node, writable=True):
        node.write(4 * KIB, (b"y" * KIB,))
        faults.fail("zero", lasting=True)
        node.write_zeroes(5 * KIB, 64 * KIB)
        assert node.size == 69 * KIB
        buffer = bytearray(64 * KIB)
        node.read_into(5 * KIB, buffer)
        assert buffer == bytes(64 * KIB)
        faults.reset()


def test_the_space_is_given_back_when_nobody_may_write_any_more(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    with raw_over(path, prealloc_size=MIB, prealloc_align=MIB) as disk:
        disk.root.write(0, (b"a" * KIB,))
        assert path.stat().st_size == 2 * MIB
        graph.set_permissions(disk.edge, CONSISTENT_READ, disk.edge.shared)
        assert path.stat().st_size == disk.root.size == KIB


def test_without_fast_zeroes_nothing_is_taken(tmp_path: Path) -> None:
    faults = FaultNode(MemoryNode(content=b""))
    faults.fail("zero", lasting=True)
    node = over(faults)
    with Disk(node, writable=True):
        node.write(0, (b"a" * KIB,))
        assert node.size == faults.size == KIB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prealloc-align": 1000}, "prealloc-align parameter of preallocate filter is not aligned to 512"),
        ({"prealloc-align": 512}, r"is not aligned to underlying node request alignment \(4096\)"),
    ],
)
def test_alignments_that_do_not_do_are_refused(options: dict[str, int], message: str) -> None:
    from cowhand.block.protocols.memory import MemoryOptions

    inner = MemoryNode(MemoryOptions(request_alignment=4096), bytes(4096))
    with pytest.raises(InvalidArgument, match=message):
        over(inner, **options)


@require_qemu
def test_an_image_over_it_is_sound_and_as_long_as_without(tmp_path: Path) -> None:
    sizes = []
    for driver in ("file", "preallocate"):
        path = tmp_path / driver
        create(str(path), "qcow2", 16 * MIB)
        below = file_at(path) if driver == "file" else {"driver": driver, "file": file_at(path)}
        root = Opening(REGISTRY).open({"driver": "qcow2", "file": below, "read-only": False})
        random.seed(7)
        with Disk(root, writable=True) as disk:
            model = bytearray(16 * MIB)
            for _ in range(60):
                offset, data = random.randrange(15 * MIB), os.urandom(16) * random.randrange(1, 9000)
                data = data[: 16 * MIB - offset]
                disk.write(offset, data)
                model[offset : offset + len(data)] = data
            assert disk.read(0, 16 * MIB) == model
        assert_clean(path)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]


def test_writers_that_grow_the_file_together_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    with raw_over(path, prealloc_size=64 * KIB, prealloc_align=64 * KIB) as disk:

        def fill(lane: int) -> None:
            for number in range(lane, 800, 4):
                disk.root.write(number * KIB, (bytes([number % 255 + 1]) * KIB,))

        workers = [Worker(fill, lane) for lane in range(4)]
        for worker in workers:
            worker.done()
    assert path.read_bytes() == b"".join(bytes([number % 255 + 1]) * KIB for number in range(800))
