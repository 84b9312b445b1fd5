"""The reading half of the format layer: reads, batches and extents over a mapping, written once for every format.

A driver answers :meth:`MappedFormat.map`, and :meth:`MappedFormat.decode` where it stores bytes in another form than their own. A format that
is only read is a :class:`ReadOnlyFormat`: its header in ``start``, and ``map``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cowhand.block.node.node import BlockNode, Child, Failures, Request, Role
from cowhand.block.node.options import NodeOptions
from cowhand.core.buffers import Buffer, fill_zero
from cowhand.core.errors import AccessDenied, CowhandError, InvalidArgument, InvalidFormat, NotSupported, ReadOnly
from cowhand.core.extents import COMPRESSED, DATA, ENCODED, OFFSET, ZERO, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

#: flags of a run whose bytes can be read where they lie, and those that forbid it
PLAIN_RUN = DATA | OFFSET
PLAIN_MASK = DATA | OFFSET | COMPRESSED | ENCODED | ZERO
#: Stands for the backing file that the header names, where the user says nothing.
RECORDED = object()


class MappedFormat(BlockNode):
    """A format whose bytes are found by :meth:`map`. Reads take no lock of their own."""

    is_format: ClassVar[bool] = True
    #: (mask, flags) of a run that can be read, or written, where it lies
    DIRECT_READ: ClassVar[tuple[int, int]] = (PLAIN_MASK, PLAIN_RUN)
    DIRECT_WRITE: ClassVar[tuple[int, int]] = (0, -1)
    #: What is allocated, and what is copied, as one; a format that is only read does neither.
    allocation_unit: int = 1
    copy_unit: int = 1
    #: What the header says of the backing file, where the format can name one; see :attr:`backing_link`.
    backing_name: str | None = None
    backing_format: str | None = None
    #: Something was, or may have been, written since the last flush began (:class:`cowhand.block.format_io.reservations.ReservingNode`).
    changed: bool = False
    file: Child

    # -- what a driver answers

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> Self:
        node = cls(options)
        file = given.pop("file", None)
        if file is None:
            raise InvalidArgument(
                f"a {cls.driver} image needs a 'file'", qemu='A block device must be specified for "file"'
            )
        opening.track(node)
        node.file = opening.child(node, "file", file, Role.PRIMARY)
        node.start(opening, given)
        return node

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        """Read and check the header, and open what else belongs to the image; see :meth:`BlockNode.open`. Raises InvalidFormat."""
        raise NotSupported(f"driver '{self.driver}' cannot be opened by options")

    def open_backing(self, opening: Opening, given: Any) -> None:
        """Open what lies below: *given* is None or "" for nothing, RECORDED for what the image names, or what the user says."""
        name, format = self.backing_link or (None, None)
        if isinstance(given, dict) and not opening.with_backing and opening.nesting and not opening.implied:
            opening.backing(self, given)  # only the topmost image is opened alone, and what the user describes is there
            return
        if isinstance(given, dict) and not opening.with_backing:
            raise InvalidArgument(
                f"Block format '{self.driver}' does not support the option 'backing.{next(iter(given))}'"
            )
        if given is None or given == "" or not opening.with_backing:
            return
        if isinstance(given, dict) and name and not {"file", "filename"} & given.keys():
            opening.implicit_backing(self, name, format, given)
        elif given is not RECORDED:
            opening.backing(self, given)
        elif name:
            opening.implicit_backing(self, name, format)

    @property
    def backing_link(self) -> tuple[str, str | None] | None:
        return (self.backing_name, self.backing_format) if self.backing_name else None

    @abstractmethod
    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        """Return a run (see :class:`cowhand.block.node.node.Run`) that begins at *offset* and is at most *length* long. Takes no lock when cached."""

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        """See :meth:`BlockNode.map_batch`; rows' ``node`` is the node that ``host`` lies in. The default asks :meth:`map` for run after run."""
        batch = ExtentBatch()
        end = offset + length
        while offset < end and not batch.full:
            try:
                count, flags, child, host = self.map(offset, end - offset)
            except CowhandError:
                if not batch.start:
                    raise
                break  # what lies before can be told; who asks on meets it first
            batch.add(offset, count, flags, host, child.node if child is not None else None)
            offset += count
        return batch

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        """Fill *view* with the guest bytes at *offset*, which *run* says are compressed or encoded."""
        raise NotSupported(f"driver '{self.driver}' cannot decode")

    def units_at_end(self, offset: int, length: int) -> Iterable[int]:
        """Yield the beginnings of units, from *offset* on, whose compressed bytes may reach behind the end of the file: only reading tells."""
        return ()

    def wrong(self, text: str, offset: int = 0, qemu: str | None = None) -> InvalidFormat:
        """Return the error for a header or a table, at *offset* of the file, that cannot be."""
        primary = self.primary
        path = primary.node.filename if primary is not None else None
        return InvalidFormat(f"{self.driver}: {text}", qemu=qemu or text, path=path, offset=offset)

    # -- reading

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        length = len(view)
        run = self.map(offset, length) if length else (0, 0, None, 0)
        if run[0] == length and run[1] & PLAIN_MASK == PLAIN_RUN and run[2] is not None:
            if self.event_sink is not None:
                self.event_sink("read_aio")
            try:
                run[2].read_into(run[3], buffer)
            except CowhandError as error:
                failed_in(error, run, offset)
                raise
            return
        if run[2] is not None and length - run[0] > 0 and (lane := run[2].lane) is not None and lane.lane_fd >= 0:
            self._announce(lane.lane_fd, run, offset, length)
        position = 0
        while position < length:
            run = self.map(offset + position, length - position)
            count = run[0]
            self._read_run(run, offset + position, view[position : position + count])
            position += count

    def announce(self, offset: int, length: int) -> None:
        """Have the kernel read ``[offset, offset + length)``, as far as this layer stores it plainly, where it has not got it already. A hint."""
        run = self.map(offset, length)
        lane = run[2].lane if run[2] is not None else None
        if lane is not None and lane.lane_fd >= 0:
            self._announce(lane.lane_fd, run, offset, length)

    def _announce(self, descriptor: int, run: tuple[int, int, Child | None, int], offset: int, length: int) -> None:
        """Have the kernel read all runs of a request, the first of which is *run*, at once where it has not got them already."""
        from cowhand.block.format_io import readahead

        if run[1] & PLAIN_MASK != PLAIN_RUN or not readahead.is_cold(descriptor, run[3]):
            return
        child, places, position = run[2], [(run[3], run[0])], run[0]
        while position < length and len(places) < readahead.MOST:
            run = self.map(offset + position, length - position)
            if run[1] & PLAIN_MASK == PLAIN_RUN and run[2] is child:
                places.append((run[3], run[0]))
            position += run[0]
        readahead.announce(descriptor, places)

    def _read_run(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        flags = run[1]
        if flags & ZERO:
            fill_zero(view)
        elif flags & DATA:
            if flags & (COMPRESSED | ENCODED):
                try:
                    self.decode(run, offset, view)
                except CowhandError as error:
                    error.facts["guest_offset"] = offset
                    raise
            else:
                if self.event_sink is not None:
                    self.event_sink("read_aio")
                assert run[2] is not None
                try:
                    run[2].read_into(run[3], view)
                except CowhandError as error:
                    failed_in(error, run, offset)
                    raise
        else:
            self.read_backing(offset, view)

    def read_backing(self, offset: int, view: memoryview) -> None:
        """Fill *view* with what shows through at *offset*: the backing file, and zeroes behind its end."""
        # A stack instead of recursion: a chain may be longer than Python's.
        pending: list[tuple[MappedFormat, int, memoryview]] = [(self, offset, view)]
        while pending:
            node, start, part = pending.pop()
            below = node.children.get("backing")
            inside = 0
            if below is not None:
                # Not beyond this layer's end either: the VM state lies there, and what a shrunken layer hides of its base.
                inside = max(0, min(len(part), below.node.size - start, node.size - start))
            if inside < len(part):
                fill_zero(part[inside:])
            if not inside or below is None:
                continue
            if node.event_sink is not None:
                node.event_sink("read_backing_aio")
            if isinstance(below.lane, MappedFormat) and type(below.lane).read_into is MappedFormat.read_into:
                pending.extend(below.lane.read_own(start, part[:inside]))
            else:
                below.read_into(start, part[:inside])

    def read_own(self, offset: int, view: memoryview) -> list[tuple[MappedFormat, int, memoryview]]:
        """Fill of *view* what this layer decides; return, as (this node, offset, piece), what shows through from below."""
        missing: list[tuple[MappedFormat, int, memoryview]] = []
        position, length = 0, len(view)
        while position < length:
            run = self.map(offset + position, length - position)
            piece = view[position : position + run[0]]
            if run[1] & (DATA | ZERO):
                self._read_run(run, offset + position, piece)
            else:
                missing.append((self, offset + position, piece))
            position += run[0]
        return missing

    def reads_zero(self, offset: int, length: int) -> bool:
        """Tell whether ``[offset, offset + length)`` is known, without reading data, to read as zeroes."""
        end = offset + length
        while offset < end:
            count, flags, _, _ = self.map(offset, end - offset)
            if not flags & ZERO:
                if flags & DATA:
                    return False
                below = self.children.get("backing")
                if below is not None and offset < below.node.size and not self._backing_zero(below, offset, count):
                    return False
            offset += count
        return True

    def _backing_zero(self, below: Child, offset: int, length: int) -> bool:
        from cowhand.block.graph.block_status import layered

        end = min(offset + length, below.node.size)
        while offset < end:
            batch = layered(below.node, offset, end - offset)
            if not all(flags & ZERO for flags in batch.flags):
                return False
            offset = batch.end
        return True

    def places(self, batch: Sequence[Request]) -> tuple[int, list[int]] | None:
        """Return a descriptor and where in it each request of *batch* lies, -1 for one that goes the long way; or None.

        -2 stands for a write inside one unit that holds nothing yet in all of that place, as far as can be seen without the lock.

        None where the batch is not all reads or all writes, where two requests that follow one another adjoin in the file (they are better
        done together), or where nothing can be told of many at once. What is told holds as long as the caller's lease.
        """
        return None

    # -- many requests at once, and what a format that is only read says to changes

    @property
    def may_write_directly(self) -> bool:
        """True when a write in place needs no more than the write itself."""
        return False

    def check_writable(self) -> None:
        """Raise unless changes may be made."""
        raise ReadOnly(f"'{self.filename}' is open for reading only", path=self.filename)

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        from cowhand.block.format_io.batch import submit

        return submit(self, batch)


def failed_in(error: CowhandError, run: tuple[int, int, Child | None, int], offset: int) -> None:
    """Note in *error*, of reading *run* at guest *offset*, what of the disk could not be read: not where the request began, if it says more."""
    place = error.facts.get("guest_offset", error.offset)
    if place is None or not run[3] <= place < run[3] + run[0]:
        place = run[3]
    error.facts["guest_offset"] = offset + place - run[3]


class ReadOnlyFormat(MappedFormat):
    """A format that can only be read: nothing is ever changed, and QEMU's refusals."""

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> Self:
        node = super().open(opening, options, given)
        if node.writable:
            raise AccessDenied(
                f"{cls.driver} images can only be read", qemu="Image is read-only", errno=13, path=node.file.node.filename,
                hint="Convert it to qcow2 or raw, and write that.",
            )  # fmt: skip
        return node

    def flush(self) -> None:
        """Nothing is ever to be made stable."""
