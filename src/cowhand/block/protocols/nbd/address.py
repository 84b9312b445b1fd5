"""Reaching an NBD server: sockets of every kind that QEMU names, and the handshake over them with a time limit.

Sources: QEMU's ``SocketAddress`` (``qapi/sockets.json``) for the kinds; connect(2), unix(7), tcp(7), vsock(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cowhand.block.protocols.nbd.tls_socket import TlsSocket
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument, from_os_error
from cowhand.nbd.constants import CONTEXT_ALLOCATION
from cowhand.nbd.errors import ConnectionLost
from cowhand.nbd.handshake import START_TLS, Export, negotiate
from cowhand.nbd.tls import TlsFailed, TlsStream

if TYPE_CHECKING:
    from cowhand.crypto.tls import Credentials

#: Seconds that connecting and the whole handshake may take: nothing that an honest server does there takes long.
HANDSHAKE_SECONDS = 30.0
#: A peer whose machine is gone is noticed after about so many seconds (keepalive probes).
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
#: What comes of a conversation.
_Answer = TypeVar("_Answer")
_UNIX_PATH = 107  #: bytes, of sockaddr_un


class Server(NamedTuple):
    """Where a server is. ``kind`` is "unix" (path), "inet" (host, port), "vsock" (cid in host, port) or "fd" (a descriptor's number in path)."""

    kind: str
    path: str = ""
    host: str = ""
    port: str = ""
    family: int = socket.AF_UNSPEC
    abstract: bool = False

    def __str__(self) -> str:
        """Name it for messages, as QEMU does."""
        return self.path if self.kind in ("unix", "fd") else f"{self.host}:{self.port}"


class TlsClient(NamedTuple):
    """How a client encrypts: what it proves itself with, and whom the server's certificate has to name (None: the host that was connected)."""

    credentials: Credentials
    hostname: str | None = None


class Dial:
    """One attempt to reach a server, with *tls* encrypted. :meth:`abort` ends it from another thread."""

    def __init__(self, server: Server, seconds: float, tls: TlsClient | None = None) -> None:
        self._server = server
        self._tls = tls
        self._deadline = clock.monotonic() + min(seconds, HANDSHAKE_SECONDS)
        self._socket: socket.socket | None = None
        self._aborted = False

    def abort(self) -> None:
        """Make :meth:`run` end soon, with an error."""
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def run(
        self, export: str, context: str = CONTEXT_ALLOCATION, *, structured: bool = True
    ) -> tuple[socket.socket | TlsSocket, Export]:
        """Connect and agree. Raises ConnectionLost, NegotiationRefused, ProtocolViolation, InvalidArgument; nothing stays open then."""
        sock = self._connect()
        self._socket = sock
        try:
            connected, agreed = self._converse(
                sock, negotiate(export, context, structured=structured, tls=self._tls is not None)
            )
        except BaseException:
            sock.close()
            raise
        self._socket = None  # it is the caller's now, and not for abort()
        return connected, agreed

    def ask(self, conversation: Generator[bytes | int, bytes, _Answer]) -> _Answer:
        """Connect, hold *conversation* (see :mod:`cowhand.nbd.handshake`) and hang up; return what came of it. Raises as :meth:`run` does."""
        sock = self._connect()
        self._socket = sock
        try:
            return self._converse(sock, conversation)[1]
        finally:
            sock.close()

    # -- connecting

    def _connect(self) -> socket.socket:
        server = self._server
        if server.kind == "fd":
            return _adopted(server.path)
        if server.kind == "unix":
            path = os.fsencode(server.path)
            if len(path) > _UNIX_PATH:
                raise InvalidArgument(
                    f"UNIX socket path '{server.path}' is too long",
                    qemu=f"UNIX socket path '{server.path}' is too long\nPath must be less than {_UNIX_PATH + 1} bytes",
                )
            return self._try(socket.AF_UNIX, socket.SOCK_STREAM, 0, b"\0" + path if server.abstract else path)
        if server.kind == "vsock":
            if not hasattr(socket, "AF_VSOCK"):
                raise InvalidArgument("this system has no vsock sockets")
            return self._try(socket.AF_VSOCK, socket.SOCK_STREAM, 0, (int(server.host), int(server.port)))
        failure: ConnectionLost | None = None
        found = self._resolve()
        for index, (family, kind, protocol, _, address) in enumerate(found):
            try:
                return self._try(family, kind, protocol, address, share=len(found) - index)
            except ConnectionLost as error:
                failure = failure or error
        assert failure is not None  # a resolver that finds nothing raises
        raise failure

    def _resolve(self) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, object]]:
        server = self._server
        try:
            found = socket.getaddrinfo(server.host, server.port, server.family, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConnectionLost(
                f"address resolution failed for {server}: {reason}", errno=errno.EHOSTUNREACH, path=str(server)
            ) from error
        return list(found)

    def _try(self, family: int, kind: int, protocol: int, address: object, share: int = 1) -> socket.socket:
        """Connect to *address*, in an equal part of the time that is left where *share* addresses are to be tried."""
        sock = socket.socket(family, kind, protocol)
        self._socket = sock
        try:
            sock.settimeout(self._left() / share)
            sock.connect(address)  # type: ignore[arg-type]
        except (OSError, ValueError, OverflowError) as error:
            sock.close()
            number = getattr(error, "errno", None) or (
                errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EINVAL
            )
            what = f"Failed to connect to '{self._server}': {os.strerror(number)}"
            raise ConnectionLost(what, errno=number, path=str(self._server)) from error
        except BaseException:
            sock.close()
            raise
        return sock

    def _left(self) -> float:
        left = self._deadline - clock.monotonic()
        if self._aborted or left <= 0:
            raise ConnectionLost(
                "the server does not come to an end of the handshake in time",
                qemu="Connection attempt cancelled by timeout",
                errno=errno.ETIMEDOUT,
                path=str(self._server),
            )
        return left

    # -- the handshake

    def _converse(
        self, sock: socket.socket, conversation: Generator[bytes | int, bytes, _Answer]
    ) -> tuple[socket.socket | TlsSocket, _Answer]:
        """Hold *conversation* over *sock*, as long as the time limit allows; return what goes on being used, and what came of it."""
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _tune(sock)
        end_point: socket.socket | TlsSocket = sock
        answer: bytes | None = None
        while True:
            try:
                wanted = next(conversation) if answer is None else conversation.send(answer)
            except StopIteration as end:
                agreed: _Answer = end.value
                return end_point, agreed
            answer = None
            try:
                if isinstance(wanted, bytes):
                    self._send(end_point, wanted)
                elif wanted == START_TLS:
                    end_point = self._encrypt(sock)
                    answer = b""
                else:
                    answer = self._receive(end_point, wanted)
            except TimeoutError:
                self._deadline = 0.0
                self._left()

    def _encrypt(self, sock: socket.socket) -> TlsSocket:
        """Begin to encrypt. Raises TlsFailed, InvalidArgument."""
        assert self._tls is not None
        context = self._tls.credentials.client()
        hostname = self._tls.hostname or (self._server.host if self._server.kind == "inet" else None)
        if context.check_hostname and not hostname:
            raise InvalidArgument(
                "the server's certificate cannot be verified without a name that it must have",
                qemu="No hostname for certificate validation",
                hint="Give it with tls-hostname.",
            )
        sock.settimeout(self._left())
        encrypted = TlsSocket(sock, TlsStream(context, server=False, hostname=hostname))
        try:
            encrypted.handshake()
        except TlsFailed as error:
            raise error.within(f"NBD server {self._server}") from None
        except TimeoutError:
            raise
        except OSError as error:
            raise ConnectionLost(
                f"the connection was lost during the TLS handshake: {error.strerror}", path=str(self._server)
            ) from error
        return encrypted

    def _send(self, sock: socket.socket | TlsSocket, data: bytes) -> None:
        sock.settimeout(self._left())
        try:
            sock.sendall(data)
        except TimeoutError:
            raise
        except OSError as error:
            told = from_os_error(error, str(self._server), doing="sending an option")
            qemu = f"Failed to send option request: Unable to write to socket: {told.qemu_message}"
            raise ConnectionLost(told.message, qemu=qemu, errno=told.errno, path=told.path) from error

    def _receive(self, sock: socket.socket | TlsSocket, wanted: int) -> bytes:
        """Return *wanted* bytes, or none when the server hangs up before."""
        data = b""
        while len(data) < wanted:
            sock.settimeout(self._left())
            try:
                piece = sock.recv(wanted - len(data))
            except ConnectionError:
                return b""  # the conversation knows what was missing
            if not piece:
                return b""
            data += piece
        return data


def _adopted(number: str) -> socket.socket:
    try:
        return socket.socket(fileno=os.dup(int(number)))
    except (ValueError, OverflowError):
        raise InvalidArgument(f"No file descriptor named '{number}' found") from None
    except OSError as error:
        raise InvalidArgument(f"File descriptor '{number}' is not a socket: {os.strerror(error.errno or 0)}") from None


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
