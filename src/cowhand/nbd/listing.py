"""Asking a server what exports it has: a client's conversation without I/O, as :mod:`cowhand.nbd.handshake` describes them.

Source: NetworkBlockDevice ``doc/proto.md``, "NBD_OPT_LIST", "NBD_OPT_INFO", "NBD_OPT_LIST_META_CONTEXT".
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TypeAlias

from cowhand.nbd import options
from cowhand.nbd.constants import (
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    MAX_OPTION_REPLIES,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    REP_ACK,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
)
from cowhand.nbd.errors import NegotiationRefused, ProtocolViolation
from cowhand.nbd.handshake import abort, ask_structured, greet, present, receive_reply, refuse, unexpected_reply


@dataclass(slots=True)
class Listed:
    """An export as a server tells of it. What it does not tell is None, or 0 for block sizes."""

    name: str
    description: str = ""
    size: int | None = None
    flags: int = 0
    minimum: int = 0
    preferred: int = 0
    maximum: int = 0
    contexts: list[str] = field(default_factory=list)


_Listing: TypeAlias = "Generator[bytes | int, bytes, list[Listed]]"


def list_exports(*, tls: bool = False) -> _Listing:
    """Return the exports of a server, with their sizes and contexts where it tells them. Raises NegotiationRefused, ProtocolViolation."""
    greeting = yield from greet(tls=tls)
    if not greeting.fixed:
        if greeting.old:
            size, flags = struct.unpack(">QI", present((yield 12), "export length"))
            return [Listed("", size=size, flags=flags & 0xFFFF)]
        raise NegotiationRefused("Server does not support export lists")
    structured = yield from ask_structured()
    exports = yield from _names()
    for export in exports:
        yield from _details(export)
        if structured:
            yield from _contexts(export)
    yield from abort()
    return exports


def _names() -> _Listing:
    yield options.encode_option(OPT_LIST)
    exports: list[Listed] = []
    while True:
        reply = yield from receive_reply(OPT_LIST)
        if reply.is_error:
            yield from refuse(reply)
            raise NegotiationRefused("Server does not support export lists")
        if reply.kind == REP_ACK and not reply.length:
            return exports
        if reply.kind != REP_SERVER or reply.length < 4:
            raise ProtocolViolation(unexpected_reply(reply, REP_SERVER))
        if len(exports) >= MAX_OPTION_REPLIES:
            raise ProtocolViolation(f"a server lists more than {MAX_OPTION_REPLIES} exports")
        payload = present((yield reply.length), "name of an export")
        length = int.from_bytes(payload[:4], "big")
        if length > len(payload) - 4:
            raise ProtocolViolation("incorrect name length in server's list response")
        name = payload[4 : 4 + length].decode("utf-8", "surrogateescape")
        exports.append(Listed(name, payload[4 + length :].decode("utf-8", "surrogateescape")))


def _details(export: Listed) -> Generator[bytes | int, bytes, None]:
    name = options.encode_string(export.name, "export name")
    asked = struct.pack(">HHH", 2, INFO_BLOCK_SIZE, INFO_DESCRIPTION)
    yield options.encode_option(OPT_INFO, struct.pack(">I", len(name)) + name + asked)
    for _ in range(MAX_OPTION_REPLIES):
        reply = yield from receive_reply(OPT_INFO)
        payload = present((yield reply.length), "info payload") if reply.length else b""
        if reply.is_error or reply.kind == REP_ACK:
            return
        if reply.kind != REP_INFO or len(payload) < 2:
            raise ProtocolViolation(unexpected_reply(reply, REP_INFO))
        kind = int.from_bytes(payload[:2], "big")
        if kind == INFO_EXPORT:
            export.size, export.flags = options.decode_export_info(payload[2:])
        elif kind == INFO_BLOCK_SIZE:
            export.minimum, export.preferred, export.maximum = options.decode_block_sizes(payload[2:])
        elif kind == INFO_DESCRIPTION:
            export.description = payload[2:].decode("utf-8", "surrogateescape")
    raise ProtocolViolation("a server does not come to an end of what it tells of an export")


def _contexts(export: Listed) -> Generator[bytes | int, bytes, None]:
    name = options.encode_string(export.name, "export name")
    yield options.encode_option(OPT_LIST_META_CONTEXT, options.encode_contexts(name, []))
    while True:
        reply = yield from receive_reply(OPT_LIST_META_CONTEXT)
        payload = present((yield reply.length), "name of a context") if reply.length else b""
        if reply.kind == REP_ACK or reply.is_error:
            return
        if reply.kind != REP_META_CONTEXT:
            raise ProtocolViolation(unexpected_reply(reply, REP_META_CONTEXT))
        if len(export.contexts) >= MAX_OPTION_REPLIES:
            raise ProtocolViolation("a server does not come to an end of contexts")
        export.contexts.append(options.decode_context(payload)[1])
