"""The disk: the handle that users hold, and the gateway that every request passes once.

The gateway checks range and permission, numbers the request (:mod:`cowhand.block.graph.request_order`), lets itself
be shut (quiesce), counts, and makes writes stable where the cache mode demands it. Nodes trust their arguments.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from cowhand.block.graph import graph
from cowhand.block.graph.drain import Gate
from cowhand.block.graph.request_order import next_number
from cowhand.block.graph.users import DiskListener, UserEdge
from cowhand.block.node.node import (
    ALL_PERMISSIONS,
    CONSISTENT_READ,
    DISCARD,
    FLUSH,
    READ,
    RESIZE,
    WRITE,
    WRITE_REQUEST,
    ZERO_REQUEST,
    ZERO_UNMAP,
    BlockNode,
    Failures,
    Request,
    Role,
    Zeroing,
)
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer
from cowhand.core.errors import Closed, InvalidArgument, NotSupported, OutOfRange, ReadOnly
from cowhand.core.units import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowhand.block.node.guard import Guard
    from cowhand.core.extents import ExtentBatch

_disk_numbers = itertools.count()
_KIND_NAMES = ("read", "write", "write zeroes", "write zeroes (unmap)", "discard", "flush")


class Disk:
    """A disk to read and write. Thread-safe; calls block and release the interpreter lock while they wait.

    Offsets and lengths are in bytes, of any alignment. A buffer is borrowed until the call returns. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        root: BlockNode,
        *,
        writable: bool = False,
        resizable: bool | None = None,
        shared: int = ALL_PERMISSIONS,
        write_through: bool = False,
        name: str | None = None,
    ) -> None:
        self.name = name or f"disk{next(_disk_numbers)}"
        self.read_only = not writable
        self.write_through = write_through
        self.resizable = resizable is not False
        self.in_flight: dict[int, tuple[str, int, int, int]] = {}
        self.statistics = [
            0
        ] * 12  #: by request kind: count at [kind], bytes at [6 + kind]; read them with :meth:`counters`
        #: Makes the guard of an operation that changes what others show (cutting off, going back to a snapshot); None: nothing looks for them.
        self.guard: Callable[[], Guard] | None = None
        self.gate = Gate(self)
        self.edge = UserEdge(self)
        self.listeners: tuple[DiskListener, ...] = ()
        self._closed = False
        self._size = 0
        self._root: BlockNode | None = None
        if writable and not root.writable:
            raise ReadOnly(f"'{root.filename}' was opened for reading only", path=root.filename)
        perm = CONSISTENT_READ
        if writable:
            perm |= WRITE | (RESIZE if self.resizable else 0)
        graph.attach_disk(self.edge, root, perm, shared)
        self.root_changed()

    # -- state

    @property
    def root(self) -> BlockNode:
        """The node that the disk reads and writes now."""
        return self.edge.node

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    @property
    def format(self) -> str:
        """Name of the root's driver."""
        return self.edge.node.driver

    @property
    def filename(self) -> str:
        return self.edge.node.filename

    def root_changed(self) -> None:
        """Learn a new root or a new size of it, and tell the listeners (inside a quiesce, or before anybody uses the disk)."""
        before, old = self._size, self._root
        self._root = self.edge.node
        self._size = self._root.size
        for listener in self.listeners:
            if self._root is not old:
                listener.replaced(self, self._root)
            if self._size != before:
                listener.resized(self, self._size)

    def listen(self, listener: DiskListener) -> None:
        """Tell *listener* from now on when the disk is resized, gets another root, fails, or is closed."""
        self.listeners = (*self.listeners, listener)

    def stop_listening(self, listener: DiskListener) -> None:
        """End :meth:`listen`."""
        self.listeners = tuple(known for known in self.listeners if known is not listener)

    def share(self, shared: int) -> None:
        """Let other users of the root do what *shared* allows (permissions of :mod:`cowhand.block.node.node`), and nothing else.

        Raises PermissionConflict where one does more already; nothing has changed then.
        """
        graph.set_permissions(self.edge, self.edge.perm, shared)

    def counters(self) -> dict[str, dict[str, int]]:
        """Return {"read": {"requests": n, "bytes": n}, ...} since the disk was opened; approximate while requests run."""
        return {
            name: {"requests": self.statistics[kind], "bytes": self.statistics[6 + kind]}
            for kind, name in enumerate(_KIND_NAMES)
        }

    # -- the gateway

    def _enter(self, kind: int, offset: int, length: int) -> int:
        number = next_number()
        in_flight = self.in_flight
        while True:
            in_flight[number] = (_KIND_NAMES[kind], offset, length, threading.get_ident())
            if not self.gate.closed or self.gate.passes(number):
                break
            self._leave(number)
            self.gate.wait_open()
            number = next_number()
        if self._closed:
            self._leave(number)
            self.check_open()
        return number

    def check_open(self) -> None:
        """Raise Closed after :meth:`close`: for what changes the image by another way than a request."""
        if self._closed:
            raise Closed(f"disk '{self.name}' is closed")

    def _leave(self, number: int) -> None:
        del self.in_flight[number]
        drained = self.gate.drained
        if drained is not None:
            drained.set()

    def _refuse_range(self, offset: int, length: int) -> OutOfRange:
        return OutOfRange(
            f"bytes {offset} to {offset + length} are not inside the disk of {self._size} bytes",
            path=self.filename,
            offset=offset,
        )

    def _refuse_writing(self) -> ReadOnly:
        return ReadOnly(
            f"disk '{self.name}' is open for reading only", path=self.filename, hint="Open it with writable=True."
        )

    # Every request checks its range inside the gate: the size does not change while it is in flight.

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*. Raises OutOfRange, IOFailed and other CowhandErrors."""
        if not 0 <= length <= self._size:  # before there is a buffer
            raise self._refuse_range(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the writable, contiguous *buffer* from *offset*; on an error its content is undefined."""
        length = len(buffer)
        number = self._enter(READ, offset, length)
        try:
            if offset < 0 or offset + length > self._size:
                raise self._refuse_range(offset, length)
            self.edge.read_into(offset, buffer)
        finally:
            self._leave(number)
        self.statistics[READ] += 1
        self.statistics[6 + READ] += length

    def write(self, offset: int, *buffers: Buffer, fua: bool = False) -> None:
        """Write *buffers*, one behind the other, at *offset*. With *fua*, or in write-through mode, they are stable on return."""
        length = sum([len(buffer) for buffer in buffers])
        if self.read_only:
            raise self._refuse_writing()
        number = self._enter(WRITE_REQUEST, offset, length)
        try:
            if offset < 0 or offset + length > self._size:
                raise self._refuse_range(offset, length)
            self.edge.write(offset, buffers, fua or self.write_through)
        finally:
            self._leave(number)
        self.statistics[WRITE_REQUEST] += 1
        self.statistics[6 + WRITE_REQUEST] += length

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        """Make *length* bytes at *offset* read as zeroes.

        *unmap* allows giving their space back. Without *fallback*, NotSupported is raised where only writing bytes would do it.
        """
        if self.read_only:
            raise self._refuse_writing()
        kind = ZERO_UNMAP if unmap else ZERO_REQUEST
        number = self._enter(kind, offset, length)
        fua = fua or self.write_through
        try:
            if offset < 0 or length < 0 or offset + length > self._size:
                raise self._refuse_range(offset, length)
            if self.edge.node.capabilities.zeroes is not Zeroing.NONE:
                self.edge.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)
            elif not fallback:
                raise NotSupported(f"driver '{self.format}' cannot write zeroes but by writing bytes")
            else:
                for position in range(offset, offset + length, ZEROES_SIZE):
                    self.edge.write(position, (ZEROES[: min(ZEROES_SIZE, offset + length - position)],), fua)
        finally:
            self._leave(number)
        self.statistics[kind] += 1
        self.statistics[6 + kind] += length

    def discard(self, offset: int, length: int) -> None:
        """Say that *length* bytes at *offset* are no longer needed. Advisory; they may keep their content, and never show a backing file's."""
        if self.read_only:
            raise self._refuse_writing()
        number = self._enter(DISCARD, offset, length)
        try:
            if offset < 0 or length < 0 or offset + length > self._size:
                raise self._refuse_range(offset, length)
            if self.edge.node.capabilities.discard:
                self.edge.discard(offset, length)
        finally:
            self._leave(number)
        self.statistics[DISCARD] += 1
        self.statistics[6 + DISCARD] += length

    def flush(self) -> None:
        """Make everything stable that was acknowledged before the call."""
        if self.read_only:
            return
        number = self._enter(FLUSH, 0, 0)
        try:
            self.edge.flush()
        finally:
            self._leave(number)
        self.statistics[FLUSH] += 1

    def submit(self, batch: Sequence[Request]) -> None:
        """Do many requests with one pass of the gateway; see :data:`cowhand.block.node.node.Request` for their form.

        They may run in any order and together; when one fails the error is raised after the rest has ended.
        """
        total, counts = [0] * 6, [0] * 6
        end = 0
        for kind, offset, what in batch:
            length = what if kind >= ZERO_REQUEST else len(what)
            if offset < 0 or length < 0:
                raise self._refuse_range(offset, length)
            if offset + length > end:
                end = offset + length
            total[kind] += length
            counts[kind] += 1
        writes, changes = any(counts[WRITE_REQUEST:]), any(counts[ZERO_REQUEST:])
        if writes and self.read_only:
            raise self._refuse_writing()
        number = self._enter(batch[0][0] if batch else FLUSH, batch[0][1] if batch else 0, sum(total))
        try:
            if end > self._size:
                raise self._refuse_range(*next((o, e - o) for o, e in _spans(batch) if e > self._size))
            failures = self.edge.submit(self._possible(batch)[0] if changes else batch)
            if failures:
                raise failures[min(failures)]
            if writes and self.write_through:
                self.edge.flush()
        finally:
            self._leave(number)
        statistics = self.statistics
        for kind in range(6):
            statistics[kind] += counts[kind]
            statistics[6 + kind] += total[kind]

    def submit_each(self, batch: Sequence[Request], *, stable: Collection[int] = ()) -> Failures:
        """Do many requests as :meth:`submit` does, and return {index of a request: its error} of those that failed.

        The requests whose indices are in *stable* (writes, zeroes, discards) are stable on return, by one flush for all of them. What one
        request does wrong (a range outside of the disk, a change of a disk that is open for reading) is its own error. Raises Closed.
        """
        failures: Failures = {}
        changes = False
        first = batch[0] if batch else (FLUSH, 0, 0)
        number = self._enter(first[0], first[1], 0)
        try:
            size = self._size
            lengths: list[int] = []
            for index, (kind, offset, what) in enumerate(batch):
                length = what if kind >= ZERO_REQUEST else len(what)
                lengths.append(length)
                if offset < 0 or length < 0 or offset + length > size:
                    failures[index] = self._refuse_range(offset, length)
                elif WRITE_REQUEST <= kind < FLUSH:
                    changes = True
                    if self.read_only:
                        failures[index] = self._refuse_writing()
            todo, origins = self._rest(batch, failures) if failures else (batch, None)
            if changes:
                todo, origins = self._possible(todo, origins)
            try:
                failed = self.edge.submit(todo) if todo else None
            except Exception as error:  # noqa: BLE001 - each of them is told
                failed = dict.fromkeys(range(len(todo)), error)
            for index, failure in (failed or {}).items():
                failures.setdefault(origins[index] if origins is not None else index, failure)
            if changes and (stable or self.write_through):
                self._make_stable(batch, failures, range(len(batch)) if self.write_through else stable)
        finally:
            self._leave(number)
        statistics = self.statistics
        for index, (kind, _, _) in enumerate(batch):
            if index not in failures:
                statistics[kind] += 1
                statistics[6 + kind] += lengths[index]
        return failures

    def _rest(self, batch: Sequence[Request], failures: Failures) -> tuple[Sequence[Request], list[int] | None]:
        """Return the requests of *batch* that have not failed, and their indices."""
        origins = [index for index in range(len(batch)) if index not in failures]
        return [batch[index] for index in origins], origins

    def _make_stable(self, batch: Sequence[Request], failures: Failures, wanted: Collection[int]) -> None:
        """Flush for those changes of *batch* that are *wanted* stable; a flush that fails is the error of each of them."""
        done = [index for index in wanted if WRITE_REQUEST <= batch[index][0] < FLUSH and index not in failures]
        if not done:
            return
        try:
            self.edge.flush()
        except Exception as error:  # noqa: BLE001 - each of them is told
            failures.update(dict.fromkeys(done, error))

    def _possible(
        self, batch: Sequence[Request], origins: list[int] | None = None
    ) -> tuple[Sequence[Request], list[int] | None]:
        """Return *batch* without what the root cannot do: discards left out, zeroes written as bytes, as the single calls have it.

        *origins* are the requests' indices where they are not 0, 1, 2, ...; they are returned with the batch.
        """
        capabilities = self.edge.node.capabilities
        if capabilities.discard and capabilities.zeroes is not Zeroing.NONE:
            return batch, origins
        out: list[Request] = []
        places: list[int] = []
        for index, (kind, offset, what) in enumerate(batch):
            if kind == DISCARD and not capabilities.discard:
                continue
            if kind in (ZERO_REQUEST, ZERO_UNMAP) and capabilities.zeroes is Zeroing.NONE:
                ends = range(offset, offset + what, ZEROES_SIZE)
                out.extend((WRITE_REQUEST, at, ZEROES[: min(ZEROES_SIZE, offset + what - at)]) for at in ends)
            else:
                out.append((kind, offset, what))
            places.extend([origins[index] if origins is not None else index] * (len(out) - len(places)))
        return out, places

    def read_vmstate(self, offset: int, length: int) -> bytes:
        """Return *length* bytes of the VM state at *offset*; it lies outside of ``size``. Raises NotSupported where there is none, OutOfRange."""
        self._check_vmstate(offset, length)
        buffer = bytearray(length)
        number = self._enter(READ, offset, length)
        try:
            self.edge.node.read_vmstate(offset, buffer)
        finally:
            self._leave(number)
        return bytes(buffer)

    def write_vmstate(self, offset: int, *buffers: Buffer) -> None:
        """Write *buffers* to the VM state at *offset*. Raises as :meth:`write` does, and NotSupported."""
        if self.read_only:
            raise self._refuse_writing()
        length = sum(len(buffer) for buffer in buffers)
        self._check_vmstate(offset, length)
        number = self._enter(WRITE_REQUEST, offset, length)
        try:
            self.edge.node.write_vmstate(offset, buffers)
            if self.write_through:
                self.edge.flush()
        finally:
            self._leave(number)

    def _check_vmstate(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > MAX_SIZE:
            raise OutOfRange(f"no VM state has bytes {offset} to {offset + length}", path=self.filename, offset=offset)

    @contextmanager
    def lease(self) -> Iterator[int]:
        """Keep every host offset that is learnt inside the ``with`` block valid until its end: nothing freed meanwhile is used again."""
        number = self._enter(READ, 0, self._size)
        try:
            yield number
        finally:
            self._leave(number)

    # -- what is where

    def extents(self, offset: int = 0, length: int | None = None, *, depth: int | None = None) -> Iterator[ExtentBatch]:
        """Yield what the disk is made of in ``[offset, offset + length)``, in batches; each is atomic, the sequence is not.

        *depth* limits how many layers are asked (1: the root alone; what it does not allocate is then neither DATA nor ZERO).
        """
        from cowhand.block.graph.block_status import layered

        end = self._size if length is None else offset + length
        if offset < 0 or end > self._size or end < offset:
            raise self._refuse_range(offset, end - offset)
        position = offset
        while position < end:
            number = self._enter(READ, position, end - position)
            try:
                batch = layered(self.edge.node, position, end - position, depth)
            finally:
                self._leave(number)
            yield batch
            position = batch.end

    # -- shape

    @contextmanager
    def still(self, *, below: bool = False) -> Iterator[BlockNode]:
        """Hold all requests to the root back, and give the root, for the length of the ``with`` block; see :func:`graph.quiesce`.

        With *below* also those of other disks to what lies below the root, but for backing files.
        """
        while True:
            node = self.edge.node
            with graph.quiesce(*(_changed_with(node) if below else (node,))):
                # Somebody may have replaced it before the gate was ours.
                if self.edge.node is node:
                    yield node
                    return

    def resize(self, size: int | str, *, preallocation: str = "off", shrink: bool = False, force: bool = False) -> None:
        """Make the disk *size* bytes long; new bytes read as zeroes, also over a longer backing file. Cutting data off needs *shrink*.

        *size* is a number, or text such as "20G".

        *preallocation* of what is new: off, metadata, falloc, full. To cut off what other images show is refused (OverlaysExist,
        SearchIncomplete) for a disk that ``cowhand.open`` gave, unless *force* is set. Raises InvalidArgument, NotSupported, ReadOnly, NoSpace,
        IOFailed.
        """
        if self.read_only:
            raise self._refuse_writing()
        if isinstance(size, str):
            from cowhand.core.units import parse_size

            size = parse_size(size)
        if size < 0:
            raise InvalidArgument(f"a disk cannot have {size} bytes", path=self.filename)
        self.check_open()
        if size < self._size and shrink and self.guard is not None:
            from cowhand.block.node.guard import change_of

            change = change_of(self.edge.node, f"cutting off the end of '{self.filename}'")
            self.guard().refuse(change, force=force)
        with self.still(below=True) as node:
            self.check_open()
            if size < self._size and not shrink:
                raise InvalidArgument(
                    f"'{self.filename}' would lose its last {self._size - size} bytes",
                    hint="Shrink the file systems and partitions inside first, then insist with shrink.",
                )
            try:
                node.resize(size, preallocation=preallocation, shrink=shrink)
            finally:
                # What failed may have come as far as the new size.
                for disk in graph.disks_above(_changed_with(node)):
                    disk.root_changed()

    def replace_root(self, node: BlockNode) -> None:
        """Make *node* what this disk reads and writes, under running requests: none is lost, none reaches the old root afterwards."""
        graph.replace_root(self, node)

    def as_file(self) -> io.BufferedIOBase:
        """Return the disk as a seekable binary file object (its own position; closing it leaves the disk open)."""
        from cowhand.block.disk_file import DiskFile

        raw = DiskFile(self)
        return io.BufferedReader(raw) if self.read_only else io.BufferedRandom(raw)

    def close(self) -> None:
        """Flush what is cached and give the image back. Calling it twice is allowed. Raises the error of the last write-back."""
        with self.still() as node:
            if self._closed:
                return
            self._closed = True
            failure: Exception | None = None
            if not self.read_only:
                try:
                    node.flush()
                except Exception as error:  # noqa: BLE001 - kept, and raised at the end
                    failure = error
                except BaseException:
                    self._closed = False  # interrupted: nothing is given back yet, and closing can be called again
                    raise
            try:
                graph.detach(self.edge)
            except Exception as error:  # noqa: BLE001 - kept, and raised at the end
                failure = failure or error
            else:
                if failure is not None and node.closed and getattr(node, "changed", True) is False:
                    failure = None  # the format wrote back all of it in the end
            for listener in self.listeners:
                listener.closed(self)
        if failure is not None:
            raise failure

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # noqa: BLE001 - kept, and raised at the end
            error.add_note(f"closing '{self.name}' failed too: {second}")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "read-only" if self.read_only else "writable"
        return f"<Disk {self.name} {self.root!r} {state}>"


def _changed_with(node: BlockNode) -> list[BlockNode]:
    """Return *node* and all below it that its resizing may change: everything but backing files."""
    found, stack = [], [node]
    while stack:
        found.append(stack.pop())
        stack.extend(child.node for child in found[-1].children.values() if child.role is not Role.BACKING)
    return found


def _spans(batch: Sequence[Request]) -> Iterator[tuple[int, int]]:
    """Yield (offset, end) of each request."""
    for kind, offset, what in batch:
        yield offset, offset + (what if kind >= ZERO_REQUEST else len(what))
