"""Compressed clusters of qcow2: raw deflate with a 12-bit window, or zstd (QEMU ``docs/interop/qcow2``, "Compression type").

Both release the interpreter lock while they work, so several threads compress at once. A result that is not smaller than the cluster is None.
"""

from __future__ import annotations

import threading
import zlib
from typing import Any, Protocol

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.buffers import Buffer
from cowhand.core.errors import ImageCorrupt, InvalidArgument, UnsupportedFeature

#: The window that qcow2's readers have: 4 KiB. A stream that reaches further back cannot be read by them.
WINDOW_BITS = 12
#: isal's levels. The dense one comes within six per cent of zlib's level 6 in a fifth of its time; the fast one takes half of that, and
#: loses little where data is loose: where this much from the middle of a cluster shrinks below this part.
_DENSE, _FAST = 3, 2
#: What may be asked for, zlib's levels and zstd's: from 1 to these.
MAX_LEVEL = {L.COMPRESSION_DEFLATE: 9, L.COMPRESSION_ZSTD: 22}
_SAMPLE = 1024
_LOOSE = _SAMPLE * 48 // 100


class Codec(Protocol):
    """Compresses clusters and back. Thread-safe."""

    def compress(self, data: Buffer) -> bytes | None:
        """Return the compressed form of one cluster, or None where that is not smaller."""

    def decompress_into(self, data: Buffer, view: memoryview) -> None:
        """Fill the writable *view*, one cluster, from *data*, which may be followed by padding. Raises ImageCorrupt."""


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
        if self._isal is not None:
            middle = len(data) // 2
            with memoryview(data) as view:
                loose = len(self._deflated(view[middle : middle + _SAMPLE], _FAST)) < _LOOSE
            out = self._deflated(data, _FAST if loose else _DENSE)
        else:
            deflater = zlib.compressobj(self.level if self.level is not None else -1, zlib.DEFLATED, -WINDOW_BITS)
            out = deflater.compress(data) + deflater.flush()
        return out if len(out) < len(data) else None

    def _deflated(self, data: Buffer, level: int) -> bytes:
        isal = self._isal
        out: bytes = isal.compress(data, level, isal.COMP_DEFLATE, isal.MEM_LEVEL_DEFAULT, WINDOW_BITS)
        return out

    def decompress_into(self, data: Buffer, view: memoryview) -> None:
        isal = self._isal
        size = len(view)
        failures: tuple[type[Exception], ...] = (zlib.error,) if isal is None else (zlib.error, isal.IsalError)
        try:
            # A wider window than is written is read too, as QEMU does: others write such images.
            if isal is None:
                out: bytes = zlib.decompressobj(-15).decompress(data, size)
            else:
                out = isal.IgzipDecompressor(flag=isal.DECOMP_DEFLATE, hist_bits=15).decompress(data, size)
        except failures as error:
            raise _damaged(f"cannot be decompressed: {error}") from error
        if len(out) != size:
            raise _damaged(f"gives {len(out)} bytes instead of {size}")
        view[:] = out


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
        self.level = level
        parameter = zstd.CompressionParameter
        # Level 1 with the larger hash table of level 3: as dense as qemu-img within three per cent, and a third faster.
        self._options = {
            parameter.compression_level: 1,
            parameter.strategy: zstd.Strategy.fast,
            parameter.window_log: 17,
            parameter.hash_log: 16,
            parameter.min_match: 6,
        }
        self._compressors = threading.local()

    def compress(self, data: Buffer) -> bytes | None:
        # One compressor for each thread: making one costs a tenth of compressing a cluster.
        compressor = getattr(self._compressors, "one", None)
        if compressor is None:
            options = (
                self._options if self.level is None else {self._zstd.CompressionParameter.compression_level: self.level}
            )
            compressor = self._compressors.one = self._zstd.ZstdCompressor(options=options)
        out: bytes = compressor.compress(data, compressor.FLUSH_FRAME)
        return out if len(out) < len(data) else None

    def decompress_into(self, data: Buffer, view: memoryview) -> None:
        # The decompressor object, since the module's function fails on what follows the frames.
        room = len(view)
        at = 0
        while at < room:
            one = self._zstd.ZstdDecompressor()
            try:
                # A byte more than there is room for: only then is it sure to look at the frame's end.
                out: bytes = one.decompress(data, room - at + 1)
            except (self._zstd.ZstdError, EOFError) as error:
                raise _damaged(f"cannot be decompressed: {error}") from error
            if not one.eof or at + len(out) > room or not (out or one.unused_data):
                raise _damaged(f"gives {at + len(out)} bytes instead of {room}, or ends early")
            view[at : at + len(out)] = out
            at += len(out)
            data = one.unused_data


def _damaged(what: str) -> ImageCorrupt:
    return ImageCorrupt(f"a compressed cluster {what}", qemu="Input/output error")


def codec(compression_type: int, level: int | None = None) -> Codec:
    """Return the codec of a header's *compression_type*. *level* None is the fastest that costs little size. Raises InvalidArgument."""
    most = MAX_LEVEL.get(compression_type, 0)
    if level is not None and not 1 <= level <= most:
        raise InvalidArgument(f"compression level {level} is not between 1 and {most}")
    if compression_type == L.COMPRESSION_DEFLATE:
        return Deflate(level)
    if compression_type == L.COMPRESSION_ZSTD:
        return Zstd(level)
    raise InvalidArgument(f"qcow2: unknown compression type: {compression_type}")
