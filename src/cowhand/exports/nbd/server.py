"""The NBD server: listening sockets, handshakes of all clients in one thread, and a thread for each client that has an export.

Source: NetworkBlockDevice ``doc/proto.md``. Theory of operation: until a client has agreed on an export it costs a
socket and a few kilobytes: its handshake is a state machine without I/O (:mod:`cowhand.nbd.server_handshake`) that the
selector's thread feeds. Handshakes have a deadline, and a number; where there are too many, the oldest ends. With the
agreement a client gets its thread and its buffers (:mod:`cowhand.exports.nbd.connection`).
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import sys
import threading
from collections.abc import Iterable
from time import sleep
from typing import TYPE_CHECKING

from cowhand.core import clock
from cowhand.exports.nbd import sockets
from cowhand.exports.nbd.channel import SocketChannel, TlsChannel
from cowhand.exports.nbd.connection import Connection
from cowhand.exports.nbd.export import Exports, NbdExport
from cowhand.exports.nbd.limits import Limits
from cowhand.nbd.server_handshake import Agreed, Ended, Send, ServerHandshake, StartTls, Tls
from cowhand.nbd.tls import TlsFailed, TlsStream

if TYPE_CHECKING:
    import ssl

    from cowhand.nbd.offers import Agreement

#: What is received of a handshake at once; what waits to be sent, from which on nothing more is received.
_RECEIVE = 64 << 10
_TOO_MUCH = 256 << 10
#: Clients that are accepted before handshakes go on.
_ACCEPTED = 64
#: Seconds that a process leaves a new client to others, for each one that it has already.
_BACK_OFF = 0.002
#: Seconds without accepting after the process ran out of descriptors.
_PAUSE = 0.2
#: A thread that computes lets others run after so many seconds: with the default of 5 ms one busy thread multiplies every client's latency.
SWITCH_INTERVAL = 0.0005


class Observer:
    """Hears of clients; a base class whose methods do nothing. They are called from the server's threads, and must not block."""

    def client_began(self, connection: Connection) -> None:
        """A client has agreed on an export."""

    def client_left(self, connection: Connection, remaining: int) -> None:
        """A client has left; *remaining* others, those in their handshake included, are there."""

    def client_refused(self, name: str, reason: str) -> None:
        """A client left, or was sent away, before it had an export."""


class _Client:
    """A client in its handshake."""

    def __init__(self, sock: socket.socket, name: str, handshake: ServerHandshake, deadline: float) -> None:
        self.socket = sock
        self.name = name
        self.handshake = handshake
        self.deadline = deadline
        self.outgoing = bytearray(handshake.start())
        self.stream: TlsStream | None = None  #: once TLS has begun
        self.agreed: Agreed | None = None
        self.over = ""  #: why it ends when all is sent

    @property
    def events(self) -> int:
        """What the selector is to wait for."""
        if not self.outgoing:
            return selectors.EVENT_READ
        busy = self.agreed is not None or self.over or len(self.outgoing) > _TOO_MUCH
        return selectors.EVENT_WRITE | (0 if busy else selectors.EVENT_READ)


