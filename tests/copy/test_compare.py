"""Comparing: the same answer, and the same words, as qemu-img compare."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from cowhand.copy.ops.compare import CompareResult, Difference, compare, first_difference
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import Cancelled, IOFailed
from cowhand.core.extents import ExtentBatch
from cowhand.core.progress import CancelToken
from cowhand.testing.faults import FaultNode
from tests.copy.images import MIB, content, memory_disk, sparse_file
from tests.tools.qemu import qemu_img, qemu_io, require_qemu


def judge(one: Path, one_format: str, two: Path, two_format: str, *, strict: bool = False) -> CompareResult:
    """Compare both images both ways, ours and qemu-img's, and assert that they agree in every word."""
    result = CompareResult(False)
    for (a, a_format), (b, b_format) in (
        ((two, two_format), (one, one_format)),
        ((one, one_format), (two, two_format)),
    ):
        theirs = qemu_img("compare", *["-s"] * strict, "-f", a_format, "-F", b_format, a, b, check=False)
        result = compare(a, b, first_format=a_format, second_format=b_format, strict=strict)
        assert theirs.status == (0 if result.identical else 1), theirs
        lines = ["Warning: Image size mismatch!"] * (result.size_mismatch and not strict) + [result.message]
        assert theirs.stdout.splitlines() == lines
    return result


@require_qemu
@pytest.mark.interop
def test_differences_are_found_where_qemu_finds_them(image_dir: Path, rng: random.Random) -> None:
    data = content(rng, 5 * MIB, 20)
    raw = sparse_file(image_dir / "raw", data)
    image = image_dir / "image"
    convert(raw, image, "qcow2", source_format="raw", options={"cluster_size": "4k"})
    assert judge(raw, "raw", image, "qcow2") == CompareResult(True)
    for _ in range(12):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(data))
            changed[at] ^= rng.randrange(1, 256)
        other = sparse_file(image_dir / "other", bytes(changed))
        found = judge(image, "qcow2", other, "raw")
        assert found.reason is Difference.CONTENT
        first = next(index for index, (a, b) in enumerate(zip(data, changed, strict=True)) if a != b)
        assert found.offset == first // 512 * 512


@require_qemu
@pytest.mark.interop
def test_a_longer_disk_is_the_same_when_it_goes_on_with_zeroes(image_dir: Path, rng: random.Random) -> None:
    data = content(rng, MIB)
    short = sparse_file(image_dir / "short", data)
    longer = sparse_file(image_dir / "long", data + bytes(700 * 512))
    assert judge(short, "raw", longer, "raw") == CompareResult(True, size_mismatch=True, sizes_differ=True)
    assert judge(short, "raw", longer, "raw", strict=True).reason is Difference.SIZE
    other = sparse_file(image_dir / "other", data + bytes(300 * 512) + b"\0" * 9 + b"x" + bytes(502))
    assert judge(short, "raw", other, "raw") == CompareResult(
        False, Difference.CONTENT, MIB + 300 * 512, True, sizes_differ=True
    )


@require_qemu
@pytest.mark.interop
def test_strictly_what_is_allocated_counts_too(image_dir: Path, rng: random.Random) -> None:
    data = bytes(MIB) + b"\1" * MIB + bytes(MIB)
    raw = sparse_file(image_dir / "raw", data)
    partly, full = image_dir / "partly", image_dir / "full"
    full.write_bytes(data)
    partly.write_bytes(data[: 2 * MIB])
    with open(partly, "ab") as file:
        file.truncate(3 * MIB)
    assert judge(raw, "raw", full, "raw").identical
    assert judge(raw, "raw", full, "raw", strict=True) == CompareResult(False, Difference.STATUS, 0)
    assert judge(partly, "raw", full, "raw", strict=True).reason is Difference.STATUS
    twin = sparse_file(image_dir / "twin", data)
    assert judge(raw, "raw", twin, "raw", strict=True).identical


@require_qemu
@pytest.mark.interop
def test_chains_compressed_and_zero_clusters(image_dir: Path, rng: random.Random) -> None:
    raw = sparse_file(image_dir / "raw", content(rng, 3 * MIB, 15))
    base, top = image_dir / "base", image_dir / "top"
    convert(raw, base, "qcow2", source_format="raw", compressed=True)
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert judge(base, "qcow2", top, "qcow2").identical
    qemu_io(top, "write -z 1M 300k", "discard 0 128k", "write -P 0 2M 64k", format="qcow2")
    flat = image_dir / "flat"
    convert(top, flat, "raw")
    assert judge(top, "qcow2", flat, "raw").identical
    judge(base, "qcow2", top, "qcow2")


@pytest.mark.parametrize("workers", [1, 4])
def test_the_lowest_difference_is_told(rng: random.Random, workers: int) -> None:
    data = rng.randbytes(9 * MIB)
    for _ in range(5):
        changed = bytearray(data)
        places = sorted(rng.sample(range(len(data)), 6))
        for at in places:
            changed[at] ^= 1
        with memory_disk(data) as one, memory_disk(bytes(changed)) as two:
            assert compare(one, two, workers=workers).offset == places[0] // 512 * 512


def test_what_cannot_be_read_is_an_error_that_names_disk_and_place(rng: random.Random) -> None:
    data = rng.randbytes(3 * MIB)
    broken = FaultNode(MemoryNode(content=data))
    broken.fail("read", lasting=True)
    with Disk(broken) as one, memory_disk(data) as two, pytest.raises(IOFailed) as caught:
        compare(one, two)
    assert caught.value.qemu().startswith("Error while reading offset 0 of ")


def test_it_can_be_cancelled(rng: random.Random) -> None:
    cancel = CancelToken()
    cancel.cancel()
    data = rng.randbytes(MIB)
    with memory_disk(data) as one, memory_disk(data) as two, pytest.raises(Cancelled):
        compare(one, two, cancel=cancel)


def test_the_first_difference_of_two_buffers(rng: random.Random) -> None:
    data = rng.randbytes(5000)
    for at in (0, 1, 2500, 4999):
        other = bytearray(data)
        other[at] ^= 1
        assert first_difference(data, other) == at


class _Unknown(MemoryNode):
    """Cannot tell what lies in its second half."""

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        if offset >= MIB:
            raise IOFailed("nobody knows")
        return super().map_batch(offset, min(length, MIB - offset))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_difference_before_what_cannot_be_told_is_the_answer(workers: int) -> None:
    with Disk(_Unknown(content=b"a" * 2 * MIB)) as one:
        with memory_disk(b"a" * 4096 + b"b" * (2 * MIB - 4096)) as two:
            assert compare(one, two, workers=workers) == CompareResult(False, Difference.CONTENT, 4096)
        with memory_disk(b"a" * 2 * MIB) as two, pytest.raises(IOFailed, match="nobody knows"):
            compare(one, two, workers=workers)
