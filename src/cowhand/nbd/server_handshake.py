"""A server's part of the handshake, without I/O: bytes in, events out.

Source: NetworkBlockDevice ``doc/proto.md``, "Fixed newstyle negotiation", "Option types"; QEMU's server where the protocol leaves it open.

Theory of operation: :meth:`ServerHandshake.start` gives the greeting, :meth:`~ServerHandshake.feed` takes whatever came and returns events. A
client can be in one of five states; what moves it on is in this table, and nothing else does:

    FLAGS ──────── four bytes of flags ──────→ OPTIONS         (unknown flags: ENDED)
    OPTIONS ────── GO, EXPORT_NAME ──────────→ TRANSMISSION    (EXPORT_NAME of no export: ENDED)
    OPTIONS ────── STARTTLS ─────────────────→ UPGRADING       (bytes that came behind it: ENDED)
    UPGRADING ──── :meth:`upgraded` ─────────→ OPTIONS         (all that was negotiated is forgotten)
    OPTIONS ────── ABORT, a broken rule ─────→ ENDED
    OPTIONS ────── anything else ────────────→ OPTIONS         (answered: with what was asked, or with an error)

What is kept of a client is at most one option's payload; longer ones are passed over, or end the conversation. Options are counted.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import NamedTuple, TypeAlias

from cowhand.nbd.constants import (
    CONTEXT_QEMU_BITMAP,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    INIT_MAGIC,
    MAX_CONTEXTS,
    MAX_OPTION_PAYLOAD,
    MAX_OPTIONS,
    MAX_SKIPPED_OPTION,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_MAGIC,
    REP_ACK,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    option_name,
)
from cowhand.nbd.offers import Agreement, Catalogue, Offer, flags_for
from cowhand.nbd.options import encode_reply
from cowhand.nbd.server_options import (
    BadOption,
    decode_contexts,
    decode_info,
    decode_name,
    encode_context,
    encode_infos,
    encode_server,
    encode_text,
)

_HEADER = struct.Struct(">8sII")


class State(Enum):
    """Where a client's handshake is."""

    FLAGS = "flags"
    OPTIONS = "options"
    UPGRADING = "upgrading"
    TRANSMISSION = "transmission"
    ENDED = "ended"


class Tls(Enum):
    """Whether a server encrypts: not at all, or (as QEMU's does) every conversation."""

    OFF = "off"
    REQUIRED = "required"


class Send(NamedTuple):
    """These bytes go to the client."""

    data: bytes


class StartTls(NamedTuple):
    """After what was sent, TLS begins; then :meth:`ServerHandshake.upgraded` is called, and what is fed is what was decrypted."""


class Agreed(NamedTuple):
    """The transmission phase begins; *rest* are bytes of it that came already."""

    agreement: Agreement
    rest: bytes


class Ended(NamedTuple):
    """The conversation is over: the client's wish (*broken* False), or since it broke a rule."""

    reason: str
    broken: bool


Event: TypeAlias = Send | StartTls | Agreed | Ended


