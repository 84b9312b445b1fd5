"""A client's requests taken apart, and judged, before anything is done. No I/O.

Source: NetworkBlockDevice ``doc/proto.md``, "Transmission", "Request message", "Extended request message", "Request types".

Theory of operation: whoever receives keeps a buffer; :meth:`RequestReader.take` returns the requests that lie in a part of it, whole ones only, and
where they end. Payloads of writes are told by their place in the buffer: nothing is copied. Where a request's payload is not all there
yet, ``partial`` is its header, and the receiver decides: to receive more, or, where the payload is larger than its buffer, to take
it by pieces. Requests that a server must refuse are returned too: :func:`refusal` tells why, and what their payload is stays
known, so that the conversation goes on behind it.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from cowhand.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXTENDED_REQUEST_MAGIC,
    FLAG_READ_ONLY,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
)
from cowhand.nbd.errors import ProtocolViolation
from cowhand.nbd.offers import Agreement

_COMPACT = struct.Struct(">IHHQQI")
_EXTENDED = struct.Struct(">IHHQQQ")
#: A payload that is longer is not read to its end for the sake of going on.
MAX_DISCARDED = (1 << 32) - 1
#: Requests that are taken at once, at most.
MAX_TAKEN = 256

#: What may be asked with each command, besides FUA, which QEMU's clients send with everything.
_FLAGS = {
    CMD_READ: CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_PAYLOAD_LEN,
    CMD_DISC: 0,
    CMD_FLUSH: 0,
    CMD_TRIM: 0,
    CMD_CACHE: 0,
    CMD_WRITE_ZEROES: CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_REQ_ONE | CMD_FLAG_PAYLOAD_LEN,
}
_CHANGES = (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES)


class ClientRequest(NamedTuple):
    """What a client asks. ``payload`` bytes begin at ``place`` in the buffer that it was taken from; ``length`` is what the header says."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: int
    place: int


class Refusal(NamedTuple):
    """Why a request is not done: an errno, and words for the client."""

    errno: int
    message: str


class RequestReader:
    """Takes a client's requests apart; see the module's description. One thread at a time."""

    def __init__(self, *, extended: bool) -> None:
        self.header = _EXTENDED.size if extended else _COMPACT.size
        self.partial: ClientRequest | None = (
            None  #: the request whose payload has not all come; it begins where :meth:`take` stopped
        )
        self._extended = extended
        self._unpack = (_EXTENDED if extended else _COMPACT).unpack_from
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC

    def take(self, buffer: memoryview | bytearray | bytes, begin: int, end: int) -> tuple[list[ClientRequest], int]:
        """Return the whole requests in ``buffer[begin:end]``, MAX_TAKEN at most, and where the first byte lies that belongs to none of them.

        Raises ProtocolViolation for what is no request: the conversation cannot go on.
        """
        out: list[ClientRequest] = []
        size, unpack, wanted = self.header, self._unpack, self._magic
        self.partial = None
        while end - begin >= size and len(out) < MAX_TAKEN:
            magic, flags, command, cookie, offset, length = unpack(buffer, begin)
            if magic != wanted:
                raise ProtocolViolation(
                    f"it sent {magic:#x} where a request begins", qemu=f"invalid magic (got 0x{magic:x})"
                )
            place = begin + size
            # A write always has a payload: also where an extended header's flag for it is missing.
            payload = length if command == CMD_WRITE or (self._extended and flags & CMD_FLAG_PAYLOAD_LEN) else 0
            if payload > MAX_DISCARDED:
                raise ProtocolViolation(f"it sends a payload of {payload} bytes")
            request = ClientRequest(command, flags, cookie, offset, length, payload, place)
            if payload > end - place:
                self.partial = request
                break
            out.append(request)
            begin = place + payload
            if command == CMD_DISC:
                break
        return out, begin


def refusal(request: ClientRequest, agreement: Agreement) -> Refusal | None:
    """Tell why *request* cannot be done, or None where it can be tried."""
    command, length = request.command, request.length
    known = _FLAGS.get(command)
    if known is None:
        return Refusal(errno.EINVAL, f"there is no command {command}")
    if request.flags & ~(known | CMD_FLAG_FUA):
        return Refusal(errno.EINVAL, f"flags {request.flags:#x} mean nothing to command {command}")
    offer = agreement.offer
    if command == CMD_FLUSH:
        return None
    if command in _CHANGES and offer.flags & FLAG_READ_ONLY:
        return Refusal(errno.EPERM, "the export is read-only")
    if command == CMD_BLOCK_STATUS:
        if request.payload:
            return None  # its range is in the payload
        if not agreement.contexts:
            return Refusal(errno.EINVAL, "no metadata context was agreed on")
        if not length:
            return Refusal(errno.EINVAL, "block status of nothing")
    if command in (CMD_READ, CMD_WRITE):
        if length > MAX_PAYLOAD:
            return Refusal(errno.EINVAL, f"{length} bytes are more than {MAX_PAYLOAD}, the most for one request")
        if request.flags & CMD_FLAG_DF and not agreement.structured:
            return Refusal(errno.EINVAL, "DF needs structured replies")
    return outside(request, request.offset, length, offer.size)


def outside(request: ClientRequest, offset: int, length: int, size: int) -> Refusal | None:
    """Refuse a range that is not inside the export."""
    if offset + length <= size:
        return None
    number = errno.ENOSPC if request.command in (CMD_WRITE, CMD_WRITE_ZEROES) else errno.EINVAL
    return Refusal(number, f"bytes {offset} to {offset + length} are not inside the export of {size} bytes")


def decode_status_payload(payload: bytes, agreement: Agreement) -> tuple[int, tuple[int, ...]] | None:
    """Return the length that block status is asked of, and the ids of the contexts; None for what says nothing."""
    if len(payload) < 12 or len(payload) % 4 or len(payload) > 8 + 4 * len(agreement.contexts):
        return None
    length, *idents = struct.unpack(f">Q{(len(payload) - 8) // 4}I", payload)
    if not length or any(ident >= len(agreement.contexts) for ident in idents):
        return None
    return length, tuple(sorted(set(idents)))
