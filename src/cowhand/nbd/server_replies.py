"""A server's replies as bytes. No I/O.

Source: NetworkBlockDevice ``doc/proto.md``, "Simple reply message", "Structured reply chunk message", "Extended reply chunk message".

Reads and block status are answered by chunks where structured replies were agreed on; what only succeeds gets a simple reply, and what fails
a chunk with words. With extended headers every reply is a chunk.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from cowhand.core.errors import Closed
from cowhand.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    wire_of,
)
from cowhand.nbd.server_options import encode_text
from cowhand.nbd.server_requests import ClientRequest

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_EXTENDED = struct.Struct(">IHHQQQ")
_DATA = struct.Struct(">IHHQIQ")
_DATA_EXTENDED = struct.Struct(">IHHQQQQ")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")


class ReplyEncoder:
    """Puts replies together in the form that was agreed on. Stateless, hence thread-safe."""

    def __init__(self, *, structured: bool, extended: bool) -> None:
        self._structured = structured
        self._extended = extended
        #: Bytes before the data of a read that is answered in one piece.
        self.data_header = (_DATA_EXTENDED if extended else _DATA if structured else _SIMPLE).size

    def _chunk(self, kind: int, request: ClientRequest, payload: bytes, *, done: bool = True) -> bytes:
        flags = REPLY_FLAG_DONE if done else 0
        if self._extended:
            header = _EXTENDED.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(payload))
        else:
            header = _CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload))
        return header + payload

    def success(self, request: ClientRequest) -> bytes:
        """Return the reply to what has nothing to tell."""
        if self._extended:
            return self._chunk(REPLY_TYPE_NONE, request, b"")
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def end(self, request: ClientRequest) -> bytes:
        """Return the chunk that ends a reply which was given in pieces."""
        return self._chunk(REPLY_TYPE_NONE, request, b"")

    def error(self, request: ClientRequest, number: int, message: str = "") -> bytes:
        """Return the reply to what failed with the system's error *number*."""
        wire = wire_of(number)
        if not self._structured:
            return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, wire, request.cookie)
        text = encode_text(message)
        return self._chunk(REPLY_TYPE_ERROR, request, _ERROR.pack(wire, len(text)) + text)

    def put_data_header(
        self, out: bytearray, at: int, cookie: int, offset: int, length: int, request_offset: int
    ) -> None:
        """Write at *at* of *out* the header of a read's only piece, *length* bytes from *offset*."""
        if self._extended:
            _DATA_EXTENDED.pack_into(
                out, at, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, cookie, request_offset, length + 8, offset
            )  # fmt: skip
        elif self._structured:
            _DATA.pack_into(
                out, at, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, cookie, length + 8, offset
            )  # fmt: skip
        else:
            _SIMPLE.pack_into(out, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def data_piece(self, request: ClientRequest, offset: int, length: int, *, done: bool) -> bytes:
        """Return the header of a piece of a read, *length* bytes from *offset*, which follow it."""
        flags = REPLY_FLAG_DONE if done else 0
        if self._extended:
            return _DATA_EXTENDED.pack(
                EXTENDED_REPLY_MAGIC, flags, REPLY_TYPE_OFFSET_DATA, request.cookie, request.offset, length + 8, offset
            )  # fmt: skip
        return _DATA.pack(STRUCTURED_REPLY_MAGIC, flags, REPLY_TYPE_OFFSET_DATA, request.cookie, length + 8, offset)

    def hole(self, request: ClientRequest, offset: int, length: int, *, done: bool) -> bytes:
        """Return a piece of a read that is all zeroes."""
        return self._chunk(REPLY_TYPE_OFFSET_HOLE, request, _HOLE.pack(offset, length), done=done)

    def status(self, request: ClientRequest, ident: int, extents: Sequence[tuple[int, int]], *, done: bool) -> bytes:
        """Return what context *ident* says: (length, state) of each extent."""
        numbers = [number for extent in extents for number in extent]
        if self._extended:
            payload = struct.pack(f">II{len(numbers)}Q", ident, len(extents), *numbers)
            return self._chunk(REPLY_TYPE_BLOCK_STATUS_EXT, request, payload, done=done)
        payload = struct.pack(f">I{len(numbers)}I", ident, *numbers)
        return self._chunk(REPLY_TYPE_BLOCK_STATUS, request, payload, done=done)


def number_of(error: BaseException) -> int:
    """Return the system's error that *error* stands for."""
    if isinstance(error, Closed):
        return errno.ESHUTDOWN
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) else errno.EIO
