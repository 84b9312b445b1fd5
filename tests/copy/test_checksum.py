"""Checksums of disks: the same for every way to store one, and those of other programs."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.checksum import ALGORITHMS, BLOCK, checksum
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import Cancelled, CowhandError, InvalidArgument
from cowhand.core.progress import CancelToken, Progress
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot
from tests.copy import images

MIB = 1 << 20


def tree(data: bytes, name: str) -> str:
    """Return the hash of the blocks' hashes and the size, as the module's first lines define it."""
    outer = hashlib.new(name)
    for at in range(0, len(data), BLOCK):
        outer.update(hashlib.new(name, data[at : at + BLOCK]).digest())
    outer.update(len(data).to_bytes(8, "big"))
    return outer.hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_every_way_to_store_a_disk_has_the_same(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    content = images.content(rng, 3 * MIB + rng.choice((0, 512, 70_000 // 512 * 512)))
    raw = images.sparse_file(tmp_path / "raw", content)
    ways: list[Path] = [raw]
    for number, (options, more) in enumerate(
        (
            ({}, {}),
            ({"cluster_size": "4k"}, {"compressed": True}),
            ({"extended_l2": "on"}, {}),
            ({"preallocation": "full"}, {}),
        )
    ):
        ways.append(tmp_path / f"q{number}")
        convert(raw, ways[-1], "qcow2", source_format="raw", options=options, **more)  # type: ignore[arg-type]
    top = tmp_path / "top"
    create(top, "qcow2", backing=str(ways[1]), backing_format="qcow2")
    with cowhand.open(top, writable=True) as disk:
        disk.write(0, disk.read(0, 100_000))
    ways.append(top)
    for algorithm, expected in (
        ("sha256", hashlib.sha256(content).hexdigest()),
        ("blake2b", hashlib.blake2b(content).hexdigest()),
        ("tree-sha256", tree(content, "sha256")),
        ("tree-md5", tree(content, "md5")),
    ):
        for way in ways:
            found = checksum(way, algorithm, format="raw" if way == raw else None)
            assert (found.digest, found.size) == (expected, len(content)), (algorithm, way)


def test_a_snapshot_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a"
    create(path, "qcow2", MIB)
    before = checksum(path)
    with cowhand.open(path, writable=True) as disk:
        create_snapshot(disk, "s")
        disk.write(0, b"x")
    assert checksum(path, snapshot="s") == before != checksum(path)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 1024)
    assert checksum(tmp_path / "a", name, format="raw").digest == hashlib.new(name, b"a" * 1024).hexdigest()
    assert checksum(tmp_path / "a", f"tree-{name}", format="raw").digest == tree(b"a" * 1024, name)


def test_an_empty_tebibyte_is_hashed_at_once(tmp_path: Path) -> None:
    create(tmp_path / "a", "qcow2", 1 << 40)
    zero = hashlib.sha256(bytes(BLOCK)).digest()
    outer = hashlib.sha256()
    for _ in range(1 << 10):
        outer.update(zero * (1 << 14))
    outer.update((1 << 40).to_bytes(8, "big"))
    assert checksum(tmp_path / "a", "tree-sha256").digest == outer.hexdigest()


def test_progress_and_cancelling(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3 * MIB)
    progress = Progress()
    checksum(tmp_path / "a", format="raw", progress=progress)
    assert progress.done == progress.total == 3 * MIB
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        checksum(tmp_path / "a", format="raw", cancel=cancel)
    with pytest.raises(InvalidArgument):
        checksum(tmp_path / "a", "crc32")


def test_a_source_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3 * MIB)
    rules = [{"event": "none", "sector": 4096, "iotype": "read"}]
    image = {"driver": "file", "filename": str(tmp_path / "a")}
    for algorithm in ("sha256", "tree-sha256"):
        with pytest.raises(CowhandError):
            checksum(
                {"driver": "raw", "file": {"driver": "blkdebug", "image": image, "inject-error": rules}}, algorithm
            )
