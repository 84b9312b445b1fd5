"""One client's connection past the handshake: a thread that receives requests, does them, and sends the replies.

Theory of operation: what one receive brought is taken apart together. Where the disk does its requests at once, reads,
writes and flushes of it become one batch for :meth:`Disk.submit_each`; reads land behind their reply headers in one
buffer, which is sent by one call. Everything else is done one by one in between. Where requests may wait (a remote
disk, a throttled one), each is a job of a pool, and replies go out in the order in which they come about.

What a connection holds is bounded: one buffer to receive into, one for replies. A write that is larger than the buffer
is received and written by pieces, a read by pieces where replies are structured. A client that does not read its
replies holds its own thread and buffers, and nobody else's.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from cowhand.block.node.node import FLUSH, READ, WRITE_REQUEST, Request
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError
from cowhand.exports.nbd.channel import Channel
from cowhand.exports.nbd.execution import perform
from cowhand.exports.nbd.limits import buffer_size
from cowhand.nbd.constants import CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_WRITE
from cowhand.nbd.errors import ProtocolViolation
from cowhand.nbd.offers import Agreement
from cowhand.nbd.server_replies import ReplyEncoder, number_of
from cowhand.nbd.server_requests import ClientRequest, RequestReader, refusal

if TYPE_CHECKING:
    from cowhand.exports.nbd.export import NbdExport

#: Bytes of one piece of a read or write that does not fit into the buffers.
PIECE = 1 << 20
#: Flags with which a write is one of a batch.
_PLAIN_WRITE = (0, CMD_FLAG_FUA)


class Statistics:
    """What a client did, by command: {command: [requests, bytes]}; approximate while it goes on."""

    __slots__ = ("errors", "since", "totals")

    def __init__(self) -> None:
        self.totals: dict[int, list[int]] = {command: [0, 0] for command in range(8)}
        self.errors = 0
        self.since = time.monotonic()

    def count(self, command: int, length: int) -> None:
        """Count one request."""
        total = self.totals[command]
        total[0] += 1
        total[1] += length


class Connection:
    """Serves one client until it leaves; :meth:`run` is its thread's work."""

    def __init__(
        self, channel: Channel, name: str, export: NbdExport, agreement: Agreement, *, share: int, in_flight: int
    ) -> None:
        self.name = name
        self.export = export
        self.agreement = agreement
        self.statistics = Statistics()
        #: Why it ended, for people; empty where the client just left.
        self.reason = ""
        self._channel = channel
        self._disk = export.disk
        self._encoder = ReplyEncoder(structured=agreement.structured, extended=agreement.extended)
        self._reader = RequestReader(extended=agreement.extended)
        size = buffer_size(share)
        self._in = memoryview(bytearray(size))
        self._out = bytearray(size)
        self._out_view = memoryview(self._out)
        self._room = size
        self._share = share
        self._batch = _Batch()
        self._sending = threading.Lock()
        self._pool: _Pool | None = None
        self._in_flight = in_flight

    # -- from other threads

    def finish(self) -> None:
        """Do what has come, reply, and end."""
        self._channel.stop_receiving()

    def abort(self) -> None:
        """End now."""
        self._channel.abort()

    # -- the thread

    def run(self, greeting: bytes, rest: bytes) -> None:
        """Send *greeting*, the end of the handshake as it goes over the wire, and serve until the client leaves; *rest* came behind that."""
        try:
            if greeting:
                self._channel.send_raw(greeting)
            self._serve(rest)
        except ProtocolViolation as error:
            self.reason = error.message
        except (OSError, MemoryError) as error:
            self.reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        except Exception as error:  # noqa: BLE001 - one client's connection ends, and the server's owner hears why
            self.reason = f"internal error: {type(error).__name__}: {error}"
        finally:
            if self._pool is not None:
                self._pool.close()
            self._channel.close()

    def _serve(self, rest: bytes) -> None:
        view, reader = self._in, self._reader
        capacity = len(view)
        view[: len(rest)] = rest
        begin, end = 0, len(rest)
        receive = self._channel.receive_into
        while True:
            requests, begin = reader.take(view, begin, end)
            if requests:
                if not (self._answer_pooled(requests) if self._pooled() else self._answer(requests)):
                    return
                continue
            begun = reader.partial
            if begun is not None and begun.payload + reader.header > capacity:
                self._long_payload(begun, end)
                begin = end = 0
                continue
            if begin == end:
                begin = end = 0
            elif begin and (begun is None or begin + begun.payload + reader.header > capacity):
                view[: end - begin] = view[begin:end]
                begin, end = 0, end - begin
            count = receive(view[end:])
            if not count:
                if end > begin:
                    self.reason = "it left in the middle of a request"
                return
            end += count

    # -- many at once

    def _answer(self, requests: Sequence[ClientRequest]) -> bool:
        """Do *requests* and reply; False when the client says goodbye."""
        batch, encoder, size = self._batch, self._encoder, self.agreement.offer.size
        header, room, writable = encoder.data_header, self._room, self.export.writable
        out, out_view, view = self._out, self._out_view, self._in
        totals = self.statistics.totals
        for request in requests:
            command, flags, cookie, offset, length, payload, place = request
            if command == CMD_READ and not flags and 0 < length <= room - header and offset + length <= size:
                position = batch.position
                if position + header + length > room:
                    self._submit()
                    position = 0
                encoder.put_data_header(out, position, cookie, offset, length, offset)
                begin = position + header
                batch.position = end = begin + length
                batch.add((READ, offset, out_view[begin:end]), request, position, end)
            elif command == CMD_WRITE and writable and flags & ~1 == 0 and length and offset + length <= size:
                if flags:
                    batch.stable.append(len(batch.todo))
                self._small(request, (WRITE_REQUEST, offset, view[place : place + payload]))
            elif command == CMD_FLUSH and flags & ~1 == 0:
                self._small(request, (FLUSH, 0, 0))
            else:
                self._submit()
                if command == CMD_DISC:
                    return False
                self._single(request, view[place : place + payload])
                continue
            total = totals[command]
            total[0] += 1
            total[1] += length
        self._submit()
        return True

    def _small(self, request: ClientRequest, todo: Request) -> None:
        """Put a request into the batch whose reply only says that it was done."""
        reply = self._encoder.success(request)
        batch = self._batch
        if batch.position + len(reply) > self._room:
            stable = batch.stable.pop() if len(batch.todo) in batch.stable else None
            self._submit()
            if stable is not None:
                batch.stable.append(0)
        position = batch.position
        batch.position = end = position + len(reply)
        self._out[position:end] = reply
        batch.add(todo, request, position, end)

    def _submit(self) -> None:
        """Do what was gathered, and send its replies."""
        batch = self._batch
        if not batch.todo:
            return
        try:
            failures = self._disk.submit_each(batch.todo, stable=batch.stable)
        except CowhandError as error:  # the disk was closed
            failures = dict.fromkeys(range(len(batch.todo)), error)
        if not failures:
            self._channel.send(self._out_view[: batch.position])
        else:
            self.statistics.errors += len(failures)
            replies: list[Buffer] = []
            for index, (request, begin, end) in enumerate(batch.replies):
                failure = failures.get(index)
                if failure is None:
                    replies.append(self._out_view[begin:end])
                else:
                    replies.append(self._encoder.error(request, number_of(failure), str(failure)))
            self._channel.send_buffers(replies)
        batch.clear()

    # -- one by one

    def _single(self, request: ClientRequest, payload: memoryview) -> None:
        refused = refusal(request, self.agreement)
        if refused is not None:
            self._reply((self._encoder.error(request, refused.errno, refused.message),))
            self.statistics.errors += 1
            return
        self.statistics.count(request.command, request.length)
        if request.command == CMD_READ and request.length > self._room - self._encoder.data_header:
            self._long_read(request)
        else:
            self._reply(perform(self.export, self.agreement, self._encoder, request, payload))

    def _reply(self, buffers: Sequence[Buffer]) -> None:
        with self._sending:
            self._channel.send_buffers(buffers)

    def _long_read(self, request: ClientRequest) -> None:
        """Reply to a read that is larger than the buffer."""
        whole = request.flags & CMD_FLAG_DF or not self.agreement.structured
        if whole and request.length <= self._share // 2:
            self._reply(perform(self.export, self.agreement, self._encoder, request, b""))
        elif request.flags & CMD_FLAG_DF:
            message = (
                f"{request.length} bytes are too many for one piece just now: ask for less, or let them come in several"
            )
            self._reply((self._encoder.error(request, errno.EOVERFLOW, message),))
        else:
            self._read_by_pieces(request)

    def _read_by_pieces(self, request: ClientRequest) -> None:
        encoder = self._encoder
        piece = memoryview(bytearray(min(PIECE, self._room)))
        position, end = request.offset, request.offset + request.length
        with self._sending:
            while position < end:
                count = min(len(piece), end - position)
                try:
                    self._disk.read_into(position, piece[:count])
                except CowhandError as error:
                    if self.agreement.structured or position == request.offset:
                        self._channel.send(encoder.error(request, number_of(error), str(error)))
                        return
                    # A simple reply has said that all went well.
                    raise ConnectionAbortedError(
                        errno.EIO, f"reading failed in the middle of a simple reply: {error}"
                    ) from None
                if self.agreement.structured:
                    header = encoder.data_piece(request, position, count, done=position + count == end)
                    self._channel.send_buffers((header, piece[:count]))
                elif position == request.offset:
                    self._channel.send_buffers((encoder.success(request), piece[:count]))
                else:
                    self._channel.send(piece[:count])
                position += count

    def _long_payload(self, request: ClientRequest, end: int) -> None:
        """Take the payload of *request*, which is larger than the buffer, by pieces; all that the buffer holds up to *end* is of it."""
        refused = refusal(request, self.agreement)
        if refused is None and request.command != CMD_WRITE:
            refused = refusal(request._replace(command=-1), self.agreement)  # nothing else has such a payload
        number, message = (refused.errno, refused.message) if refused is not None else (0, "")
        view, place = self._in, request.place
        here = end - place
        position, left = request.offset, request.payload
        # What has come is moved to the beginning, so that a piece is as large as it can be.
        view[:here] = view[place:end]
        while left:
            if not here or (here < left and here < PIECE):
                count = self._channel.receive_into(view[here : min(len(view), here + left)])
                if not count:
                    raise ConnectionAbortedError(errno.EIO, "it left in the middle of a write")
                here = min(here + count, left)
                if here < left and here < PIECE:
                    continue
            if not number:
                try:
                    self._disk.write(position, view[:here])
                except CowhandError as error:
                    number, message = number_of(error), str(error)
            position += here
            left -= here
            here = 0
        self._end_of_long_write(request, number, message)

    def _end_of_long_write(self, request: ClientRequest, number: int, message: str) -> None:
        if not number and request.flags & CMD_FLAG_FUA:
            try:
                self._disk.flush()
            except CowhandError as error:
                number, message = number_of(error), str(error)
        if number:
            self.statistics.errors += 1
            self._reply((self._encoder.error(request, number, message),))
        else:
            self.statistics.count(request.command, request.length)
            self._reply((self._encoder.success(request),))

    # -- where requests may wait

    def _pooled(self) -> bool:
        """Tell whether requests are jobs of a pool; once they are, they stay so."""
        if self._pool is None:
            if not self.export.waits:
                return False
            self._pool = _Pool(self._in_flight, self._share)
        return True

    def _answer_pooled(self, requests: Sequence[ClientRequest]) -> bool:
        pool = self._pool
        assert pool is not None
        for request in requests:
            if request.command == CMD_DISC:
                return False
            place = request.place
            if request.command == CMD_READ and request.length > self._room:
                self._single(request, self._in[place:place])
                continue
            payload = bytes(self._in[place : place + request.payload])
            held = request.length if request.command in (CMD_READ, CMD_WRITE) else 0
            pool.run(partial(self._job, request, memoryview(payload)), held)
        return True

    def _job(self, request: ClientRequest, payload: memoryview) -> None:
        try:
            self._single(request, payload)
        except OSError as error:
            self.reason = self.reason or error.strerror or str(error)
            self._channel.abort()


