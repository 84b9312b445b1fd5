"""A client's part of the handshake, without I/O.

Source: NetworkBlockDevice ``doc/proto.md``, "Protocol phases" and "Baseline": oldstyle, newstyle and fixed newstyle.

Theory of operation: :func:`negotiate` is a generator. What it yields is either bytes to send, or the number of bytes that it wants next and is
sent into it, all of them or none (an empty answer says that the server hung up). It returns an :class:`Export`, or raises
ProtocolViolation, NegotiationRefused or ConnectionLost. Every number that a server says is checked against a limit before
anything is made of it, and the number of its replies is bounded.

    magic ─ "IHAVEOPT" ─ flags ─ STRUCTURED_REPLY ─ SET_META_CONTEXT ─ GO ─────────── transmission
          │                    └ (not fixed) EXPORT_NAME ──────────────┘ (GO is not known: EXPORT_NAME)
          └ oldstyle magic: size, flags
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator
from typing import NamedTuple, TypeAlias

from cowhand.core.errors import InvalidArgument
from cowhand.core.units import MAX_SIZE
from cowhand.nbd import options
from cowhand.nbd.constants import (
    CONTEXT_ALLOCATION,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INIT_MAGIC,
    MAX_OPTION_REPLIES,
    OLDSTYLE_MAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_MAGIC,
    REP_ACK,
    REP_ERR_BLOCK_SIZE_REQD,
    REP_ERR_INVALID,
    REP_ERR_PLATFORM,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    option_name,
    reply_name,
)
from cowhand.nbd.errors import ConnectionLost, NegotiationRefused, ProtocolViolation
from cowhand.nbd.options import OptionReply

#: Yields bytes to send, or how many bytes are wanted; gets these.
Conversation: TypeAlias = "Generator[bytes | int, bytes, Export]"
_Inner: TypeAlias = "Generator[bytes | int, bytes, OptionReply]"
#: Yielded where TLS is to begin: it is done, and empty bytes are sent back.
START_TLS = 0


class Export(NamedTuple):
    """What both sides agreed on. Block sizes are 0 where the server said nothing; ``context`` is (name, id) of the chosen metadata."""

    size: int
    flags: int
    minimum: int = 0
    preferred: int = 0
    maximum: int = 0
    structured: bool = False
    context: tuple[str, int] | None = None


class Greeting(NamedTuple):
    """What a server that was reached can: ``old`` speaks the oldstyle, ``fixed`` knows options."""

    old: bool = False
    fixed: bool = False
    no_zeroes: bool = False


def negotiate(
    name: str, context: str = CONTEXT_ALLOCATION, *, structured: bool = True, tls: bool = False
) -> Conversation:
    """Ask for the export *name*, structured replies and the metadata *context*, all of it encrypted with *tls*; see the module's description.

    A server that knows no options, structured replies or contexts is taken as it is; so is every one without *structured*.
    """
    wanted = options.encode_string(name, "export name")
    options.encode_string(context, "x-dirty-bitmap query")
    greeting = yield from greet(tls=tls)
    if greeting.old:
        return (yield from _oldstyle(name))
    wants, structured = structured, False
    chosen: tuple[str, int] | None = None
    if greeting.fixed:
        structured = wants and (yield from ask_structured())
        if structured:
            chosen = yield from _context(wanted, context)
        export = yield from _go(wanted)
        if export is not None:
            return export._replace(structured=structured, context=chosen)
    return (yield from _export_name(name, wanted, greeting.no_zeroes))._replace(structured=structured, context=chosen)


def greet(*, tls: bool = False) -> Generator[bytes | int, bytes, Greeting]:
    """Receive a server's greeting and answer it; with *tls* begin to encrypt, or raise NegotiationRefused."""
    magic = yield 8
    present(magic, "initial magic")
    if magic != INIT_MAGIC:
        raise ProtocolViolation(f"Bad initial magic received: 0x{magic.hex()}")
    magic = yield 8
    present(magic, "server magic")
    if magic == b"\0" + OLDSTYLE_MAGIC:
        if tls:
            raise NegotiationRefused("Server does not support STARTTLS")
        return Greeting(old=True)
    if magic != OPTION_MAGIC:
        raise ProtocolViolation(f"Bad server magic received: 0x{magic.hex()}")
    flags = int.from_bytes(present((yield 2), "server flags"), "big")
    fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
    no_zeroes = bool(flags & FLAG_NO_ZEROES)
    yield struct.pack(">I", (FLAG_FIXED_NEWSTYLE if fixed else 0) | (FLAG_NO_ZEROES if no_zeroes else 0))
    if tls:
        if not fixed:
            raise NegotiationRefused("Server does not support STARTTLS")
        yield from _start_tls()
    return Greeting(fixed=fixed, no_zeroes=no_zeroes)


