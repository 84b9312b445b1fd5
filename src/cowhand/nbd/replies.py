"""Replies of the transmission phase: what a client makes of the bytes that a server sends. No I/O.

Source: NetworkBlockDevice ``doc/proto.md``, "Simple reply message", "Structured reply chunk message", "Structured reply types".

Theory of operation: a :class:`ReplyReader` is given bytes by :meth:`~ReplyReader.feed`, as many or few as came, and finishes the
:class:`Pending` requests whose replies they are. Data of reads goes to the place in the request's own buffer; while a large piece of it is due,
:meth:`~ReplyReader.wants` hands out that place, so that it can be received there without a copy. A server that breaks a rule is met with
ProtocolViolation, after which the reader must not be used: unknown cookies, data outside of what was asked or twice, lengths that no
chunk of that type has, chunks without end.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cowhand.core.buffers import fill_zero
from cowhand.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_READ,
    COMMAND_NAMES,
    MAX_ERROR_CHUNKS,
    MAX_ERROR_PAYLOAD,
    MAX_PIECES,
    MAX_STATUS_PAYLOAD,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR_BIT,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    errno_of,
)
from cowhand.nbd.errors import ProtocolViolation
from cowhand.nbd.options import decode_string

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_MAGIC = struct.Struct(">I")
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")


def encode_simple(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply; a read's bytes follow it when *error* (a number of the protocol) is 0."""
    return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def encode_chunk(kind: int, cookie: int, length: int, *, done: bool) -> bytes:
    """Return the header of a chunk of *length* bytes; *done* marks the last one of a reply."""
    return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE if done else 0, kind, cookie, length)


class Failure(NamedTuple):
    """What a server says went wrong: an errno of this system, and its words, if any."""

    errno: int
    message: str = ""


class Pending:
    """One request that was sent, and what has come of its reply. ``view`` is where a read's bytes go; ``extents`` is (length, state), flat.

    ``owner`` belongs to whoever waits.
    """

    __slots__ = (
        "command", "done", "errors", "extents", "failure", "length", "offset", "owner", "pieces", "received", "total", "view",
    )  # fmt: skip

    def __init__(self, command: int, offset: int, length: int, view: memoryview | None = None) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.view = view
        self.owner: object = None
        self.reset()

    def reset(self) -> None:
        """Forget what has come of the reply: the request is sent again."""
        self.done = False
        self.failure: Failure | None = None  #: the server's error
        self.received = 0
        self.total = 0
        self.pieces: list[tuple[int, int]] | None = (
            None  #: of a read: what came out of order, besides what ``received`` counts
        )
        self.extents: tuple[int, ...] = ()
        self.errors = 0


