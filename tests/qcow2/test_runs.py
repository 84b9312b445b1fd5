"""Runs of an L2 table are the same whether numpy finds them or a loop does."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.cluster import mapping
from cowhand.block.formats.qcow2.ondisk.l2_entries import adjoining
from cowhand.block.formats.qcow2.refcount.counted import Tally
from cowhand.core.errors import NotSupported
from cowhand.image.create import create

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


@pytest.mark.parametrize("seed", range(20))
def test_counts_of_scattered_clusters(seed: int) -> None:
    """Taken together they are what one by one gives, also at the limit of a count."""
    rng = random.Random(seed)
    order = rng.choice((0, 2, 4))
    over: list[list[tuple[int, int]]] = [[], []]
    together = Tally(order, 5000, lambda *what: over[0].append(what))
    singly = Tally(order, 5000, lambda *what: over[1].append(what))
    for _ in range(6):
        clusters = [rng.randrange(rng.choice((600, 5000))) for _ in range(rng.randrange(2, 300))]
        if rng.random() < 0.5:
            clusters = rng.sample(range(4000), 200)
        times = rng.choice((1, 1, 3))
        together.add_each(clusters, times)
        for cluster in clusters:
            singly.add(cluster, 1, times)
        assert together.segments == singly.segments
        assert list(together.each(clusters)) == [singly.get(cluster) for cluster in clusters]
    assert over[0] == over[1]


@given(
    words=st.lists(st.sampled_from((512, 1024, 1536, 2048, 512 | 1 << 63, 1024 | 1 << 63)), min_size=1, max_size=40),
    data=st.data(),
)
def test_adjoining_entries(words: list[int], data: st.DataObject) -> None:
    stride = data.draw(st.sampled_from((1, 2)))
    position = data.draw(st.integers(0, len(words) - 1))
    expected = 1
    while (at := position + expected * stride) < len(words) and words[at] == words[position] + expected * 512:
        expected += 1
    assert adjoining(array("Q", words), position, 512, stride) == expected


def test_long_runs_of_adjoining_entries() -> None:
    words = array("Q", range(1 << 63 | 65536, 1 << 63 | 65536 * 3000, 65536))
    assert adjoining(words, 5, 65536) == len(words) - 5
    words[2000] += 65536
    assert adjoining(words, 5, 65536) == 1995