def _start_tls() -> Generator[bytes | int, bytes, None]:
    yield options.encode_option(OPT_STARTTLS)
    reply = yield from receive_reply(OPT_STARTTLS)
    if reply.is_error:
        yield from refuse(reply)
        yield from abort()
        raise NegotiationRefused(
            "Server does not support STARTTLS", hint="Leave TLS out, if what is read and written may be seen by others."
        )
    if reply.kind != REP_ACK or reply.length:
        yield from abort()
        raise ProtocolViolation("Server answered STARTTLS by something else than an acknowledgement")
    yield START_TLS


def present(data: bytes, what: str) -> bytes:
    """Return *data*, which is *what* was to be read, unless the server hung up before."""
    if not data:
        raise ConnectionLost(
            f"the server hung up before it sent its {what}",
            qemu=f"Failed to read {what}: Unexpected end-of-file before all bytes were read",
            errno=errno.EIO,
        )
    return data


def _oldstyle(name: str) -> Conversation:
    if name:
        raise NegotiationRefused("Server does not support non-empty export names")
    size, flags = struct.unpack(">QI", present((yield 12), "export length"))
    if flags & ~0xFFFF:
        raise ProtocolViolation(f"Unexpected export flags {flags:x}")
    present((yield 124), "reserved block")
    return _checked(Export(size, flags))


def _export_name(name: str, wanted: bytes, no_zeroes: bool) -> Conversation:
    yield options.encode_option(OPT_EXPORT_NAME, wanted)
    answer = yield 10
    if not answer:
        # The only refusal that this option knows.
        raise NegotiationRefused(
            f"No export with name '{options.decode_string(wanted)}' available",
            qemu="Failed to read export length: Unexpected end-of-file before all bytes were read",
        )
    size, flags = struct.unpack(">QH", answer)
    if not no_zeroes:
        present((yield 124), "reserved block")
    return _checked(Export(size, flags))


def _checked(export: Export) -> Export:
    if export.size > MAX_SIZE:
        raise ProtocolViolation(
            f"the export claims to have {export.size} bytes, which no disk has",
            qemu="Could not refresh total sector count: File too large",
            errno=errno.EFBIG,
        )
    if export.minimum and export.size % export.minimum:
        raise ProtocolViolation(f"export size {export.size} is not multiple of minimum block size {export.minimum}")
    if not export.flags & FLAG_HAS_FLAGS:
        return export._replace(flags=0)
    return export


# -- options


def ask_structured() -> Generator[bytes | int, bytes, bool]:
    yield options.encode_option(OPT_STRUCTURED_REPLY)
    reply = yield from receive_reply(OPT_STRUCTURED_REPLY)
    if reply.is_error:
        yield from refuse(reply, tolerate=True)
        return False
    if reply.kind != REP_ACK:
        yield from abort()
        raise ProtocolViolation(
            f"Server answered option {OPT_STRUCTURED_REPLY} ({option_name(OPT_STRUCTURED_REPLY)}) with unexpected "
            f"reply {reply.kind:x} ({reply_name(reply.kind)})"
        )
    if reply.length:
        yield from abort()
        raise ProtocolViolation(
            f"Option {OPT_STRUCTURED_REPLY} ('{option_name(OPT_STRUCTURED_REPLY)}') response length is {reply.length} (it should be zero)"
        )
    return True


def _context(wanted: bytes, context: str) -> Generator[bytes | int, bytes, tuple[str, int] | None]:
    yield options.encode_option(OPT_SET_META_CONTEXT, options.encode_contexts(wanted, [context]))
    chosen: tuple[str, int] | None = None
    while True:
        reply = yield from receive_reply(OPT_SET_META_CONTEXT)
        if reply.is_error:
            yield from refuse(reply, tolerate=True)
            return None
        if reply.kind == REP_ACK:
            if reply.length:
                yield from abort()
                raise ProtocolViolation("Unexpected length to ACK response")
            return chosen
        if reply.kind != REP_META_CONTEXT:
            yield from abort()
            raise ProtocolViolation(unexpected_reply(reply, REP_META_CONTEXT))
        payload = (yield reply.length) if reply.length else b""
        ident, name = options.decode_context(payload)
        if chosen is not None:
            yield from abort()
            raise ProtocolViolation("Server answered with more than one context")
        if name != context:
            yield from abort()
            told = options.decode_string(name.encode())
            raise ProtocolViolation(
                f"Failed to negotiate meta context '{context}', server answered with different context '{told}'"
            )
        chosen = (name, ident)


