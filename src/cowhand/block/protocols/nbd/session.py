"""A user's view of an NBD export: one or several connections, made anew when they are lost.

Source: QEMU ``BlockdevOptionsNbd`` (``qapi/block-core.json``) for ``reconnect-delay`` and ``open-timeout``. When all connections are lost, requests
wait up to reconnect-delay seconds, counted from the loss, for a new one and are then sent again; later ones fail at once, though each
tries to connect (not oftener than once a second), so that an export that comes back is used again. A server that broke the protocol, or an
export that is another one after a reconnect, is not tried again.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cowhand.block.protocols.nbd.address import HANDSHAKE_SECONDS, Dial, Server, TlsClient
from cowhand.block.protocols.nbd.connection import Connection, Order
from cowhand.core import clock
from cowhand.core.errors import Closed, CowhandError
from cowhand.nbd.constants import FLAG_CAN_MULTI_CONN
from cowhand.nbd.errors import ConnectionLost, NegotiationRefused, ProtocolViolation
from cowhand.nbd.handshake import Export

#: Seconds between attempts to connect: the first pause, doubled each time, and the longest.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
#: Bytes from which on a request that finds all connections busy has another one made.
WORTH_ANOTHER = 256 << 10
#: Seconds for making one that only speeds things up.
EXTRA_SECONDS = 5.0


class Settings(NamedTuple):
    """How an export is reached; times in seconds. ``accept`` looks at what a server offers, and may raise."""

    server: Server
    tls: TlsClient | None
    export: str
    context: str
    reconnect_delay: float
    open_timeout: float
    reply_timeout: float
    connections: int
    accept: Callable[[Export], None]


class Session:
    """Connections to one export; thread-safe. Made by :meth:`open`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connections: list[Connection] = []  #: replaced, never changed: read without the lock
        self._changing = threading.Lock()  #: held for moments
        self._connecting = threading.Lock()  #: held while a new connection is made: the others wait for it
        self._closed = threading.Event()
        self._dial: Dial | None = None
        self._extra: threading.Thread | None = None
        self._several = False  #: whether the server lets one client have several
        self._enough = True
        self._fatal: CowhandError | None = None
        self._lost_at: float | None = None
        self._failed_at: float | None = None
        self.export = Export(0, 0)

    def open(self) -> Export:
        """Connect, trying for open-timeout seconds; return what was agreed on. Raises the last attempt's error."""
        deadline = clock.monotonic() + self._settings.open_timeout
        connection = self._connect_until(deadline)
        self.export = connection.export
        allowed = bool(connection.export.flags & FLAG_CAN_MULTI_CONN) and self._settings.server.kind != "fd"
        self._several = allowed and self._settings.connections > 1
        self._enough = not self._several
        return self.export

    def run(self, orders: Sequence[Order]) -> None:
        """Do *orders*, again on a new connection where one is lost and reconnect-delay allows it. Raises ConnectionLost and others."""
        first_loss: float | None = None
        pause = 0.0
        while True:
            connection = self._choose(orders)
            try:
                connection.run(orders)
                return
            except ConnectionLost:
                self._drop(connection)
                now = clock.monotonic()
                # Counted from the first loss: a server that takes every connection and drops it again is as good as gone.
                first_loss = now if first_loss is None else first_loss
                if (
                    not self._in_delay()
                    or now >= first_loss + self._settings.reconnect_delay
                    or self._closed.wait(pause)
                ):
                    raise
                orders = [order for order in orders if not order.pending.done]
                for order in orders:
                    order.pending.reset()
                pause = min(2 * pause, LONGEST_PAUSE) or FIRST_PAUSE
            except ProtocolViolation as error:
                self._fatal = error
                raise

    # -- choosing

    def _choose(self, orders: Sequence[Order]) -> Connection:
        if self._fatal is not None:
            raise self._refuse(self._fatal)
        alive = [connection for connection in self._connections if connection.failure is None]
        if not alive:
            return self._reconnect()
        if len(alive) == 1 and self._enough:
            return alive[0]
        best = min(alive, key=lambda connection: connection.load)
        if best.load and not self._enough and sum([order.pending.length for order in orders]) >= WORTH_ANOTHER:
            self._add()
        return best

    def _refuse(self, fatal: CowhandError) -> ProtocolViolation:
        """Return an error like the one after which this server is not asked any more: each request raises its own."""
        return ProtocolViolation(
            fatal.message, qemu=fatal.qemu_message, errno=fatal.number, path=fatal.path, hint=fatal.hint
        )

    def _in_delay(self) -> bool:
        delay = self._settings.reconnect_delay
        lost_at = self._lost_at
        # No time of loss: another connection lives, or was made meanwhile.
        return bool(delay) and (lost_at is None or clock.monotonic() < lost_at + delay)

    def _drop(self, connection: Connection) -> None:
        """Forget a connection that was lost."""
        with self._changing:
            if connection not in self._connections:
                return
            self._connections = [known for known in self._connections if known is not connection]
            if not self._connections:
                self._lost_at = clock.monotonic()
                self._failed_at = None
                if self._extra is None or not self._extra.is_alive():
                    self._extra = None
                    self._enough = not self._several  # the next server may take more
        connection.close()

    # -- connecting

    def _reconnect(self) -> Connection:
        with self._connecting:
            for connection in self._connections:
                if connection.failure is None:
                    return connection
            for connection in self._connections:
                self._drop(connection)
            if self._closed.is_set():
                raise Closed("the disk is closed")
            now = clock.monotonic()
            failed = self._failed_at
            if not self._in_delay() and failed is not None and now < failed + LONGEST_PAUSE:
                raise ConnectionLost(
                    "there is no connection to the server", qemu="No connection at the moment", path=str(self._settings.server)
                )  # fmt: skip
            deadline = (self._lost_at or now) + self._settings.reconnect_delay if self._in_delay() else now
            try:
                return self._connect_until(deadline, again=True)
            except (ConnectionLost, NegotiationRefused) as error:
                self._failed_at = clock.monotonic()
                raise ConnectionLost(
                    error.message, qemu=error.qemu_message, hint=error.hint, errno=errno.EIO, path=error.path
                ) from None
            except CowhandError as error:
                self._fatal = error
                raise

    def _connect_until(self, deadline: float, *, again: bool = False) -> Connection:
        """Connect, trying again until *deadline*, and at least once."""
        pause = FIRST_PAUSE
        while True:
            left = deadline - clock.monotonic()
            try:
                connection = self._connect(left if left > 0 else HANDSHAKE_SECONDS, again=again)
            except (ConnectionLost, NegotiationRefused):
                left = deadline - clock.monotonic()
                if left <= 0 or self._closed.wait(min(pause, left)):
                    raise
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            with self._changing:
                self._connections = [*self._connections, connection]
                self._lost_at = self._failed_at = None
            return connection

    def _connect(self, seconds: float, *, again: bool) -> Connection:
        settings = self._settings
        dial = self._dial = Dial(settings.server, seconds, settings.tls)
        if self._closed.is_set():
            raise Closed("the disk is closed")
        sock, export = dial.run(settings.export, settings.context)
        try:
            settings.accept(export)
            if again:
                self._compare(export)
            return Connection(sock, export, str(settings.server), settings.reply_timeout)
        except BaseException:
            sock.close()
            raise

    def _compare(self, export: Export) -> None:
        """Raise ProtocolViolation unless a server that was reached again offers what it did at first."""
        first = self.export
        same = (
            export.size == first.size
            and export.flags == first.flags
            and (export.minimum or 1) <= (first.minimum or 1)
            and (export.maximum or first.maximum or 0) >= (first.maximum or 0)
            and (export.context is None) == (first.context is None)
        )
        if not same:
            raise ProtocolViolation(
                f"the export was {first.size} bytes with flags {first.flags:#x}, and is {export.size} with {export.flags:#x} "
                "after the connection was lost",
                errno=errno.ESTALE,
                path=str(self._settings.server),
                hint="Open it again if that is right.",
            )

    # -- more connections

    def _add(self) -> None:
        """Make another connection in the background: nobody waits for it, and a server that refuses it is not asked again."""
        with self._changing:
            if self._extra is not None or self._enough or self._closed.is_set():
                return
            self._extra = threading.Thread(target=self._add_one, name="nbd-connect", daemon=True)
            self._extra.start()

    def _add_one(self) -> None:
        try:
            connection = self._connect(EXTRA_SECONDS, again=True)
        except (CowhandError, OSError):
            self._enough = True
            return
        with self._changing:
            self._extra = None
            wanted = bool(self._connections) and not self._closed.is_set()
            if wanted:
                self._connections = [*self._connections, connection]
            self._enough = len(self._connections) >= self._settings.connections
        if not wanted:
            connection.close()

    def close(self) -> None:
        """End all connections. No request is in flight."""
        self._closed.set()
        extra = self._extra
        if extra is not None and self._dial is not None:
            self._dial.abort()
            extra.join(EXTRA_SECONDS)
        with self._changing:
            connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.close()
