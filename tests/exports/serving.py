"""A server over a disk for tests, and a client that says just what a test wants."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from cowhand.block.disk import Disk
from cowhand.exports.nbd import sockets
from cowhand.exports.nbd.connection import Connection
from cowhand.exports.nbd.export import NbdExport
from cowhand.exports.nbd.limits import Limits
from cowhand.exports.nbd.server import NbdServer, Observer
from cowhand.nbd import constants as nbd
from cowhand.nbd.options import encode_contexts, encode_go, encode_option
from cowhand.nbd.requests import encode_request
from tests.tools.patience import PATIENCE


class Seen(Observer):
    """What a server told of its clients."""

    def __init__(self) -> None:
        self.began: list[Connection] = []
        self.left: list[Connection] = []
        self.refused: list[str] = []

    def client_began(self, connection: Connection) -> None:
        self.began.append(connection)

    def client_left(self, connection: Connection, remaining: int) -> None:
        self.left.append(connection)

    def client_refused(self, name: str, reason: str) -> None:
        self.refused.append(reason)


class Running:
    """A server that runs; ``uri`` is its only export."""

    def __init__(self, server: NbdServer, path: Path, seen: Seen) -> None:
        self.server = server
        self.path = path
        self.seen = seen

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"


@contextmanager
def served(disk: Disk, path: Path, *, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    """Serve *disk* on a socket at *path* until the block is left; no client may have met a mistake of the server's."""
    seen = Seen()
    options.setdefault("writable", not disk.read_only)
    server = NbdServer([NbdExport(disk, **options)], limits=limits, observer=seen)
    server.listen(sockets.listen_unix(str(path)))
    server.start()
    try:
        yield Running(server, path, seen)
    finally:
        server.stop(grace=5)
        path.unlink()
    assert not [connection.reason for connection in seen.left if "internal" in connection.reason]


class Raw:
    """A client, option by option and byte by byte."""

    def __init__(self, path: Path, *, flags: int = 3) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))  # waits while the backlog is full: with a time limit it would not
        self.sock.settimeout(PATIENCE)
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.sock.sendall(flags.to_bytes(4, "big"))
        self.extended = False

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError(data)
            data += piece
        return data

    def option(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return (kind, payload) of its replies up to the last one."""
        self.sock.sendall(encode_option(option, payload))
        replies = []
        while True:
            magic, told, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, told) == (nbd.OPTION_REPLY_MAGIC, option)
            replies.append((kind, self.receive(length)))
            if kind == nbd.REP_ACK or kind & nbd.REP_ERROR:
                return replies

    def go(
        self, *, structured: bool = True, extended: bool = False, contexts: tuple[str, ...] = (), name: bytes = b""
    ) -> Raw:
        """Do the rest of the handshake."""
        if extended:
            assert self.option(nbd.OPT_EXTENDED_HEADERS) == [(nbd.REP_ACK, b"")]
            self.extended = True
        elif structured:
            assert self.option(nbd.OPT_STRUCTURED_REPLY) == [(nbd.REP_ACK, b"")]
        if contexts:
            assert len(self.option(nbd.OPT_SET_META_CONTEXT, encode_contexts(name, contexts))) == len(contexts) + 1
        assert self.option(nbd.OPT_GO, encode_go(name))[-1] == (nbd.REP_ACK, b"")
        return self

    def send(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, payload: bytes = b""
    ) -> None:
        if self.extended:
            head = struct.pack(">IHHQQQ", nbd.EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
        else:
            head = encode_request(command, flags, cookie, offset, length)
        self.sock.sendall(head + payload)

    def reply(self) -> tuple[int, int, bytes]:
        """Return (cookie, error, data) of a simple reply without data, or (cookie, type, payload) of a chunk."""
        magic = int.from_bytes(self.receive(4), "big")
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            return cookie, error, b""
        if magic == nbd.EXTENDED_REPLY_MAGIC:
            _, kind, cookie, _, length = struct.unpack(">HHQQQ", self.receive(28))
        else:
            assert magic == nbd.STRUCTURED_REPLY_MAGIC, hex(magic)
            _, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        return cookie, kind, self.receive(length)

    def error(self) -> int:
        """Return the error on the wire that the next reply tells."""
        _, kind, payload = self.reply()
        return int.from_bytes(payload[:4], "big") if kind & nbd.REPLY_TYPE_ERROR_BIT else kind

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