class NbdServer:
    """Serves exports on listening sockets, which become the server's; *default* as :class:`Exports` has it. Thread-safe.

    With *tls* every client has to encrypt before it is told of anything. With *shares_sockets* other processes accept clients of the same
    sockets, and get their share.
    """

    def __init__(
        self,
        exports: Iterable[NbdExport] = (),
        *,
        default: bool = True,
        tls: ssl.SSLContext | None = None,
        shares_sockets: bool = False,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.exports = Exports(exports, default=default)
        self.limits = limits if limits is not None else Limits()
        self._tls = tls
        self._shares_sockets = shares_sockets
        self._observer = observer or Observer()
        #: made when the server starts: one that never does holds nothing
        self._selector: selectors.BaseSelector
        self._waker: socket.socket | None = None
        self._woken: socket.socket
        self._listeners: list[socket.socket] = []
        self._listening = False
        self._clients: dict[
            int, _Client
        ] = {}  #: in their handshake, by descriptor, the oldest first; the selector's thread's own
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._stopping = False
        self._paused_until = 0.0
        self._thread = threading.Thread(target=self._run, name="nbd-accept", daemon=True)

    # -- from outside

    def listen(self, *listening: socket.socket) -> None:
        """Serve clients of these sockets too. Called before :meth:`start`."""
        for sock in listening:
            sock.setblocking(False)
            self._listeners.append(sock)

    def start(self) -> None:
        """Begin to serve, in threads of its own."""
        if sys.getswitchinterval() > SWITCH_INTERVAL:
            sys.setswitchinterval(SWITCH_INTERVAL)
        self._selector = selectors.DefaultSelector()
        waker, self._woken = socket.socketpair()
        for end in (waker, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._waker = waker
        self._thread.start()

    @property
    def encrypts(self) -> bool:
        """Whether clients have to use TLS."""
        return self._tls is not None

    @property
    def connections(self) -> list[Connection]:
        """The clients that have an export now."""
        with self._lock:
            return list(self._connections)

    def stop(self, grace: float = 10.0) -> bool:
        """Stop: no new clients; those that are there get what they asked for, within *grace* seconds. Tell whether all ended by themselves."""
        self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        for sock in self._listeners:
            sock.close()
        if self._waker is not None:
            self._selector.close()
            self._waker.close()
            self._woken.close()
        with self._lock:
            threads = dict(self._connections)
        for connection in threads:
            connection.finish()
        deadline = clock.monotonic() + grace
        for thread in threads.values():
            thread.join(max(0.0, deadline - clock.monotonic()))
        late = [connection for connection, thread in threads.items() if thread.is_alive()]
        for connection in late:
            connection.abort()
        for connection in late:
            threads[connection].join()
        return not late

    def disconnect(self, name: str) -> None:
        """End the connections of the export *name* at once."""
        for connection in self.connections:
            if connection.export.name == name:
                connection.abort()

    # -- the selector's thread

    def _wake(self) -> None:
        if self._waker is not None:
            with contextlib.suppress(OSError):
                self._waker.send(b"\0")

    def _run(self) -> None:
        while not self._stopping:
            self._listen_or_not()
            for key, events in self._selector.select(self._patience()):
                if key.fileobj is self._woken:
                    with contextlib.suppress(OSError):
                        self._woken.recv(4096)
                elif key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                elif key.data.socket.fileno() >= 0:  # an earlier event may have ended it
                    self._attend(key.data, events)
            self._end_late()
        for client in list(self._clients.values()):
            self._drop(client, "the server stops")

    def _patience(self) -> float | None:
        """Return how many seconds nothing has to be done, or None for any number."""
        times = [client.deadline for client in self._clients.values()]
        if self._paused_until:
            times.append(self._paused_until)
        return max(0.0, min(times) - clock.monotonic()) if times else None

    def _listen_or_not(self) -> None:
        """Accept clients exactly while there is room for them."""
        if self._paused_until and clock.monotonic() >= self._paused_until:
            self._paused_until = 0.0
        most = self.limits.clients
        wanted = not self._paused_until and (most is None or self._present() < most)
        if wanted == self._listening:
            return
        self._listening = wanted
        for sock in self._listeners:
            if wanted:
                self._selector.register(sock, selectors.EVENT_READ)
            else:
                self._selector.unregister(sock)

    def _present(self) -> int:
        with self._lock:
            return len(self._clients) + len(self._connections)

    def _accept(self, listener: socket.socket) -> None:
        if self._shares_sockets:
            # Processes that have fewer clients are there first.
            sleep(min(len(self._connections), 20) * _BACK_OFF)
        for _ in range(1 if self._shares_sockets else _ACCEPTED):
            if self.limits.clients is not None and self._present() >= self.limits.clients:
                return
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    if not self._drop_oldest():
                        self._paused_until = clock.monotonic() + _PAUSE
                        return
                continue  # a client that left again
            if len(self._clients) >= self.limits.handshakes:
                self._drop_oldest()
            self._greet(sock, address)

    def _drop_oldest(self) -> bool:
        for client in self._clients.values():
            self._drop(client, "too many clients are in their handshake")
            return True
        return False

    def _greet(self, sock: socket.socket, address: object) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sockets.tune(sock)
        seconds = self.limits.handshake_seconds
        deadline = clock.monotonic() + seconds if seconds else float("inf")
        wanted = Tls.OFF if self._tls is None else Tls.REQUIRED
        client = _Client(sock, sockets.peer_name(sock, address), ServerHandshake(self.exports, wanted), deadline)
        self._clients[sock.fileno()] = client
        self._selector.register(sock, selectors.EVENT_READ, client)
        self._attend(client, selectors.EVENT_WRITE)

    def _end_late(self) -> None:
        now = clock.monotonic()
        for client in list(self._clients.values()):
            if client.deadline > now:
                break  # the others came later
            self._drop(client, f"its handshake took more than {self.limits.handshake_seconds:g} s")

    def _drop(self, client: _Client, reason: str) -> None:
        self._forget(client)
        client.socket.close()
        self._observer.client_refused(client.name, reason)

    def _forget(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._selector.unregister(client.socket)

    # -- a client in its handshake

    def _attend(self, client: _Client, events: int) -> None:
        """Go on with a handshake as far as it goes now."""
        try:
            if events & selectors.EVENT_READ:
                data = client.socket.recv(_RECEIVE)
                if not data:
                    self._drop(client, "it left during the handshake")
                    return
                self._take(client, data)
            if client.outgoing:
                del client.outgoing[: client.socket.send(client.outgoing)]
        except BlockingIOError:
            pass
        except OSError as error:
            lost = error.errno in (errno.EPIPE, errno.ECONNRESET)
            self._drop(client, "it left during the handshake" if lost else error.strerror or "the connection was lost")
            return
        if not client.outgoing and client.over:
            self._drop(client, client.over)
        elif client.agreed is not None:
            self._begin(client, client.agreed)
        else:
            self._selector.modify(client.socket, client.events, client)

    def _take(self, client: _Client, data: bytes) -> None:
        stream = client.stream
        if stream is not None:
            stream.feed(data)
            try:
                if not stream.established and stream.handshake():
                    client.handshake.upgraded()
                data = stream.decrypt() if stream.established else b""
            except TlsFailed as error:
                client.over = error.message
            client.outgoing += stream.outgoing()
            if client.over or not stream.established:
                return
        for event in client.handshake.feed(data):
            if isinstance(event, Send):
                client.outgoing += stream.encrypt(event.data) if stream is not None else event.data
            elif isinstance(event, StartTls):
                assert self._tls is not None
                client.stream = TlsStream(self._tls, server=True)
            elif isinstance(event, Agreed):
                client.agreed = event
            elif isinstance(event, Ended):
                client.over = event.reason

    def _begin(self, client: _Client, agreed: Agreed) -> None:
        """Give a client that has an export its own thread."""
        agreement = agreed.agreement
        export = self.exports.get(agreement.offer.name)
        if export is None or len(self._connections) >= self.limits.connections:
            self._drop(client, "the export is gone" if export is None else "there are too many connections")
            return
        self._forget(client)
        with self._lock:
            connection = self._connection(client, export, agreement)
            thread = threading.Thread(
                target=self._serve,
                args=(connection, bytes(client.outgoing), agreed.rest),
                name="nbd-client",
                daemon=True,
            )
            self._connections[connection] = thread
        self._observer.client_began(connection)
        thread.start()

    def _connection(self, client: _Client, export: NbdExport, agreement: Agreement) -> Connection:
        share = self.limits.share(len(self._connections) + 1)
        channel = SocketChannel(client.socket) if client.stream is None else TlsChannel(client.socket, client.stream)
        return Connection(channel, client.name, export, agreement, share=share, in_flight=self.limits.in_flight)

    def _serve(self, connection: Connection, greeting: bytes, rest: bytes) -> None:
        try:
            connection.run(greeting, rest)
        finally:
            with self._lock:
                del self._connections[connection]
                remaining = len(self._connections) + len(self._clients)
            self._observer.client_left(connection, remaining)
            self._wake()