class _Batch:
    """Requests that are done together, and where their replies lie: (request, begin, end) in the buffer."""

    __slots__ = ("position", "replies", "stable", "todo")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.todo: list[Request] = []
        self.replies: list[tuple[ClientRequest, int, int]] = []
        self.stable: list[int] = []
        self.position = 0

    def add(self, todo: Request, request: ClientRequest, begin: int, end: int) -> None:
        self.todo.append(todo)
        self.replies.append((request, begin, end))


class _Pool:
    """Threads for the requests of one connection: so many at once, holding so many bytes."""

    def __init__(self, count: int, share: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="nbd-request")
        self._condition = threading.Condition()
        self._free = count
        self._all = self._bytes = share

    def run(self, work: Callable[[], None], nbytes: int) -> None:
        """Do *work* soon; waits while there are too many, or too large ones."""
        with self._condition:
            # One that is larger than all there is waits until it is alone.
            whole = min(nbytes, self._all)
            self._condition.wait_for(lambda: self._free > 0 and self._bytes >= whole)
            self._free -= 1
            self._bytes -= whole
        self._threads.submit(self._do, work, whole)

    def _do(self, work: Callable[[], None], nbytes: int) -> None:
        try:
            work()
        finally:
            with self._condition:
                self._free += 1
                self._bytes += nbytes
                self._condition.notify_all()

    def close(self) -> None:
        """Wait for what is going on."""
        self._threads.shutdown(wait=True)