class ServerHandshake:
    """One client's handshake; see the module's description. Not thread-safe."""

    def __init__(self, catalogue: Catalogue, tls: Tls = Tls.OFF) -> None:
        self.state = State.FLAGS
        self._catalogue = catalogue
        self._tls = tls
        self._encrypted = False
        self._buffer = bytearray()
        self._skip = 0  #: bytes of an option that is too long that are still to come
        self._options = 0
        self._fixed = self._no_zeroes = False
        self._events: list[Event] = []
        self._forget()

    def _forget(self) -> None:
        self._structured = self._extended = False
        self._contexts: tuple[str, ...] = ()
        self._contexts_of: str | None = None

    def start(self) -> bytes:
        """Return the greeting, which is sent first."""
        return INIT_MAGIC + OPTION_MAGIC + struct.pack(">H", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)

    def upgraded(self) -> None:
        """Say that TLS has begun."""
        assert self.state is State.UPGRADING
        self._encrypted = True
        self._forget()
        self.state = State.OPTIONS

    def feed(self, data: bytes | memoryview) -> list[Event]:
        """Take *data*, and return what follows from it."""
        self._events = []
        if self._skip:
            taken = min(self._skip, len(data))
            self._skip -= taken
            data = data[taken:]
        self._buffer += data
        while self._step():
            pass
        return self._events

    # -- steps

    def _step(self) -> bool:
        """Take one message out of the buffer; False where there is none, or nothing more is taken."""
        if self.state is State.FLAGS:
            return self._take_flags()
        if self.state is not State.OPTIONS or self._skip or len(self._buffer) < _HEADER.size:
            return False
        magic, option, length = _HEADER.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            return self._end(f"it sent 0x{magic.hex()} where an option begins", broken=True)
        if length > MAX_OPTION_PAYLOAD:
            return self._too_long(option, length)
        if len(self._buffer) < _HEADER.size + length:
            return False
        payload = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
        del self._buffer[: _HEADER.size + length]
        self._options += 1
        if self._options > MAX_OPTIONS:
            return self._end(f"it sent more than {MAX_OPTIONS} options", broken=True)
        self._option(option, payload)
        return True

    def _take_flags(self) -> bool:
        if len(self._buffer) < 4:
            return False
        flags = int.from_bytes(self._buffer[:4], "big")
        del self._buffer[:4]
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            return self._end(f"it has unknown flags {flags:#x}", broken=True)
        self._fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        self.state = State.OPTIONS
        return True

    def _too_long(self, option: int, length: int) -> bool:
        if length > MAX_SKIPPED_OPTION or option == OPT_EXPORT_NAME:
            return self._end(f"its option {option} ({option_name(option)}) has {length} bytes", broken=True)
        here = len(self._buffer) - _HEADER.size
        self._skip = max(0, length - here)
        del self._buffer[: _HEADER.size + length]
        self._options += 1
        self._refuse(option, REP_ERR_TOO_BIG, f"an option may have {MAX_OPTION_PAYLOAD} bytes, not {length}")
        return True

    def _end(self, reason: str, *, broken: bool) -> bool:
        self.state = State.ENDED
        self._buffer.clear()
        self._events.append(Ended(reason, broken))
        return False

    # -- replies

    def _reply(self, option: int, kind: int, payload: bytes = b"") -> None:
        self._events.append(Send(encode_reply(option, kind, payload)))

    def _refuse(self, option: int, kind: int, message: str) -> None:
        self._reply(option, kind, encode_text(message))

    # -- options

    def _option(self, option: int, payload: bytes) -> None:
        if not self._fixed and option != OPT_EXPORT_NAME:
            self._end(f"it sent option {option} ({option_name(option)}) without the fixed newstyle", broken=True)
        elif self._tls is Tls.REQUIRED and not self._encrypted and option not in (OPT_STARTTLS, OPT_ABORT):
            if option == OPT_EXPORT_NAME:
                self._end("it asked for an export before TLS, which is required", broken=False)
            else:
                self._refuse(option, REP_ERR_TLS_REQD, f"Option 0x{option:x} not permitted before TLS")
        else:
            try:
                _ACTIONS.get(option, ServerHandshake._unknown)(self, option, payload)
            except BadOption as error:
                self._refuse(option, REP_ERR_INVALID, str(error.args[0]))

    def _unknown(self, option: int, payload: bytes) -> None:
        self._refuse(option, REP_ERR_UNSUP, f"Unsupported option {option} ({option_name(option)})")

    def _nothing_behind(self, option: int, payload: bytes) -> None:
        if payload:
            raise BadOption(f"option '{option_name(option)}' has unexpected length")

    def _abort(self, option: int, payload: bytes) -> None:
        self._reply(option, REP_ACK)
        self._end("it ended the handshake", broken=False)

    def _list(self, option: int, payload: bytes) -> None:
        self._nothing_behind(option, payload)
        for name, description in self._catalogue.names():
            self._reply(option, REP_SERVER, encode_server(name, description))
        self._reply(option, REP_ACK)

    def _starttls(self, option: int, payload: bytes) -> None:
        self._nothing_behind(option, payload)
        if self._encrypted:
            raise BadOption("TLS already enabled")
        if self._tls is Tls.OFF:
            self._refuse(option, REP_ERR_POLICY, "TLS not configured")
            return
        if self._buffer:
            # Whoever sits between could have put them there, to be read as if they had come encrypted.
            self._end("it sent plain text behind its wish for TLS", broken=True)
            return
        self._reply(option, REP_ACK)
        self.state = State.UPGRADING
        self._events.append(StartTls())

    def _structured_reply(self, option: int, payload: bytes) -> None:
        self._nothing_behind(option, payload)
        if self._extended:
            self._refuse(option, REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated")
            return
        if self._structured:
            raise BadOption("structured reply already negotiated")
        self._structured = True
        self._reply(option, REP_ACK)

    def _extended_headers(self, option: int, payload: bytes) -> None:
        self._nothing_behind(option, payload)
        if self._extended:
            raise BadOption("extended headers already negotiated")
        self._structured = self._extended = True
        self._reply(option, REP_ACK)

    # -- exports

    def _find(self, option: int, name: str) -> Offer | None:
        """Return the export *name*, or None after the client was told that there is none."""
        offer = self._catalogue.find(name)
        if offer is None:
            self._refuse(option, REP_ERR_UNKNOWN, f"export '{_printable(name)}' not present")
        return offer

    def _info(self, option: int, payload: bytes) -> None:
        asked = decode_info(payload)
        offer = self._find(option, asked.name)
        if offer is None:
            return
        flags = flags_for(offer, structured=self._structured, extended=self._extended)
        for info in encode_infos(offer, flags, asked.infos):
            self._reply(option, REP_INFO, info)
        self._reply(option, REP_ACK)
        if option == OPT_GO:
            self._agree(offer)

    def _export_name(self, option: int, payload: bytes) -> None:
        try:
            name = decode_name(payload)
        except BadOption as error:
            self._end(f"{error.args[0]} of the export that it asks for", broken=True)
            return
        offer = self._catalogue.find(name)
        if offer is None:
            self._end(f"it asked for export '{_printable(name)}', which there is not", broken=False)
            return
        flags = flags_for(offer, structured=self._structured, extended=self._extended)
        answer = struct.pack(">QH", offer.size, flags) + (b"" if self._no_zeroes else bytes(124))
        self._events.append(Send(answer))
        self._agree(offer)

    def _agree(self, offer: Offer) -> None:
        contexts = self._contexts if self._contexts_of == offer.name else ()
        agreement = Agreement(offer, self._structured, self._extended, contexts)
        self.state = State.TRANSMISSION
        self._events.append(Agreed(agreement, bytes(self._buffer)))
        self._buffer.clear()

    # -- metadata contexts

    def _meta_context(self, option: int, payload: bytes) -> None:
        setting = option == OPT_SET_META_CONTEXT
        if setting:
            self._contexts, self._contexts_of = (), None
        if not self._structured:
            raise BadOption(f"request option '{option_name(option)}' when structured reply is not negotiated")
        asked = decode_contexts(payload)
        offer = self._find(option, asked.name)
        if offer is None:
            return
        if setting:
            chosen = tuple(dict.fromkeys(query for query in asked.queries if query in offer.contexts))[:MAX_CONTEXTS]
            self._contexts, self._contexts_of = chosen, offer.name
        elif asked.queries:
            chosen = tuple(name for name in offer.contexts if any(_asks_for(query, name) for query in asked.queries))
        else:
            chosen = offer.contexts
        for ident, name in enumerate(chosen):
            self._reply(option, REP_META_CONTEXT, encode_context(ident if setting else 0, name))
        self._reply(option, REP_ACK)


_ACTIONS = {
    OPT_EXPORT_NAME: ServerHandshake._export_name,
    OPT_ABORT: ServerHandshake._abort,
    OPT_LIST: ServerHandshake._list,
    OPT_STARTTLS: ServerHandshake._starttls,
    OPT_INFO: ServerHandshake._info,
    OPT_GO: ServerHandshake._info,
    OPT_STRUCTURED_REPLY: ServerHandshake._structured_reply,
    OPT_LIST_META_CONTEXT: ServerHandshake._meta_context,
    OPT_SET_META_CONTEXT: ServerHandshake._meta_context,
    OPT_EXTENDED_HEADERS: ServerHandshake._extended_headers,
}


def _asks_for(query: str, name: str) -> bool:
    """Tell whether *query* of a list means the context *name*: itself, its name space, or the bitmaps all together."""
    namespace = name.partition(":")[0] + ":"
    return query in (name, namespace) or (query == CONTEXT_QEMU_BITMAP and name.startswith(CONTEXT_QEMU_BITMAP))


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)
