"""What is not in the page cache is asked for together, and read all the same."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.format_io import batch, readahead
from cowhand.block.node.node import READ
from cowhand.copy.ops.convert import convert
from cowhand.image.create import create

CLUSTER = 4096
SIZE = 256 * CLUSTER

pytestmark = pytest.mark.skipif(not readahead.NOWAIT, reason="this system does not read without waiting")


@pytest.fixture(params=["qcow2", "raw"])
def image(request: pytest.FixtureRequest, tmp_path: Path, rng: random.Random) -> tuple[Path, str, bytes]:
    """A disk whose clusters lie in any order."""
    path = tmp_path / "disk"
    create(path, request.param, SIZE, {"cluster_size": CLUSTER} if request.param == "qcow2" else {})
    content = rng.randbytes(SIZE)
    numbers = rng.sample(range(SIZE // CLUSTER), SIZE // CLUSTER)
    with cowhand.open(path, format=request.param, writable=True) as disk:
        for number in numbers:
            disk.write(number * CLUSTER, content[number * CLUSTER :][:CLUSTER])
    return path, request.param, content


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    plain = readahead.announce

    def announce(descriptor: int, wanted: Sequence[tuple[int, int]]) -> None:
        places.extend(wanted)
        plain(descriptor, wanted)

    monkeypatch.setattr(readahead, "announce", announce)
    return places


def refuse(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    raise BlockingIOError(errno.EAGAIN, "not cached")


def unknown(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    raise OSError(errno.EOPNOTSUPP, "not here")


def half(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    return os.preadv(descriptor, [memoryview(buffers[0])[: len(buffers[0]) // 2]], offset)


@pytest.mark.parametrize("answer", [refuse, unknown, half], ids=lambda answer: answer.__name__)
def test_a_batch_is_announced_when_its_first_read_would_wait(
    image: tuple[Path, str, bytes],
    announced: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[int, Sequence[Any], int], int],
) -> None:
    path, format, content = image
    plain: Any = os.preadv

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return answer(descriptor, buffers, offset) if flags else int(plain(descriptor, buffers, offset))

    with cowhand.open(path, format=format) as disk:
        disk.read(0, 1)  # so that the table is there
        monkeypatch.setattr(batch, "_preadv", preadv)
        monkeypatch.setattr(os, "preadv", preadv)
        asked = [number * 3 * CLUSTER + 512 for number in range(60)]
        assert read(disk, asked, 1024) == [content[offset : offset + 1024] for offset in asked]
    # A file is only probed: half of that is an answer.
    assert len(announced) == (60 if answer is refuse or (answer is half and format == "qcow2") else 0)


def test_a_long_read_of_scattered_clusters_is_announced(
    image: tuple[Path, str, bytes], announced: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, format, content = image
    monkeypatch.setattr(readahead, "is_cold", lambda descriptor, offset: True)
    with cowhand.open(path, format=format) as disk:
        assert disk.read(1000, 40 * CLUSTER) == content[1000 : 1000 + 40 * CLUSTER]
    assert sum(length for _, length in announced) == (40 * CLUSTER if format == "qcow2" else 0)


def test_the_cache_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(CLUSTER))
    with path.open("rb") as file:
        assert file.read() == bytes(CLUSTER)
        assert not readahead.is_cold(file.fileno(), 0)
        readahead.announce(file.fileno(), [(0, CLUSTER), (1 << 60, 1)])
    readahead.announce(-1, [(0, 1)])
    assert not readahead.is_cold(-1, 0)


def read(disk: Disk, offsets: list[int], length: int) -> list[bytes]:
    buffers = [bytearray(length) for _ in offsets]
    disk.submit([(READ, offset, buffer) for offset, buffer in zip(offsets, buffers, strict=True)])
    return [bytes(buffer) for buffer in buffers]


def test_a_copy_announces_what_comes_next(
    image: tuple[Path, str, bytes], announced: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, format, content = image
    monkeypatch.setattr(readahead, "is_cold", lambda descriptor, offset: True)
    convert(path, tmp_path / "copy", source_format=format, target_format="raw")
    assert (tmp_path / "copy").read_bytes() == content
    assert sum(length for _, length in announced) >= (SIZE if format == "qcow2" else 0)
