"""A socket with TLS around it, for a connection: as much of a socket's interface as that uses."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence
from typing import Any

from cowhand.nbd.tls import CHUNK, TlsFailed, TlsStream

_RECEIVED = 128 << 10


class TlsSocket:
    """A connected socket whose TLS handshake :meth:`handshake` does; then one thread may send while another receives.

    What :meth:`sendmsg` has taken may wait here in encrypted form: :attr:`unsent` tells, and a call without buffers goes on with it.
    """

    def __init__(self, sock: socket.socket, stream: TlsStream) -> None:
        self._socket = sock
        self._stream = stream
        self._received = memoryview(bytearray(_RECEIVED))
        self._waiting = b""
        self._sending = threading.Lock()
        self.settimeout = sock.settimeout
        self.setsockopt = sock.setsockopt
        self.shutdown = sock.shutdown
        self.close = sock.close
        self.fileno = sock.fileno
        self.family = sock.family

    def handshake(self) -> None:
        """Agree with the server on keys, and look at what it proves itself with. Raises TlsFailed, OSError."""
        stream = self._stream
        while True:
            try:
                done = stream.handshake()
            finally:
                if answer := stream.outgoing():  # an alert too
                    self._socket.sendall(answer)
            if done:
                return
            count = self._socket.recv_into(self._received)
            if not count:
                raise TlsFailed(
                    "the server hung up during the TLS handshake",
                    qemu="TLS handshake failed: The TLS connection was non-properly terminated.",
                )
            stream.feed(self._received[:count])

    # -- receiving

    def recv_into(self, view: memoryview) -> int:
        """Receive as a socket does."""
        stream = self._stream
        while True:
            try:
                count = stream.decrypt_into(view)
            except TlsFailed as error:
                raise ConnectionAbortedError(errno.EIO, error.message) from error
            if count is not None:
                return count
            stream.feed(self._received[: self._socket.recv_into(self._received)])
            if answer := stream.outgoing():  # new keys
                with self._sending:
                    self._waiting += answer

    def recvmsg_into(self, views: Sequence[memoryview]) -> tuple[int, None]:
        """Receive into the first of *views*."""
        return self.recv_into(views[0]), None

    def recv(self, count: int) -> bytes:
        """Receive at most *count* bytes."""
        data = bytearray(count)
        with memoryview(data) as view:
            got = self.recv_into(view)
        return bytes(data[:got])

    # -- sending

    @property
    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._waiting)

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Any = (), flags: int = 0) -> int:
        """Take some of *buffers* and send as much as the kernel takes; return how much was taken. Raises BlockingIOError where nothing was."""
        with self._sending:
            while self._waiting:
                self._waiting = self._waiting[self._socket.send(self._waiting, flags) :]
            for view in buffers:
                if len(view):
                    piece = view[:CHUNK]
                    self._waiting = self._stream.encrypt(piece)
                    try:
                        self._waiting = self._waiting[self._socket.send(self._waiting, flags) :]
                    except BlockingIOError:
                        pass
                    return len(piece)
            return 0

    def send(self, data: bytes, flags: int = 0) -> int:
        """Send as a socket does."""
        return self.sendmsg((memoryview(data),), (), flags)

    def sendall(self, data: bytes) -> None:
        """Send all of *data*."""
        view = memoryview(data)
        while len(view) or self.unsent:
            view = view[self.sendmsg((view,)) :]