def _go(wanted: bytes) -> Generator[bytes | int, bytes, Export | None]:
    """Ask for the export; None when the server does not know the option."""
    yield options.encode_option(OPT_GO, options.encode_go(wanted))
    found: tuple[int, int] | None = None
    sizes = (0, 0, 0)
    for _ in range(MAX_OPTION_REPLIES):
        reply = yield from receive_reply(OPT_GO)
        if reply.is_error:
            yield from refuse(reply)
            return None
        if reply.kind == REP_ACK:
            if reply.length:
                raise ProtocolViolation("server sent invalid NBD_REP_ACK")
            if found is None:
                raise ProtocolViolation("broken server omitted NBD_INFO_EXPORT")
            return _checked(Export(*found, *sizes))
        if reply.kind != REP_INFO:
            raise ProtocolViolation(unexpected_reply(reply, REP_INFO))
        if reply.length < 2:
            yield from abort()
            raise ProtocolViolation(f"NBD_REP_INFO length {reply.length} is too short")
        payload = present((yield reply.length), "info payload")
        kind = int.from_bytes(payload[:2], "big")
        if kind == INFO_EXPORT:
            found = options.decode_export_info(payload[2:])
        elif kind == INFO_BLOCK_SIZE:
            sizes = options.decode_block_sizes(payload[2:])
    raise ProtocolViolation("the server does not come to an end of telling about the export")


def receive_reply(option: int) -> _Inner:
    data = present((yield options.REPLY_HEADER), f"reply to option {option} ({option_name(option)})")
    return options.decode_reply(data, option)


def abort() -> Generator[bytes | int, bytes, None]:
    """Tell the server that this leads to nothing; its answer is not waited for."""
    yield options.encode_option(OPT_ABORT)


def unexpected_reply(reply: OptionReply, expected: int) -> str:
    return (
        f"Unexpected reply type {reply.kind} ({reply_name(reply.kind)}), expected {expected} ({reply_name(expected)})"
    )


_REFUSALS = {
    REP_ERR_POLICY: "Denied by server for option {}",
    REP_ERR_INVALID: "Invalid parameters for option {}",
    REP_ERR_PLATFORM: "Server lacks support for option {}",
    REP_ERR_TLS_REQD: "TLS negotiation required before option {}",
    REP_ERR_UNKNOWN: "Requested export not available",
    REP_ERR_SHUTDOWN: "Server shutting down before option {}",
    REP_ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for option {}",
}


def refuse(reply: OptionReply, *, tolerate: bool = False) -> Generator[bytes | int, bytes, None]:
    """Read why an option was refused, and raise; return where it only is not known, or, with *tolerate*, where nothing depends on it."""
    said = options.decode_string((yield reply.length)) if reply.length else ""
    if reply.kind == REP_ERR_UNSUP or (tolerate and reply.kind != REP_ERR_TLS_REQD):
        return
    yield from abort()
    text = _REFUSALS.get(reply.kind, "Unknown error code when asking for option {}")
    text = text.format(f"{reply.option} ({option_name(reply.option)})")
    lines = [text]
    if reply.kind == REP_ERR_TLS_REQD:
        lines.append("Did you forget a valid tls-creds?")
    if said:
        lines.append(f"server reported: {said}")
    hint = None
    if reply.kind == REP_ERR_TLS_REQD:
        hint = "The server speaks TLS only, which is not supported here."
    elif reply.kind == REP_ERR_UNKNOWN:
        hint = "Name the export: nbd://HOST/EXPORT, or the option export=NAME."
    raise NegotiationRefused(f"{text}: {said}" if said else text, qemu="\n".join(lines), hint=hint)


def require_context(export: Export, context: str) -> None:
    """Raise InvalidArgument unless *context*, which the user asked for by name, was agreed on."""
    if export.context is None:
        # QEMU's tools lose the message here.
        raise InvalidArgument(
            f"requested x-dirty-bitmap {context} not found", qemu="Could not open image: Invalid argument"
        )
