"""Codecs of compressed clusters by themselves: what they take, and what they refuse."""

from __future__ import annotations

import random
import sys
import zlib

import pytest

from cowhand.block.formats.qcow2.cluster.compression import codec
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import ImageCorrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CLUSTER = 65536
BOTH = pytest.mark.parametrize("kind", [L.COMPRESSION_DEFLATE, L.COMPRESSION_ZSTD])


def text(rng: random.Random, length: int = CLUSTER) -> bytes:
    words = [rng.randbytes(rng.randint(2, 9)) for _ in range(300)]
    return b"".join(rng.choice(words) for _ in range(length))[:length]


def opened(kind: int, data: bytes, size: int = CLUSTER) -> bytes:
    out = bytearray(size)
    codec(kind).decompress_into(data, memoryview(out))
    return bytes(out)


@BOTH
@pytest.mark.parametrize("level", [None, 1, 9])
def test_clusters_come_back_with_padding_behind_them(rng: random.Random, kind: int, level: int | None) -> None:
    for data in (text(rng), bytes(CLUSTER), text(rng)[:30000] + rng.randbytes(CLUSTER - 30000)):
        packed = codec(kind, level).compress(memoryview(data))
        assert packed is not None and len(packed) < CLUSTER
        assert opened(kind, packed + rng.randbytes(300)) == data


@BOTH
def test_what_does_not_shrink_is_left(rng: random.Random, kind: int) -> None:
    assert codec(kind).compress(rng.randbytes(CLUSTER)) is None


@BOTH
def test_damage_is_told(rng: random.Random, kind: int) -> None:
    data = text(rng)
    packed = codec(kind).compress(data)
    assert packed is not None
    with pytest.raises(ImageCorrupt, match="a compressed cluster"):
        opened(kind, packed[: len(packed) // 2])
    with pytest.raises(ImageCorrupt, match="a compressed cluster"):
        opened(kind, rng.randbytes(2000))
    with pytest.raises(ImageCorrupt, match="a compressed cluster"):
        opened(kind, packed, 2 * CLUSTER)
    with pytest.raises(ImageCorrupt, match="a compressed cluster"):
        opened(kind, b"")


def test_the_window_is_the_one_that_readers_have(rng: random.Random) -> None:
    packed = codec(L.COMPRESSION_DEFLATE).compress(text(rng))
    assert packed is not None
    assert len(zlib.decompressobj(-12).decompress(packed)) == CLUSTER


def test_several_frames_make_a_cluster_and_a_longer_one_is_damage(rng: random.Random) -> None:
    data = text(rng)
    frames = b"".join(zstd.compress(data[at : at + 20000]) for at in range(0, CLUSTER, 20000))
    assert opened(L.COMPRESSION_ZSTD, frames + bytes(100)) == data
    with pytest.raises(ImageCorrupt, match="instead of 65536"):
        opened(L.COMPRESSION_ZSTD, zstd.compress(data + b"x"))
    with pytest.raises(ImageCorrupt, match="a compressed cluster"):
        opened(L.COMPRESSION_ZSTD, zstd.compress(b"") * 3)
