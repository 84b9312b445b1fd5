"""What a connection sends and receives by: a socket, as it is or with TLS around it."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from cowhand.core.buffers import Buffer
from cowhand.nbd.tls import CHUNK, TlsFailed, TlsStream

#: The kernel takes at most so many buffers in one call (IOV_MAX).
_MAX_BUFFERS = 1024


class Channel(Protocol):
    """Sends from one thread at a time and receives from another. All raise OSError where the connection is lost."""

    def receive_into(self, view: memoryview) -> int:
        """Receive some bytes to the beginning of *view*; 0 at the end."""
        ...

    def send(self, data: Buffer) -> None:
        """Send all of *data*."""
        ...

    def send_raw(self, data: Buffer) -> None:
        """Send all of *data*, which is encrypted already where the connection is."""
        ...

    def send_buffers(self, buffers: Sequence[Buffer]) -> None:
        """Send *buffers*, one behind the other."""
        ...

    def stop_receiving(self) -> None:
        """Let :meth:`receive_into` come to the end, after what has come already."""
        ...

    def abort(self) -> None:
        """End whatever is going on."""
        ...

    def close(self) -> None:
        """Close the socket, when no other thread uses it."""
        ...


class SocketChannel:
    """The channel of a plain connection."""

    receive_into: Callable[[memoryview], int]
    send: Callable[[Buffer], None]
    send_raw: Callable[[Buffer], None]

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(None)
        self.receive_into = sock.recv_into
        self.send = self.send_raw = sock.sendall

    def send_buffers(self, buffers: Sequence[Buffer]) -> None:
        views = [memoryview(buffer) for buffer in buffers]
        total = sum(map(len, views))
        while total:
            count = self._socket.sendmsg(views[:_MAX_BUFFERS])
            total -= count
            while count:
                first = views[0]
                if count < len(first):
                    views[0] = first[count:]
                    break
                count -= len(first)
                del views[0]

    def stop_receiving(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class TlsChannel(SocketChannel):
    """The channel of a connection whose TLS handshake is done."""

    def __init__(self, sock: socket.socket, stream: TlsStream) -> None:
        super().__init__(sock)
        self._stream = stream
        self._received = memoryview(bytearray(128 << 10))
        self._sending = threading.Lock()
        self.receive_into = self._receive_into
        self.send = self._send

    def _receive_into(self, view: memoryview) -> int:
        stream, received = self._stream, self._received
        while True:
            try:
                count = stream.decrypt_into(view)
            except TlsFailed as error:
                raise ConnectionAbortedError(errno.EIO, error.message) from error
            if count is not None:
                return count
            stream.feed(received[: self._socket.recv_into(received)])
            if answer := stream.outgoing():  # new keys, an alert
                with self._sending:
                    self._socket.sendall(answer)

    def _send(self, data: Buffer) -> None:
        view = memoryview(data)
        with self._sending:
            for begin in range(0, len(view), CHUNK):
                self._socket.sendall(self._stream.encrypt(view[begin : begin + CHUNK]))

    def send_buffers(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self._send(buffer)
