"""Images that are amended in place: QEMU finds them clean and reads the same, and both say the same where it cannot be done."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

SIZE = 4 << 20
#: Every width, to a wider and to a narrower one.
WIDTHS = (1, 64, 2, 32, 4, 8, 16, 1, 16, 64, 8, 2)


def amend(path: Path, **options: object) -> None:
    with cowhand.open(path, writable=True) as disk:
        disk.root.amend(options)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_every_width_of_reference_counts(cluster: int, tmp_path: Path) -> None:
    path, model = tmp_path / "disk.qcow2", tmp_path / "model"
    rng = random.Random(cluster)
    create(path, "qcow2", SIZE, {"cluster_size": str(cluster)})
    content = bytearray(SIZE)
    for number, bits in enumerate(WIDTHS):
        amend(path, refcount_bits=bits)
        assert_clean(path)
        offset, data = rng.randrange(SIZE - 300_000), rng.randbytes(200_000)
        with cowhand.open(path, writable=True) as disk:
            assert disk.root.header.refcount_bits == bits  # type: ignore[attr-defined]
            disk.write(offset, data)
            disk.write_zeroes(offset + 70_000, 65_536, unmap=bool(number % 2))
        content[offset : offset + len(data)] = data
        content[offset + 70_000 : offset + 135_536] = bytes(65_536)
    model.write_bytes(content)
    assert_clean(path)
    assert_identical(path, "qcow2", model, "raw")


def test_counts_that_are_too_high_for_the_new_width(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    create(ours, "qcow2", SIZE, {})
    with cowhand.open(ours, writable=True) as disk:
        disk.write(0, b"x" * 1_000_000)
        for name in "abcd":
            create_snapshot(disk, name)
    theirs.write_bytes(ours.read_bytes())
    before = ours.read_bytes()
    for bits in (1, 2):
        with pytest.raises(CowhandError) as caught:
            amend(ours, refcount_bits=bits)
        assert ours.read_bytes() == before
        refused = qemu_img("amend", "-f", "qcow2", "-o", f"refcount_bits={bits}", theirs, check=False)
        assert refused.stderr.strip() == f"qemu-img: {caught.value.qemu()}"
    amend(ours, refcount_bits=4)
    assert_clean(ours)


def test_there_and_back_between_the_versions_with_another_width(tmp_path: Path) -> None:
    path, model = tmp_path / "disk.qcow2", tmp_path / "model"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=64,lazy_refcounts=on", path, "4M")
    content = random.Random(5).randbytes(1 << 20).ljust(SIZE, b"\0")
    model.write_bytes(content)
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, content[: 1 << 20])
        disk.write_zeroes(2 << 20, 1 << 20)
    with pytest.raises(CowhandError):
        amend(path, compat="0.10")
    amend(path, compat="0.10", refcount_bits=16)
    assert_clean(path)
    assert_identical(path, "qcow2", model, "raw")
    amend(path, compat="1.1", refcount_bits=8, lazy_refcounts=True)
    assert_clean(path)
    assert_identical(path, "qcow2", model, "raw")