class ReplyReader:
    """Takes a server's replies apart; ``pending`` is {cookie: request}, from which finished requests go to ``finished``. One thread at a time."""

    def __init__(self, *, structured: bool, context: int | None, pending: dict[int, Pending]) -> None:
        self.pending = pending
        self.finished: list[Pending] = []
        self._structured = structured
        self._context = context
        self._rest = b""  #: the beginning of a header or a small payload
        # What is being received: its request, the place of what is still to come, and whether the reply ends with it. ``_payload`` is what
        # was made for the payload of a chunk of type ``_kind``; data of reads has its place in the request.
        self._into: memoryview | None = None
        self._payload: bytearray | None = None
        self._kind = 0
        self._request: Pending | None = None
        self._cookie = 0
        self._last = False

    def wants(self) -> memoryview | None:
        """Return the place of the data that is due next, or None where a header is."""
        return self._into

    def received(self, count: int) -> None:
        """Say that *count* bytes were received at the place that :meth:`wants` gave."""
        assert self._into is not None
        if count < len(self._into):
            self._into = self._into[count:]
            return
        request = self._request
        assert request is not None
        payload = self._payload
        self._into = self._request = self._payload = None
        if payload is not None:
            self._chunk(request, self._kind, memoryview(payload), self._last)
        if self._last:
            self._finish(self._cookie, request)

    def feed(self, data: memoryview) -> None:
        """Take *data*, whatever of however many replies it holds. Raises ProtocolViolation."""
        position, end = 0, len(data)
        if self._rest:
            data = memoryview(self._rest + bytes(data))
            end = len(data)
            self._rest = b""
        while position < end:
            into = self._into
            if into is not None:
                count = min(len(into), end - position)
                into[:count] = data[position : position + count]
                self.received(count)
                position += count
                continue
            used = self._header(data, position, end - position)
            if not used:
                self._rest = bytes(data[position:])
                return
            position += used

    # -- headers

    def _header(self, data: memoryview, at: int, available: int) -> int:
        """Take one header, with its payload unless that is data of a read; 0 when not all of it is there."""
        if available < 4:
            return 0
        (magic,) = _MAGIC.unpack_from(data, at)
        if magic == SIMPLE_REPLY_MAGIC:
            if available < _SIMPLE.size:
                return 0
            _, error, cookie = _SIMPLE.unpack_from(data, at)
            self._simple(self._find(cookie), cookie, error)
            return _SIMPLE.size
        if magic != STRUCTURED_REPLY_MAGIC:
            raise ProtocolViolation(f"invalid magic (got 0x{magic:x})")
        if not self._structured:
            raise ProtocolViolation("Protocol error: structured reply chunk, which was not agreed on")
        if available < _CHUNK.size:
            return 0
        _, flags, kind, cookie, length = _CHUNK.unpack_from(data, at)
        request = self._find(cookie)
        done = bool(flags & REPLY_FLAG_DONE)
        at += _CHUNK.size
        available -= _CHUNK.size
        if kind == REPLY_TYPE_OFFSET_DATA:
            if request.command != CMD_READ:
                raise ProtocolViolation("Unexpected NBD_REPLY_TYPE_OFFSET_DATA chunk")
            if length <= _OFFSET.size:
                raise ProtocolViolation("Protocol error: invalid payload for NBD_REPLY_TYPE_OFFSET_DATA")
            if available < _OFFSET.size:
                return 0
            self._data(request, cookie, _OFFSET.unpack_from(data, at)[0], length - _OFFSET.size, done)
            return _CHUNK.size + _OFFSET.size
        if length > (MAX_STATUS_PAYLOAD if kind == REPLY_TYPE_BLOCK_STATUS else MAX_ERROR_PAYLOAD):
            raise ProtocolViolation("Payload too large")
        if available < length:
            if length <= MAX_ERROR_PAYLOAD:
                return 0
            self._payload = bytearray(length)
            self._into, self._kind = memoryview(self._payload), kind
            self._request, self._cookie, self._last = request, cookie, done
            return _CHUNK.size
        self._chunk(request, kind, data[at : at + length], done)
        if done:
            self._finish(cookie, request)
        return _CHUNK.size + int(length)

    def _find(self, cookie: int) -> Pending:
        request = self.pending.get(cookie)
        if request is None:
            raise ProtocolViolation(f"the server replied to request {cookie:#x}, which nobody is waiting for")
        return request

    def _simple(self, request: Pending, cookie: int, error: int) -> None:
        if (self._structured and request.command == CMD_READ) or (request.command == CMD_BLOCK_STATUS and not error):
            # Of a read an error too: the protocol wants chunks for them once structured replies were agreed on.
            raise ProtocolViolation("Protocol error: simple reply when structured reply chunk was expected")
        if error:
            request.failure = Failure(errno_of(error))
        elif request.command == CMD_READ:
            request.received = request.total = request.length
            assert request.view is not None
            self._into, self._request, self._cookie, self._last = request.view, request, cookie, True
            return
        self._finish(cookie, request)

    # -- chunks

    def _data(self, request: Pending, cookie: int, offset: int, length: int, last: bool) -> None:
        begin = self._claim(request, offset, length)
        assert request.view is not None
        self._into = request.view[begin : begin + length]
        self._request, self._cookie, self._last = request, cookie, last

    def _claim(self, request: Pending, offset: int, length: int) -> int:
        """Note that ``[offset, offset + length)`` of a read has come, and return where in the request it lies."""
        begin = offset - request.offset
        if begin < 0 or length > request.length or begin + length > request.length:
            raise ProtocolViolation("Protocol error: server sent chunk exceeding requested region")
        request.total += length
        if request.total > request.length:
            raise ProtocolViolation("Protocol error: server sent more than a read asked for")
        if begin == request.received:
            request.received += length
        else:
            if request.pieces is None:
                request.pieces = []
            request.pieces.append((begin, length))
            if len(request.pieces) > MAX_PIECES:
                raise ProtocolViolation("Protocol error: server sent a read in too many pieces out of order")
        return begin

    def _chunk(self, request: Pending, kind: int, payload: memoryview, done: bool) -> None:
        if kind & REPLY_TYPE_ERROR_BIT:
            self._error(request, kind, payload)
        elif kind == REPLY_TYPE_NONE:
            if not done:
                raise ProtocolViolation(
                    "Protocol error: NBD_REPLY_TYPE_NONE chunk without NBD_REPLY_FLAG_DONE flag set"
                )
            if payload:
                raise ProtocolViolation("Protocol error: NBD_REPLY_TYPE_NONE chunk with nonzero length")
        elif kind == REPLY_TYPE_OFFSET_HOLE and request.command == CMD_READ:
            if len(payload) != _HOLE.size:
                raise ProtocolViolation("Protocol error: invalid payload for NBD_REPLY_TYPE_OFFSET_HOLE")
            offset, length = _HOLE.unpack(payload)
            if not length:
                raise ProtocolViolation("Protocol error: invalid payload for NBD_REPLY_TYPE_OFFSET_HOLE")
            begin = self._claim(request, offset, length)
            assert request.view is not None
            fill_zero(request.view[begin : begin + length])
        elif kind == REPLY_TYPE_BLOCK_STATUS and request.command == CMD_BLOCK_STATUS:
            self._status(request, payload)
        else:
            what = COMMAND_NAMES.get(request.command, "?")
            raise ProtocolViolation(f"Unexpected reply type: {kind} to a request of {what}")

    def _status(self, request: Pending, payload: memoryview) -> None:
        if len(payload) < 12 or len(payload) % 8 != 4:
            raise ProtocolViolation("Protocol error: invalid payload for NBD_REPLY_TYPE_BLOCK_STATUS")
        numbers = struct.unpack(f">{len(payload) // 4}I", payload)
        if numbers[0] != self._context:
            raise ProtocolViolation(
                f"Protocol error: unexpected context id {numbers[0]} for NBD_REPLY_TYPE_BLOCK_STATUS, when negotiated "
                f"context id is {self._context}"
            )
        if request.extents:
            raise ProtocolViolation("Several BLOCK_STATUS chunks in reply")
        request.extents = numbers[1:]
        if not all(request.extents[::2]):
            raise ProtocolViolation("Protocol error: server sent status chunk with zero length")

    def _error(self, request: Pending, kind: int, payload: memoryview) -> None:
        if len(payload) < _ERROR.size:
            raise ProtocolViolation("Protocol error: invalid payload for structured error")
        number, length = _ERROR.unpack_from(payload)
        if number == 0:
            raise ProtocolViolation("Protocol error: server sent structured error chunk with error = 0")
        if length > len(payload) - _ERROR.size or (kind == REPLY_TYPE_ERROR_OFFSET and length > len(payload) - 14):
            raise ProtocolViolation("Protocol error: server sent structured error chunk with incorrect message size")
        request.errors += 1
        if request.errors > MAX_ERROR_CHUNKS:
            raise ProtocolViolation("Protocol error: server does not come to an end of errors")
        if request.failure is None:
            said = decode_string(bytes(payload[_ERROR.size : _ERROR.size + length]))
            request.failure = Failure(errno_of(number), said)

    # -- the end of a reply

    def _finish(self, cookie: int, request: Pending) -> None:
        if request.failure is None:
            if request.command == CMD_READ:
                self._check_whole(request)
            elif request.command == CMD_BLOCK_STATUS and not request.extents:
                raise ProtocolViolation("Server did not reply with any status extents")
        del self.pending[cookie]
        request.done = True
        self.finished.append(request)

    def _check_whole(self, request: Pending) -> None:
        """Raise unless every byte of a read has come, and none twice."""
        position = request.received
        pieces = request.pieces
        if pieces:
            # What came in order may have been joined behind pieces that came early, so all are looked at.
            for begin, length in sorted(pieces):
                if begin != position:
                    break
                position += length
            else:
                pieces = None
        if pieces or position != request.length:
            raise ProtocolViolation("Protocol error: server did not send every byte of a read once")
