"""Contents of clusters, and the many legal forms of compressed ones.

Source: QEMU ``docs/interop/qcow2``, "Compressed Clusters Descriptor": decompression stops when it has produced a cluster of data.
"""

from __future__ import annotations

import random
import struct
import zlib


def content(rng: random.Random, length: int) -> bytes:
    """Return what a guest might have in *length* bytes: text that repeats, noise, zeroes in between, the same byte."""
    kind = rng.randrange(6)
    if kind == 0:
        return bytes([rng.randrange(256)]) * length
    if kind == 1:
        return rng.randbytes(length)
    if kind == 2:
        half = rng.randrange(1, length)
        return rng.randbytes(half) + bytes(length - half)
    if kind == 3:
        half = rng.randrange(1, length)
        return bytes(length - half) + rng.randbytes(half)
    if kind == 4 and length > 5000:
        # The same noise far apart: a match of a large distance.
        noise = rng.randbytes(rng.choice((4090, 5000, length // 2)))
        return (noise * (length // len(noise) + 1))[:length]
    words = [b"%x " % rng.randrange(1 << 24) for _ in range(20)]
    out = b"".join(rng.choice(words) for _ in range(length // 2))
    return out[:length].ljust(length, b".")


def deflated(rng: random.Random, data: bytes) -> bytes:
    """Return *data* as raw deflate: any window and level, stored, in several blocks, or longer than the cluster."""
    window = rng.choice((12, 12, 12, 9, 10, 15))
    maker = zlib.compressobj(rng.choice((0, 1, 6, 9)), zlib.DEFLATED, -window, strategy=rng.choice((0, 0, 2, 3, 4)))
    shape = rng.randrange(6)
    if shape == 0:
        half = rng.randrange(len(data) + 1)
        out = maker.compress(data[:half]) + maker.flush(rng.choice((zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH)))
        return out + maker.compress(data[half:]) + maker.flush()
    if shape == 1:
        return maker.compress(data + b"behind the cluster's end" * 3) + maker.flush()
    return maker.compress(data) + maker.flush()


def zstd(rng: random.Random, data: bytes) -> bytes:
    """Return *data* as zstd: one frame or several, between frames that are to be skipped."""
    from backports import zstd as library

    parameter = library.CompressionParameter

    def frame(piece: bytes) -> bytes:
        options = {
            parameter.compression_level: rng.choice((1, 3, 9, 19, -5)),
            parameter.checksum_flag: rng.randrange(2),
        }
        return library.compress(piece, options=options)

    if rng.random() < 0.3:
        half = rng.randrange(1, len(data))
        out = frame(data[:half]) + frame(data[half:])
    else:
        out = frame(data)
    if rng.random() < 0.15:
        out = struct.pack("<II", 0x184D2A50 + rng.randrange(16), 5) + b"skip!" + out
    return out
