"""How chunks of Apple's disk images are compressed. Each decoder is given how many bytes may come, and takes no more memory than that."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable

from cowhand.core.errors import NotSupported

RAW, IGNORED, ZEROES = 1, 2, 0
ADC, ZLIB, BZIP2, LZFSE, LZMA = 0x80000004, 0x80000005, 0x80000006, 0x80000007, 0x80000008
#: Dictionaries of lzma streams, at most.
_LZMA_MEMORY = 128 << 20


class Damaged(Exception):
    """The compressed bytes are not what they are said to be."""


def adc(data: bytes | bytearray, limit: int) -> bytes:
    """Return what *data*, of Apple's Data Compression, holds: literal bytes, and copies of what came before."""
    out = bytearray()
    at, end = 0, len(data)
    while at < end and len(out) < limit:
        control = data[at]
        if control & 0x80:
            count = (control & 0x7F) + 1
            out += data[at + 1 : at + 1 + count]
            at += 1 + count
            continue
        width = 3 if control & 0x40 else 2
        if at + width > end:
            raise Damaged("it ends inside a copy")
        if width == 3:
            count, back = (control & 0x3F) + 4, int.from_bytes(data[at + 1 : at + 3], "big") + 1
        else:
            count, back = (control >> 2 & 0xF) + 3, ((control & 3) << 8 | data[at + 1]) + 1
        at += width
        if back > len(out):
            raise Damaged("a copy begins before the first byte")
        if back >= count:
            out += out[-back : len(out) - back + count]
        else:
            piece = bytes(out[-back:])
            out += (piece * (count // back + 1))[:count]
    return bytes(out[:limit])


def _zlib(data: bytes | bytearray, limit: int) -> bytes:
    import zlib

    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error as error:
        raise Damaged(str(error)) from None


def _bzip2(data: bytes | bytearray, limit: int) -> bytes:
    import bz2

    try:
        return bz2.BZ2Decompressor().decompress(data, limit)
    except OSError as error:
        raise Damaged(str(error)) from None


def _lzma(data: bytes | bytearray, limit: int) -> bytes:
    import lzma

    try:
        return lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(data, limit)
    except lzma.LZMAError as error:
        raise Damaged(str(error)) from None


def _lzfse(data: bytes | bytearray, limit: int) -> bytes:
    # The library cannot be told how much may come; the blocks' own headers say it.
    if lzfse_size(data) > limit:
        raise Damaged("it holds more than is said")
    try:
        library = importlib.import_module("liblzfse")
    except ImportError:
        raise NotSupported(
            "the image is compressed with LZFSE, for which a library is needed",
            hint="Install it: pip install pyliblzfse",
        ) from None
    try:
        return bytes(library.decompress(bytes(data)))
    except library.error as error:
        raise Damaged(str(error)) from None


def lzfse_size(data: bytes | bytearray) -> int:
    """Return how many bytes the blocks of an LZFSE stream say that they hold ("LZFSE", Apple's reference, ``lzfse_internal.h``)."""
    total = at = 0
    while data[at : at + 4] != b"bvx$":
        kind = bytes(data[at : at + 4])
        try:
            if kind == b"bvx-":
                (raw,) = struct.unpack_from("<I", data, at + 4)
                at += 8 + raw
            elif kind == b"bvxn":
                raw, size = struct.unpack_from("<II", data, at + 4)
                at += 12 + size
            elif kind == b"bvx2":
                raw, first, second, third = struct.unpack_from("<IQQQ", data, at + 4)
                at += (third & 0xFFFFFFFF) + (first >> 20 & 0xFFFFF) + (second >> 40 & 0xFFFFF)
            else:
                raise Damaged("it is no LZFSE stream")
        except struct.error:
            raise Damaged("it ends inside a block") from None
        if kind == b"bvx2" and not third & 0xFFFFFFFF:
            raise Damaged("a block has no header")
        total += raw
    return total


DECODERS: dict[int, tuple[str, Callable[[bytes | bytearray, int], bytes]]] = {
    ADC: ("ADC", adc),
    ZLIB: ("zlib", _zlib),
    BZIP2: ("bzip2", _bzip2),
    LZFSE: ("lzfse", _lzfse),
    LZMA: ("lzma", _lzma),
}
