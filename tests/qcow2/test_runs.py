"""Runs of an L2 table are the same whether numpy finds them or a loop does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.block.create import create
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2 import mapping
from cowhand.core.errors import NotSupported

SIZE = 256 << 10


def rows(disk: Disk) -> list[tuple[int, int, int, int]]:
    return [row[:4] for batch in disk.extents() for row in batch]


@pytest.mark.parametrize("seed", range(25))
def test_numpy_and_the_loop_agree(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    image = tmp_path / "image.qcow2"
    create(image, "qcow2", SIZE, {"cluster_size": 512})
    with cowhand.open(image, writable=True) as disk:
        for _ in range(rng.randrange(1, 40)):
            offset = rng.randrange(SIZE // 512) * 512
            length = min(rng.randrange(1, 20) * 512, SIZE - offset)
            kind = rng.random()
            if kind < 0.4:
                disk.write(offset, rng.randbytes(length))
            elif kind < 0.6:
                disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            elif kind < 0.8:
                disk.discard(offset, length)
            else:
                compressed(disk, offset)
        by_loop = rows(disk)
        monkeypatch.setattr(mapping, "_MANY_TABLES", -1)
        assert rows(disk) == by_loop


def compressed(disk: Disk, offset: int) -> None:
    node = disk.root
    payload = node.codec.compress(bytes(500) + b"not all zero")  # type: ignore[attr-defined]
    try:
        node.write_compressed(offset, payload)  # type: ignore[attr-defined]
    except NotSupported:
        return  # there is data already
