"""The sockets of monitors: one client at a time each, served by a thread (QEMU: a chardev with ``server=on``)."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from cowhand.daemon.monitor import Monitor

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon


class MonitorSocket:
    """Listens on *sock*; when a client hangs up the next one is served."""

    def __init__(self, daemon: Daemon, sock: socket.socket, *, pretty: bool = False) -> None:
        self._daemon = daemon
        self._sock = sock
        self._pretty = pretty
        self._client: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Serve clients from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and hang up when the client has got what it was answered."""
        self._closed = True
        for sock, how in ((self._client, socket.SHUT_RD), (self._sock, socket.SHUT_RDWR)):
            if sock is not None:
                try:
                    sock.shutdown(how)
                except OSError:
                    pass  # it is closed already
        self._thread.join(10)
        self._sock.close()

    def _run(self) -> None:
        while not self._closed:
            try:
                client, _ = self._sock.accept()
            except OSError:
                return
            self._client = client
            with client:
                self._serve(client)
            self._client = None

    def _serve(self, client: socket.socket) -> None:
        def hang_up() -> None:
            try:
                client.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client did so before

        monitor = Monitor(self._daemon, client.sendall, hang_up, pretty=self._pretty)
        monitor.start()
        try:
            while not self._daemon.quitting:
                data = client.recv(1 << 16)
                if not data:
                    return
                monitor.receive(data)
        except OSError:
            return
        finally:
            monitor.close()


class StdioMonitor:
    """A monitor on standard input and output (``--chardev stdio``)."""

    def __init__(self, daemon: Daemon, *, pretty: bool = False) -> None:
        self._daemon = daemon
        self._pretty = pretty
        self._thread = threading.Thread(target=self._run, name="monitor-stdio", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def close(self) -> None:
        """Nothing to do: the streams are the process's."""

    def _run(self) -> None:
        def send(data: bytes) -> None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

        monitor = Monitor(self._daemon, send, lambda: None, pretty=self._pretty)
        monitor.start()
        while not self._daemon.quitting:
            data = os.read(0, 1 << 16)
            if not data:
                break
            monitor.receive(data)
        monitor.close()
