"""Requests of the transmission phase, as bytes.

Source: NetworkBlockDevice ``doc/proto.md``, "Request message".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cowhand.nbd.constants import REQUEST_MAGIC
from cowhand.nbd.errors import ProtocolViolation

_REQUEST = struct.Struct(">IHHQQI")
HEADER = _REQUEST.size


class RequestHeader(NamedTuple):
    """A request without its payload (``length`` bytes behind a write)."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


def encode_request(command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """Return the header of a request; a write's bytes follow it."""
    return _REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def decode_request(data: bytes) -> RequestHeader:
    """Return what a client asks. Raises ProtocolViolation for a wrong magic."""
    magic, flags, command, cookie, offset, length = _REQUEST.unpack(data)
    if magic != REQUEST_MAGIC:
        raise ProtocolViolation(f"invalid magic (got 0x{magic:x})")
    return RequestHeader(command, flags, cookie, offset, length)
