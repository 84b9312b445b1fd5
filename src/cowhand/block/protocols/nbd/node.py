"""Exports of NBD servers: the driver "nbd".

Sources: NetworkBlockDevice ``doc/proto.md``; QEMU ``BlockdevOptionsNbd`` (``qapi/block-core.json``) for options and their names.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.node.node import (
    DISCARD,
    FLUSH,
    READ,
    WRITE_REQUEST,
    ZERO_UNMAP,
    BlockNode,
    Capabilities,
    Failures,
    Limits,
    Request,
    Zeroing,
    one_by_one,
)
from cowhand.block.protocols.nbd.connection import Order
from cowhand.block.protocols.nbd.options import NbdOptions, address_of, server_of, tls_of, with_server, with_uri
from cowhand.block.protocols.nbd.session import Session, Settings
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, fill_zero
from cowhand.core.errors import (
    AccessDenied,
    CowhandError,
    NoSpace,
    NotSupported,
    Poisoned,
    PolicyRefused,
    from_os_error,
)
from cowhand.core.extents import ALLOCATED, DATA, MAX_ROWS, OFFSET, ZERO, ExtentBatch
from cowhand.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    CONTEXT_ALLOCATION,
    CONTEXT_QEMU_DEPTH,
    FLAG_READ_ONLY,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    MAX_PAYLOAD,
    STATE_HOLE,
    STATE_ZERO,
)
from cowhand.nbd.handshake import Export, require_context
from cowhand.nbd.replies import Pending

if TYPE_CHECKING:
    from cowhand.block.node.options import NodeOptions
    from cowhand.block.opening.opening import Opening

SECTOR = 512
#: Bytes of one request that carries none (zeroes, trims): not so many that a server that works seems dead.
LONG_REQUEST = 1 << 30
#: Bytes that block status is asked of at once: the most that 32 bits and every block size allow. An export may be huge and empty.
STATUS_REQUEST = (1 << 32) - (1 << 16)
#: Requests that one long change is cut to before they are done: an export may be so large that all of them do not fit into memory.
MANY = 512


class NbdNode(BlockNode):
    """An export of an NBD server, as large as it was when it was opened. Connections that are lost are made anew (``reconnect-delay``)."""

    driver: ClassVar[str] = "nbd"
    options_class: ClassVar[type[NbdOptions]] = NbdOptions
    options: NbdOptions

    def __init__(self, options: NbdOptions) -> None:
        super().__init__(options)
        self._address = address_of(options)
        self._server = server_of(options)
        self._context = options.x_dirty_bitmap or CONTEXT_ALLOCATION
        self._export = Export(0, 0)
        self._longest = MAX_PAYLOAD
        self._failure: int | None = None  #: errno of the flush that failed
        # Numbers of changes: each takes the next one when it has ended (a flush that began before does not cover it); the last number
        # that a flush which has ended came after.
        self._changes = itertools.count(1)
        self._changed = self._flushed = 0
        self._session = Session(
            Settings(
                server=self._server,
                tls=tls_of(options),
                export=self._address.export or "",
                context=self._context,
                reconnect_delay=options.reconnect_delay,
                open_timeout=options.open_timeout,
                reply_timeout=options.reply_timeout,
                connections=options.connections,
                accept=self._accept,
            )
        )

    @classmethod
    def open(cls, opening: Opening | None, options: NodeOptions, given: dict[str, Any]) -> NbdNode:
        assert isinstance(options, NbdOptions)
        server = given.pop("server", None)
        if server is not None:
            options = with_server(options, server)
        if options.server_type == "fd" and opening is not None and opening.implied:
            raise PolicyRefused("an image cannot name descriptors of this process")
        options = with_uri(options)
        node = cls(options)
        node._connect()
        return node

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        return {}  # the option "filename" holds it: the driver has to see what is given beside it

    @classmethod
    def create(cls, filename: str, size: int, **settings: Any) -> None:
        """Do nothing: an export is there already, or cannot be made by its clients. Formats empty it as far as they can."""

    # -- opening

    def _connect(self) -> None:
        try:
            self._take(self._session.open())
        except BaseException:
            self._session.close()
            raise

    def _accept(self, export: Export) -> None:
        """Raise when *export*, which a server offers, cannot be what the user wants."""
        if export.flags & FLAG_READ_ONLY and self.writable and not self.options.auto_read_only:
            raise AccessDenied(
                "the server lets this export be read only",
                qemu="Could not open image: Permission denied",  # QEMU's tools lose the message
                path=self.filename,
            )
        if self.options.x_dirty_bitmap:
            require_context(export, self._context)

    def _take(self, export: Export) -> None:
        self._export = export
        if export.flags & FLAG_READ_ONLY:
            self.writable = False
        # QEMU's rules: block status, or an odd size, tell of a server that takes any alignment.
        block = export.minimum or (1 if export.size % SECTOR or export.context is not None else SECTOR)
        longest = min(export.maximum or MAX_PAYLOAD, MAX_PAYLOAD)
        self._longest = max(longest - longest % block, block)
        self.limits = Limits(
            request_alignment=block,
            preferred_io=min(max(export.preferred, 1 << 20), self._longest),
            maximum_io=self._longest,
            zero_alignment=block,
            discard_alignment=block,
        )
        zeroes = export.flags & (FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO)
        self.capabilities = Capabilities(
            writable=self.writable,
            zeroes=Zeroing.NATIVE if zeroes == FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO else Zeroing.EMULATED,
            discard=bool(export.flags & FLAG_SEND_TRIM) and self.options.discard != "ignore",
            fua=bool(export.flags & FLAG_SEND_FUA),
        )

    # -- facts

    @property
    def size(self) -> int:
        return self._export.size

    @property
    def filename(self) -> str:
        secured = {
            name: value
            for name, value in self.strong_options().items()
            if name.startswith("tls-") and not self._address.tls
        }
        if self._server.kind in ("unix", "inet") and not self._server.abstract and not secured:
            return str(self._address)
        import json

        server = {"type": self._server.kind}
        if self._server.kind == "fd":
            server["str"] = self._server.path
        elif self._server.kind == "vsock":
            server |= {"cid": self._server.host, "port": self._server.port}
        elif self._server.kind == "inet":
            server |= {"host": self._server.host, "port": self._server.port}
        else:
            server |= {"path": self._server.path} | ({"abstract": "on"} if self._server.abstract else {})
        export = {} if self._address.export is None else {"export": self._address.export}
        return "json:" + json.dumps({"driver": self.driver, "server": server, **export, **secured})

    # -- requests

    def _run(self, orders: Sequence[Order]) -> None:
        """Do *orders*; raise the first error that the server replied with after all have ended."""
        if orders:
            self._session.run(orders)
        for order in orders:
            if order.pending.failure is not None:
                raise self._error(order.pending)

    def _change(self, orders: Sequence[Order]) -> None:
        """Do *orders*, some of which change the disk."""
        try:
            self._run(orders)
        finally:
            if orders:
                self._changed = next(self._changes)

    def _error(self, pending: Pending) -> CowhandError:
        assert pending.failure is not None
        number, said = pending.failure
        doing = COMMAND_NAMES.get(pending.command, "request")
        raised = from_os_error(OSError(number, ""), self.filename, doing=doing)
        if number in (errno.EOPNOTSUPP, errno.ENOTSUP):
            raised = NotSupported(raised.message, qemu=raised.qemu_message, errno=number, path=self.filename)
        raised.offset = pending.offset
        if said:
            raised.hint = f"The server says: {said}"
        return raised

    def _reads(self, orders: list[Order], offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        if offset + len(view) > self.size:
            inside = max(0, self.size - offset)
            fill_zero(view[inside:])
            view = view[:inside]
        longest = self._longest
        for begin in range(0, len(view), longest):
            part = view[begin : begin + longest] if len(view) > longest else view
            orders.append(Order(Pending(CMD_READ, offset + begin, len(part), part)))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        orders: list[Order] = []
        self._reads(orders, offset, buffer)
        self._run(orders)

    def _check_sound(self) -> None:
        if self._failure is not None:
            raise Poisoned(
                "an earlier flush failed, so it is not known what the server has kept",
                hint="Open it again, and check it, before it is written to.",
                errno=self._failure,
                path=self.filename,
            )

    def _check_change(self, offset: int, length: int) -> None:
        self._check_sound()
        if offset + length > self.size:
            raise NoSpace("an export cannot grow", qemu="No space left on device", path=self.filename, offset=offset)

    def _writes(self, orders: list[Order], offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        length = sum([len(buffer) for buffer in buffers])
        self._check_change(offset, length)
        if 0 < length <= self._longest:
            orders.append(Order(Pending(CMD_WRITE, offset, length), flags, buffers))
            return
        for payload, size in _pieces(buffers, self._longest):
            orders.append(Order(Pending(CMD_WRITE, offset, size), flags, payload))
            offset += size

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        orders: list[Order] = []
        self._writes(orders, offset, buffers, self._fua(fua))
        self._change(orders)
        self._after(fua)

    def _fua(self, wanted: bool) -> int:
        return CMD_FLAG_FUA if wanted and self.capabilities.fua else 0

    def _after(self, fua: bool) -> None:
        """Make a write stable whose request could not ask for that."""
        if fua and not self.capabilities.fua:
            self.flush()

    def _zeroes(self, orders: list[Order], offset: int, length: int, flags: int) -> None:
        self._check_change(offset, length)
        if not self._export.flags & FLAG_SEND_WRITE_ZEROES:
            flags &= CMD_FLAG_FUA
            for begin in range(offset, offset + length, ZEROES_SIZE):
                self._writes(orders, begin, (ZEROES[: min(ZEROES_SIZE, offset + length - begin)],), flags)
                self._not_too_many(orders)
            return
        for begin in range(offset, offset + length, LONG_REQUEST):
            orders.append(Order(Pending(CMD_WRITE_ZEROES, begin, min(LONG_REQUEST, offset + length - begin)), flags))
            self._not_too_many(orders)

    def _not_too_many(self, orders: list[Order]) -> None:
        """Do those *orders* that are there already where they are many; raises as :meth:`_change` does."""
        if len(orders) >= MANY:
            due = orders[:]
            orders.clear()
            self._change(due)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        flags = self._fua(fua) | (0 if unmap else CMD_FLAG_NO_HOLE)
        if not fallback:
            if self.capabilities.zeroes is not Zeroing.NATIVE:
                raise NotSupported("the server does not say whether it zeroes quickly", path=self.filename)
            flags |= CMD_FLAG_FAST_ZERO
        orders: list[Order] = []
        try:
            self._zeroes(orders, offset, length, flags)
            self._change(orders)
        except NotSupported:
            if not fallback:
                raise
            for begin in range(offset, offset + length, ZEROES_SIZE):
                self.write(begin, (ZEROES[: min(ZEROES_SIZE, offset + length - begin)],), fua)
            return
        self._after(fua)

    def _discards(self, orders: list[Order], offset: int, length: int) -> None:
        self._check_change(offset, length)
        if self.capabilities.discard:
            for begin in range(offset, offset + length, LONG_REQUEST):
                orders.append(Order(Pending(CMD_TRIM, begin, min(LONG_REQUEST, offset + length - begin))))
                self._not_too_many(orders)

    def discard(self, offset: int, length: int) -> None:
        orders: list[Order] = []
        self._discards(orders, offset, length)
        self._change(orders)

    def flush(self) -> None:
        changed = self._changed
        if changed == self._flushed or not self._export.flags & FLAG_SEND_FLUSH or self.options.cache_no_flush:
            return
        self._check_sound()
        order = Order(Pending(CMD_FLUSH, 0, 0))
        self._session.run((order,))
        if order.pending.failure is not None:
            self._failure = order.pending.failure.errno
            raise self._error(order.pending)
        self._flushed = changed

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        orders: list[Order] = []
        ends: list[int] = []  #: of each request, behind its last order
        failures: Failures = {}
        flushes: list[int] = []
        changes = False
        for index, (kind, offset, what) in enumerate(batch):
            changes |= kind not in (READ, FLUSH)
            try:
                if kind == READ:
                    self._reads(orders, offset, what)
                elif kind == WRITE_REQUEST:
                    self._writes(orders, offset, (what,), 0)
                elif kind == FLUSH:
                    flushes.append(index)
                elif what > LONG_REQUEST or (kind != DISCARD and not self._export.flags & FLAG_SEND_WRITE_ZEROES):
                    # Of many requests to the server, which are sent some at a time.
                    failures.update(
                        (index, error) for error in (one_by_one(self, ((kind, offset, what),)) or {}).values()
                    )
                elif kind == DISCARD:
                    self._discards(orders, offset, what)
                else:
                    self._zeroes(orders, offset, what, 0 if kind == ZERO_UNMAP else CMD_FLAG_NO_HOLE)
            except CowhandError as error:
                failures[index] = error
            ends.append(len(orders))
        lost: CowhandError | None = None
        try:
            if orders:
                self._session.run(orders)
        except CowhandError as error:
            lost = error
        finally:
            if changes:
                self._changed = next(self._changes)
        begin = 0
        for index, end in enumerate(ends):
            for order in orders[begin:end]:
                if not order.pending.done:
                    assert lost is not None
                    failures.setdefault(index, lost)
                elif order.pending.failure is not None:
                    failures.setdefault(index, self._error(order.pending))
            begin = end
        if flushes:
            try:
                self.flush()
            except CowhandError as error:
                failures.update((index, error) for index in flushes)
        return failures or None

    # -- what is where

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        if self._export.context is None:
            batch.add(offset, length, DATA | ALLOCATED | OFFSET, offset, self)
            return batch
        block = self.limits.request_alignment
        begin = offset - offset % block
        end = min(-(-(offset + length) // block) * block, self.size, begin + STATUS_REQUEST)
        if begin >= end:
            batch.add(offset, length, ZERO | ALLOCATED)  # beyond the end reads give zeroes
            return batch
        pending = Pending(CMD_BLOCK_STATUS, begin, end - begin)
        self._run((Order(pending),))
        end = min(end, offset + length)
        extents = iter(pending.extents)
        for count, state in zip(extents, extents, strict=True):
            # A server that speaks of parts of its own blocks: what is not whole blocks of one kind is data.
            stop = begin + count
            if stop % block and stop < self.size:
                stop -= stop % block
                if stop == begin:
                    stop, state = begin + block, 0
            first, last = max(begin, offset), min(stop, end)
            batch.add(first, last - first, self._flags(state), first, self)
            begin = stop
            if begin >= end or stop != first + count or len(batch) >= MAX_ROWS:
                break
        return batch

    def _flags(self, state: int) -> int:
        """Return what block status *state* says. Depths of QEMU's context are read as flags, which is how its client shows them."""
        if self._context == CONTEXT_QEMU_DEPTH and state > 2:
            state = 2
        flags = OFFSET
        if not state & STATE_HOLE:
            flags |= DATA | ALLOCATED
        if state & STATE_ZERO:
            flags |= ZERO | ALLOCATED
        return flags

    # -- life

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'", path=self.filename)
        if size != self.size:
            raise NotSupported("Cannot resize NBD nodes", path=self.filename)

    def close(self) -> None:
        self._session.close()


def _pieces(buffers: Sequence[Buffer], longest: int) -> list[tuple[list[memoryview], int]]:
    """Cut *buffers*, one behind the other, into lists of views of *longest* bytes each but the last."""
    pieces: list[tuple[list[memoryview], int]] = []
    current: list[memoryview] = []
    room = longest
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view):
            part = view[:room]
            current.append(part)
            room -= len(part)
            view = view[len(part) :]
            if not room:
                pieces.append((current, longest))
                current, room = [], longest
    if current:
        pieces.append((current, longest - room))
    return pieces
