"""Compressed clusters of qcow2: raw deflate with a 12-bit window, or zstd (QEMU ``docs/interop/qcow2``, "Compression type").

Both release the interpreter lock while they work, so several threads compress at once. A result that is not smaller than the cluster is None.
"""

from __future__ import annotations

import threading
import zlib
from typing import Any, Protocol

from cowhand.block.formats.qcow2 import layout as L
from cowhand.core.buffers import Buffer
from cowhand.core.errors import ImageCorrupt, InvalidArgument, UnsupportedFeature

#: The window that qcow2's readers have: 4 KiB. A stream that reaches further back cannot be read by them.
WINDOW_BITS = 12


class Codec(Protocol):
    """Compresses clusters and back. Thread-safe."""

    def compress(self, data: Buffer) -> bytes | None:
        """Return the compressed form of one cluster, or None where that is not smaller."""

    def decompress(self, data: Buffer, size: int) -> bytes:
        """Return exactly *size* bytes from *data*, which may be followed by padding. Raises ImageCorrupt."""


class Deflate:
    """Deflate: isal where it is installed and density was not asked for, zlib otherwise."""

    def __init__(self, level: int | None = None) -> None:
        self.level = level
        self._isal: Any = None
        if level is None:
            try:
                from isal import igzip_lib
            except ImportError:
                self.level = 1
            else:
                self._isal = igzip_lib

    def compress(self, data: Buffer) -> bytes | None:
        isal = self._isal
        if isal is not None:
            out: bytes = isal.compress(data, 1, isal.COMP_DEFLATE, isal.MEM_LEVEL_DEFAULT, WINDOW_BITS)
        else:
            deflater = zlib.compressobj(self.level if self.level is not None else -1, zlib.DEFLATED, -WINDOW_BITS)
            out = deflater.compress(data) + deflater.flush()
        return out if len(out) < len(data) else None

    def decompress(self, data: Buffer, size: int) -> bytes:
        isal = self._isal
        failures: tuple[type[Exception], ...] = (zlib.error,) if isal is None else (zlib.error, isal.IsalError)
        try:
            # A wider window than is written is read too, as QEMU does: others write such images.
            if isal is None:
                out: bytes = zlib.decompressobj(-15).decompress(data, size)
            else:
                out = isal.IgzipDecompressor(flag=isal.DECOMP_DEFLATE, hist_bits=15).decompress(data, size)
        except failures as error:
            raise ImageCorrupt(
                f"a compressed cluster cannot be decompressed: {error}", qemu="Input/output error"
            ) from error
        if len(out) != size:
            raise ImageCorrupt(
                f"a compressed cluster gives {len(out)} bytes instead of {size}", qemu="Input/output error"
            )
        return out


class Zstd:
    """Zstandard, one frame a cluster."""

    def __init__(self, level: int | None = None) -> None:
        try:
            import sys

            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd
        except ImportError as error:
            raise UnsupportedFeature(
                "zstd-compressed images need the package backports.zstd",
                qemu="compression type 'zstd' is not supported",
            ) from error
        self._zstd: Any = zstd
        # As dense as qemu-img within two per cent, and a quarter faster.
        self.level = level if level is not None else 2
        self._compressors = threading.local()

    def compress(self, data: Buffer) -> bytes | None:
        # One compressor for each thread: making one costs a tenth of compressing a cluster.
        compressor = getattr(self._compressors, "one", None)
        if compressor is None:
            compressor = self._compressors.one = self._zstd.ZstdCompressor(self.level)
        out: bytes = compressor.compress(data, compressor.FLUSH_FRAME)
        return out if len(out) < len(data) else None

    def decompress(self, data: Buffer, size: int) -> bytes:
        # The decompressor object, since the module's function fails on what follows the frame.
        try:
            out: bytes = self._zstd.ZstdDecompressor().decompress(data, size)
        except (self._zstd.ZstdError, EOFError) as error:
            raise ImageCorrupt(
                f"a compressed cluster cannot be decompressed: {error}", qemu="Input/output error"
            ) from error
        if len(out) != size:
            raise ImageCorrupt(
                f"a compressed cluster gives {len(out)} bytes instead of {size}", qemu="Input/output error"
            )
        return out


def codec(compression_type: int, level: int | None = None) -> Codec:
    """Return the codec of a header's *compression_type*. *level* None is the fastest that costs little size."""
    if compression_type == L.COMPRESSION_DEFLATE:
        return Deflate(level)
    if compression_type == L.COMPRESSION_ZSTD:
        return Zstd(level)
    raise InvalidArgument(f"qcow2: unknown compression type: {compression_type}")
