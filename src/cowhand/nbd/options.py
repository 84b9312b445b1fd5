"""Options of the handshake and the replies to them, as bytes.

Source: NetworkBlockDevice ``doc/proto.md``, "Option haggling" and "Option types".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from cowhand.core.errors import InvalidArgument
from cowhand.nbd.constants import (
    INFO_BLOCK_SIZE,
    MAX_OPTION_REPLY,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REP_ERROR,
    option_name,
    reply_name,
)
from cowhand.nbd.errors import ProtocolViolation

_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
REPLY_HEADER = _REPLY.size


class OptionReply(NamedTuple):
    """The header of a reply to ``option``: its kind (REP_...) and the bytes that follow."""

    option: int
    kind: int
    length: int

    @property
    def is_error(self) -> bool:
        return bool(self.kind & REP_ERROR)


def encode_option(option: int, payload: bytes = b"") -> bytes:
    """Return the request of *option*."""
    return _OPTION.pack(OPTION_MAGIC, option, len(payload)) + payload


def encode_reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    """Return a server's reply to *option*."""
    return _REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def decode_reply(data: bytes, option: int) -> OptionReply:
    """Return the header of a reply to *option*. Raises ProtocolViolation for another option's, or one that is too long."""
    magic, told, kind, length = _REPLY.unpack(data)
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolViolation("Unexpected option reply magic")
    if told != option:
        raise ProtocolViolation(
            f"Unexpected option type {told} ({option_name(told)}), expected {option} ({option_name(option)})"
        )
    if length > MAX_OPTION_REPLY:
        what = f"server error {kind} ({reply_name(kind)}) message" if kind & REP_ERROR else f"reply to option {option}"
        raise ProtocolViolation(f"{what} is too long")
    return OptionReply(told, kind, length)


def encode_string(text: str, what: str) -> bytes:
    """Return *text* as it goes over the wire. Raises InvalidArgument when it is longer than the protocol allows."""
    data = text.encode("utf-8", "surrogateescape")
    if len(data) > MAX_STRING:
        raise InvalidArgument(f"{what} too long to send to server")
    return data


def decode_string(data: bytes) -> str:
    """Return text of the other side for people: what cannot be printed is escaped, and there is no end of lines in it."""
    text = data.decode("utf-8", "backslashreplace").rstrip("\0")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def encode_go(name: bytes) -> bytes:
    """Return the payload of INFO and GO, which asks for the block size."""
    return struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_BLOCK_SIZE)


def encode_contexts(name: bytes, queries: Sequence[str]) -> bytes:
    """Return the payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [struct.pack(">I", len(name)), name, struct.pack(">I", len(queries))]
    for query in queries:
        data = encode_string(query, "x-dirty-bitmap query")
        parts += (struct.pack(">I", len(data)), data)
    return b"".join(parts)


def decode_context(payload: bytes) -> tuple[int, str]:
    """Return (id, name) of a META_CONTEXT reply."""
    if not 4 < len(payload) <= 4 + MAX_STRING:
        raise ProtocolViolation(
            f"Failed to negotiate meta context, server answered with unexpected length {len(payload)}"
        )
    return int.from_bytes(payload[:4], "big"), payload[4:].decode("utf-8", "backslashreplace")


def decode_export_info(payload: bytes) -> tuple[int, int]:
    """Return (size, transmission flags) of an INFO reply of kind EXPORT, its kind taken off."""
    if len(payload) != 10:
        raise ProtocolViolation(f"remaining export info len {len(payload)} is unexpected size")
    size, flags = struct.unpack(">QH", payload)
    return size, flags


def decode_block_sizes(payload: bytes) -> tuple[int, int, int]:
    """Return (minimum, preferred, maximum) of an INFO reply of kind BLOCK_SIZE, its kind taken off; what the protocol forbids is refused."""
    if len(payload) != 12:
        raise ProtocolViolation(f"remaining export info len {len(payload)} is unexpected size")
    minimum, preferred, maximum = struct.unpack(">III", payload)
    if not minimum or minimum & (minimum - 1) or minimum > 65536:
        raise ProtocolViolation(f"server minimum block size {minimum} is not a power of two")
    if not preferred or preferred & (preferred - 1) or preferred < minimum:
        raise ProtocolViolation(f"server preferred block size {preferred} is not valid")
    if maximum < minimum or (maximum != 0xFFFFFFFF and maximum % minimum):
        raise ProtocolViolation(f"server maximum block size {maximum} is not valid")
    return minimum, preferred, maximum
