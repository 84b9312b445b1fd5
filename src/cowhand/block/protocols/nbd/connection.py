"""One connection to an NBD server: many requests of many threads in flight, without a thread of its own.

Source: NetworkBlockDevice ``doc/proto.md``, "Transmission".

Theory of operation: a thread sends its requests, up to WINDOW at a time, and then waits for their replies. One of the waiting threads *leads*:
it receives what comes and finishes everybody's requests; the others sleep. A leader whose own requests are done wakes another one to lead.
So a single user is served without a switch of threads, and nobody has to end a thread when a disk is forgotten. Who waits for room to send
while nobody leads receives meanwhile, since the server may be waiting for room itself.

A connection that failed stays failed: everybody who waits, or comes later, gets the same error. A server that is silent for longer
than the time limit while requests are in flight counts as lost.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import select
import socket
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

from cowhand.block.protocols.nbd.tls_socket import TlsSocket
from cowhand.core import clock
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, from_os_error
from cowhand.nbd.constants import CMD_BLOCK_STATUS, CMD_DISC, CMD_READ
from cowhand.nbd.errors import ConnectionLost
from cowhand.nbd.handshake import Export
from cowhand.nbd.replies import Pending, ReplyReader
from cowhand.nbd.requests import encode_request

#: Requests that one caller keeps in flight; QEMU's server works on so many of one client.
WINDOW = 16
#: What is received at once where no large piece of data is due.
RECEIVE_SIZE = 256 << 10
#: Pieces of data from this length on are received at their place, shorter ones together with what follows them.
DIRECT = 64 << 10
#: Writes from this length on are sent by a call that waits, where that can block nobody.
LONG_WRITE = 128 << 10
#: The kernel takes at most so many buffers in one call (IOV_MAX).
_MAX_BUFFERS = 1024
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
_NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Order(NamedTuple):
    """A request that is to be sent: what of it will be waited for, its flags, and the bytes that follow it."""

    pending: Pending
    flags: int = 0
    payload: Sequence[Buffer] = ()


class _Caller:
    """A thread inside :meth:`Connection.run`. ``sent`` is counted by the thread itself, ``finished`` by the leader."""

    __slots__ = ("finished", "lock", "sent", "target")

    def __init__(self) -> None:
        self.sent = 0
        self.finished = 0
        self.target = 0  #: so many may be unfinished when it is woken
        self.lock = threading.Lock()
        self.lock.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was woken already
            self.lock.release()


class Connection:
    """A connection whose handshake is done; thread-safe. *silence* is the time limit in seconds, 0 for none."""

    def __init__(self, sock: socket.socket | TlsSocket, export: Export, name: str, silence: float) -> None:
        self.export = export
        self.failure: CowhandError | None = None
        self._name = name
        self._silence = silence
        self._socket = sock
        self._cookies = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        context = export.context[1] if export.context is not None else None
        self._reader = ReplyReader(structured=export.structured, context=context, pending=self._pending)
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))
        self._sending = threading.Lock()
        self._lead = threading.Lock()
        self._followers: dict[int, _Caller] = {}
        sock.settimeout(None)
        if silence:
            limit = struct.pack("@ll", int(silence), int(silence % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    @property
    def load(self) -> int:
        """Requests in flight."""
        return len(self._pending)

    def run(self, orders: Sequence[Order]) -> None:
        """Do *orders* and return when each has its reply (an error of the server's is one). Raises ConnectionLost, ProtocolViolation.

        When it raises, orders whose request is not ``done`` may or may not have been carried out.
        """
        caller = _Caller()
        try:
            position = 0
            while position < len(orders):
                group = orders[position : position + WINDOW - (caller.sent - caller.finished)]
                self._send(group, caller)
                position += len(group)
                self._wait(caller, WINDOW // 2 if position < len(orders) else 0)
                if position < len(orders):
                    self._hand_over()  # sending may take long
        except BaseException as error:
            if caller.sent > caller.finished:
                self._leave(error)
            raise
        finally:
            self._hand_over()  # an interrupt may come between the last reply and the handing over

    def _leave(self, error: BaseException) -> None:
        """Make sure that nothing more is received into the buffers of a caller that goes before its replies have come."""
        self._fail(error if isinstance(error, CowhandError) else self._lost("a request was interrupted", errno.EINTR))
        with self._lead:
            pass

    # -- sending

    def _send(self, group: Sequence[Order], caller: _Caller) -> None:
        buffers: list[memoryview] = []
        for pending, flags, payload in group:
            cookie = next(self._cookies)
            pending.owner = caller
            length = pending.length
            buffers.append(memoryview(encode_request(pending.command, flags, cookie, pending.offset, length)))
            buffers.extend([memoryview(piece) for piece in payload])
            self._pending[cookie] = pending
        caller.sent += len(group)
        with self._sending:
            if self.failure is not None:
                raise self._again()
            self._send_all(buffers)

    def _send_all(self, buffers: list[memoryview]) -> None:
        total = sum([len(buffer) for buffer in buffers])
        # A call that waits is safe where the server cannot be stuck with data for us: then it takes what we send.
        patient = total >= LONG_WRITE and not any(
            pending.command in (CMD_READ, CMD_BLOCK_STATUS) for pending in list(self._pending.values())
        )
        flags = _NOSIGNAL if patient else _NOSIGNAL | _DONTWAIT
        moved = clock.monotonic()
        encrypted = self._socket if isinstance(self._socket, TlsSocket) else None
        while total or (encrypted is not None and encrypted.unsent):
            try:
                count = self._socket.sendmsg(buffers[:_MAX_BUFFERS], (), flags)
            except BlockingIOError:
                if self._silence and clock.monotonic() - moved > self._silence:
                    raise self._fail(self._silent()) from None
                if not patient and self._make_room():
                    moved = clock.monotonic()
                if self.failure is not None:
                    raise self._again() from None
                continue
            except OSError as error:
                raise self._fail(self._broken(error, "sending")) from error
            total -= count
            moved = clock.monotonic()
            while count:
                first = buffers[0]
                if count < len(first):
                    buffers[0] = first[count:]
                    break
                count -= len(first)
                del buffers[0]

    def _make_room(self) -> bool:
        """Wait until something can be sent, receiving meanwhile unless somebody else does; tell whether anything came."""
        leading = self._lead.acquire(blocking=False)
        try:
            if self.failure is not None:
                return False
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT | (select.POLLIN if leading else 0))
            # Not for long: the thread that leads now may leave.
            events = poll.poll(100)
            if leading and events and events[0][1] & ~select.POLLOUT:
                self._receive()
                return True
            return False
        finally:
            if leading:
                self._lead.release()
                self._hand_over()

    # -- waiting and receiving

    def _wait(self, caller: _Caller, target: int) -> None:
        """Return when at most *target* of the caller's requests are unfinished."""
        caller.target = target
        while caller.sent - caller.finished > target:
            if self.failure is not None:
                raise self._again()
            # Registered before the look at the lock: a leader who lets go after it sees us.
            self._followers[id(caller)] = caller
            leads = self._lead.acquire(blocking=False)
            if not leads:
                caller.lock.acquire()
            self._followers.pop(id(caller), None)
            if leads:
                try:
                    while caller.sent - caller.finished > target and self.failure is None:
                        self._receive()
                finally:
                    self._lead.release()

    def _hand_over(self) -> None:
        """Wake somebody to lead, where nobody does. Called by everybody who stops waiting or leading: he may have been woken for that."""
        if self._followers and not self._lead.locked():
            for follower in list(self._followers.values())[:1]:
                follower.wake()

    def _receive(self) -> None:
        """Receive once, and finish what was complete. Called by the leader."""
        reader, buffer = self._reader, self._buffer
        if self.failure is not None:
            raise self._again()
        into = reader.wants()
        try:
            if into is None or len(into) < DIRECT:
                count = self._socket.recv_into(buffer)
                into = None
            else:
                count = self._socket.recvmsg_into([into, buffer])[0]
        except BlockingIOError:
            raise self._fail(self._silent()) from None
        except OSError as error:
            raise self._fail(self._broken(error, "receiving")) from error
        except BaseException:
            self._fail(self._lost("receiving was interrupted", errno.EINTR))  # it may have come after some bytes
            raise
        if not count:
            raise self._fail(self._lost("the server closed the connection", errno.EIO))
        try:
            if into is None:
                reader.feed(buffer[:count])
            else:
                direct = min(count, len(into))
                reader.received(direct)
                if count > direct:
                    reader.feed(buffer[: count - direct])
        except CowhandError as error:
            raise self._fail(error.within(f"NBD server {self._name}")) from None
        except BaseException:
            # Not all that was received has been taken: what comes next would be put in its place, into somebody else's buffer perhaps.
            self._fail(self._lost("receiving was interrupted", errno.EINTR))
            raise
        finally:
            self._tell()

    def _tell(self) -> None:
        """Count what the reader has finished, and wake whose requests are done."""
        for pending in self._reader.finished:
            caller = pending.owner
            assert isinstance(caller, _Caller)
            caller.finished += 1
            if caller.sent - caller.finished <= caller.target and id(caller) in self._followers:
                caller.wake()
        self._reader.finished.clear()

    # -- failure and end

    def _fail(self, error: CowhandError) -> CowhandError:
        """Fail the connection for everybody, and return the error."""
        if self.failure is None:
            self.failure = error
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        for follower in list(self._followers.values()):
            follower.wake()
        return self.failure

    def _again(self) -> CowhandError:
        """Return an error like the one that failed the connection: each thread raises its own."""
        first = self.failure
        assert first is not None
        again = type(first)(
            first.message,
            qemu=first.qemu_message,
            hint=first.hint,
            errno=first.number,
            path=first.path,
            offset=first.offset,
        )
        again.frames = list(first.frames)
        return again

    def _lost(self, what: str, number: int) -> ConnectionLost:
        return ConnectionLost(what, qemu="Connection closed", errno=number, path=self._name)

    def _silent(self) -> ConnectionLost:
        return ConnectionLost(
            f"the server has said nothing for {self._silence:g} s while it should have replied",
            qemu="Connection timed out",
            errno=errno.ETIMEDOUT,
            path=self._name,
            hint="The option reply-timeout sets the time; 0 waits for ever.",
        )

    def _broken(self, error: OSError, doing: str) -> ConnectionLost:
        told = from_os_error(error, self._name, doing=doing)
        return ConnectionLost(told.message, qemu=told.qemu_message, errno=errno.EIO, path=self._name)

    def close(self) -> None:
        """Say goodbye, and close. No request is in flight."""
        if self.failure is None:
            with contextlib.suppress(OSError), self._sending:
                self._socket.send(encode_request(CMD_DISC, 0, 0, 0, 0), _NOSIGNAL | _DONTWAIT)
        self._fail(self._lost("the connection was closed here", errno.EBADF))
        # Nobody is inside a call for the socket then: its number may soon be that of another connection, which would get the call's bytes.
        with self._sending, self._lead:
            self._socket.close()
