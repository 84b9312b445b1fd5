"""Payloads of a client's options taken apart, and those of a server's replies put together. No I/O.

Source: NetworkBlockDevice ``doc/proto.md``, "Option types".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cowhand.nbd.constants import (
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    MAX_STRING,
)
from cowhand.nbd.offers import Offer


class BadOption(Exception):
    """A client's option whose payload says nothing; ``args[0]`` is told to the client."""


class InfoRequest(NamedTuple):
    """What INFO and GO ask: an export, and what is to be told of it."""

    name: str
    infos: tuple[int, ...]


class ContextRequest(NamedTuple):
    """What LIST_META_CONTEXT and SET_META_CONTEXT ask."""

    name: str
    queries: tuple[str, ...]


def decode_name(data: bytes) -> str:
    """Return the name of an export. Raises BadOption."""
    if len(data) > MAX_STRING:
        raise BadOption("the name is longer than 4096 bytes")
    return data.decode("utf-8", "surrogateescape")


class _Reader:
    """Numbers and strings of a payload, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            raise BadOption("the option ends before what it promises")
        self._at += count
        return piece

    def string(self) -> str:
        length = self.number(4)
        if length > MAX_STRING:
            raise BadOption("a string is longer than 4096 bytes")
        return self.take(length).decode("utf-8", "surrogateescape")

    def end(self) -> None:
        if self._at != len(self._data):
            raise BadOption("there is more in the option than it says")


def decode_info(data: bytes) -> InfoRequest:
    """Return what INFO or GO asks. Raises BadOption."""
    reader = _Reader(data)
    name = reader.string()
    count = reader.number(2)
    infos = struct.unpack(f">{count}H", reader.take(2 * count))
    reader.end()
    return InfoRequest(name, infos)


def decode_contexts(data: bytes) -> ContextRequest:
    """Return what LIST_META_CONTEXT or SET_META_CONTEXT asks. Raises BadOption."""
    reader = _Reader(data)
    name = reader.string()
    count = reader.number(4)
    if count > len(data) // 4:
        raise BadOption("the option ends before what it promises")
    queries = tuple([reader.string() for _ in range(count)])
    reader.end()
    return ContextRequest(name, queries)


def encode_infos(offer: Offer, flags: int, asked: tuple[int, ...]) -> list[bytes]:
    """Return the payloads of the INFO replies about *offer*; block sizes are told even to those who did not ask."""
    out = [struct.pack(">HQH", INFO_EXPORT, offer.size, flags)]
    if INFO_NAME in asked:
        out.append(struct.pack(">H", INFO_NAME) + offer.name.encode("utf-8", "surrogateescape"))
    if INFO_DESCRIPTION in asked and offer.description:
        out.append(struct.pack(">H", INFO_DESCRIPTION) + encode_text(offer.description))
    # A client that does not ask need not keep to a minimum: there is none where offers are made of disks.
    out.append(struct.pack(">HIII", INFO_BLOCK_SIZE, offer.minimum, offer.preferred, offer.maximum))
    return out


def encode_text(text: str) -> bytes:
    """Return *text* as a string of the protocol, cut where it would be too long."""
    return text.encode("utf-8", "surrogateescape")[:MAX_STRING]


def encode_server(name: str, description: str) -> bytes:
    """Return the payload of a reply to LIST."""
    data = name.encode("utf-8", "surrogateescape")
    return struct.pack(">I", len(data)) + data + encode_text(description)


def encode_context(ident: int, name: str) -> bytes:
    """Return the payload of a META_CONTEXT reply."""
    return struct.pack(">I", ident) + encode_text(name)
