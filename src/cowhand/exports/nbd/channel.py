"""What a connection sends and receives by: a socket, as it is."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Protocol

from cowhand.core.buffers import Buffer

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

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(None)
        self.receive_into = sock.recv_into
        self.send = sock.sendall

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
