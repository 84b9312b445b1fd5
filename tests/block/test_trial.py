"""A trial reads like the file with all changes, and the file stays as it is."""

from __future__ import annotations

import random

import pytest

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import UnsupportedFeature
from cowhand.image.shadow.pages import PAGE, TrialNode


@pytest.mark.parametrize("seed", range(3))
def test_it_reads_like_what_was_written(seed: int) -> None:
    rng = random.Random(seed)
    size = 9 * PAGE + rng.randrange(PAGE)
    content = rng.randbytes(size)
    below, model = MemoryNode(content=content), bytearray(content)
    with Disk(below):
        node = TrialNode(below)
        with Disk(node, writable=True) as disk:
            for _ in range(60):
                offset = rng.randrange(disk.size)
                length = min(rng.choice((1, 512, 4096, PAGE, 3 * PAGE)), disk.size - offset)
                kind = rng.randrange(4)
                if kind == 0:
                    data = rng.randbytes(length)
                    disk.write(offset, data[: length // 3], data[length // 3 :])
                    model[offset : offset + length] = data
                elif kind == 1:
                    disk.write_zeroes(offset, length)
                    model[offset : offset + length] = bytes(length)
                elif kind == 2 and disk.size < 20 * PAGE:
                    disk.resize(disk.size + length)
                    model.extend(bytes(length))
                assert disk.read(offset, length) == model[offset : offset + length]
            assert disk.read(0, disk.size) == model
        assert below.snapshot_bytes() == content


def test_it_ends_where_too_much_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialNode, "max_bytes", 4 * PAGE)
    below = MemoryNode(content=bytes(8 * PAGE))
    with Disk(below), Disk(TrialNode(below), writable=True) as disk:
        for _ in range(3):
            disk.write(100, b"x" * 3 * PAGE)
        with pytest.raises(UnsupportedFeature):
            disk.write(6 * PAGE, b"y")
