"""Where a copy writes: through the gateway of any disk, or on the fast lane of a format.

A piece goes through three steps. ``prepare``, in any order and by several threads at once, decides what is to be stored. ``place``, one
piece at a time and in the order of the disk, takes the space. ``store``, by several threads again, moves the bytes and makes them visible.
So a target is laid out in order although its pieces are written by several threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind, Reservation
from cowhand.block.protocols.file.data import MAX_BUFFERS
from cowhand.copy.engine.allocate_ahead import SpaceAhead
from cowhand.copy.engine.zeroes import data_parts
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import IOFailed, from_os_error
from cowhand.core.extents import COMPRESSED, DATA, IN_PLACE, OFFSET, ZERO

if TYPE_CHECKING:
    from cowhand.copy.engine.write_out import WriteBehind

_IN_PLACE = DATA | OFFSET | IN_PLACE
_IN_PLACE_MASK = DATA | OFFSET | IN_PLACE | COMPRESSED | ZERO

#: Positions in a piece's buffer: (begin, end) of what is to be written; the rest reads as zeroes.
Parts = list[tuple[int, int]]


class Sink:
    """Writes through *disk*'s gateway: the way that every target has, with filters, hooks and other users.

    *sparse* is how many bytes of zeroes are worth leaving out (0: none). *reads_zero* says that the target reads as zeroes where nothing was written.
    """

    #: data is written in multiples of it, aligned; and what of these need not be written is left out in multiples of ``part``
    unit = part = 1
    #: whether ``prepare`` takes long enough for it to be worth that another thread, on another core, stores the piece
    works_long = False
    #: whether it pays when data of several runs come as one piece, with gaps between
    joins = False

    def __init__(self, disk: Disk, *, sparse: int, reads_zero: bool) -> None:
        self.disk = disk
        self.sparse = sparse
        self.reads_zero = reads_zero
        self.grain = 1 << (sparse.bit_length() - 1) if sparse else 0
        self.unit = disk.root.limits.request_alignment
        self.part = self.unit
        if isinstance(disk.root, FormatNode):
            self.unit, self.part = disk.root.allocation_unit, disk.root.spare_unit
        self.grain = max(self.grain, self.part) if self.grain else 0
        self.ahead = SpaceAhead(0)
        self.behind: WriteBehind | None = None

    def expect(self, total: int, *, flushed: bool = False) -> None:
        """Learn how many bytes will be written at most, and whether they are *flushed* when all are written."""
        self.ahead = SpaceAhead(total)
        if flushed:
            from cowhand.copy.engine.write_out import WriteBehind

            self.behind = WriteBehind(total)

    def hold(self) -> AbstractContextManager[object]:
        """Return a context in which a piece is placed and stored: where the gateway is passed by, it counts the piece as a request in flight."""
        return nullcontext()

    def prepare(self, offset: int, buffer: bytearray, length: int, gaps: Sequence[tuple[int, int]] = ()) -> Any:
        """Look at the first *length* bytes of *buffer*, which belong to *offset*; return what ``place`` is to be given.

        *gaps* are no part of what is copied, and the target stays there what it is; where zeroes are looked for they are zero in the buffer.
        """
        return _outside(gaps, self.parts_of(offset, buffer, length))

    def parts_of(self, offset: int, buffer: bytearray, length: int) -> Parts:
        """Return what of a piece is worth storing."""
        if not self.grain:
            return [(0, length)]
        return data_parts(buffer, length, offset, self.grain, self.sparse)

    def place(
        self, offset: int, buffer: bytearray, length: int, prepared: Any, gaps: Sequence[tuple[int, int]] = ()
    ) -> Any:
        """Take the space for a piece, and make those parts of it zero that have to be written so; return what ``store`` is to be given."""
        parts: Parts = prepared
        if not self.reads_zero:
            self.zero_between(offset, length, [*parts, *gaps])
        if isinstance(self.disk.root, FormatNode):
            # Here the order of writing is the layout.
            self._write(offset, buffer, parts)
            return []
        return parts

    def store(self, offset: int, buffer: bytearray, placed: Any) -> None:
        """Move the bytes of a piece that was placed, and make them visible."""
        if self.ahead.enabled and self.reads_zero:
            lane = self.disk.edge.lane
            descriptor = lane.lane_fd if lane is not None else -1
            for begin, end in placed:
                self.ahead.allocate(descriptor, offset + begin, end - begin, self.disk.filename)
        self._write(offset, buffer, placed)

    def zero(self, offset: int, length: int) -> None:
        """Make a stretch read as zeroes, without storing them where that can be."""
        self.disk.write_zeroes(offset, length, unmap=True)

    def finish(self) -> None:
        """Say that everything was stored."""

    def zero_between(self, offset: int, length: int, parts: Parts) -> None:
        """Make what lies between *parts*, in any order, read as zeroes."""
        position = 0
        for begin, end in [*sorted(parts), (length, length)]:
            if begin > position:
                self.zero(offset + position, begin - position)
            position = end

    def _write(self, offset: int, buffer: bytearray, parts: Parts) -> None:
        view = memoryview(buffer)
        for begin, end in parts:
            self.disk.write(offset + begin, view[begin:end])


class _Move:
    """Bytes on their way to where a format has them: a range of the piece, its place, and the reservation that is linked afterwards.

    ``last``: no other range of the reservation follows. Without a *child* the format writes them by itself.
    """

    __slots__ = ("begin", "child", "end", "host", "last", "reservation")

    def __init__(self, begin: int, end: int, child: Any, host: int, reservation: Reservation | None) -> None:
        self.begin = begin
        self.end = end
        self.child = child
        self.host = host
        self.reservation = reservation
        self.last = False

    def followed_by(self, other: _Move) -> bool:
        """Tell whether *other* can be written together with this one: right behind it, and into space that is as new."""
        if self.child is not other.child or self.host + self.end - self.begin != other.host:
            return False
        one, two = self.reservation, other.reservation
        return (one is not None and one.fresh) == (two is not None and two.fresh)


class _ThroughGateway:
    """What a piece is placed as while a filter stands between the disk and the format: its parts, written by the gateway."""

    __slots__ = ("parts",)

    def __init__(self, parts: Parts) -> None:
        self.parts = parts


class LaneSink(Sink):
    """The fast lane: space comes from the format in long runs, and the bytes go straight to the file's descriptor.

    Only for a disk whose root is a format with nothing in between (see :func:`lane_of`); its hooks hear of whole pieces.
    Where a filter is inserted meanwhile, the pieces that follow go through the gateway.
    """

    joins = True

    def __init__(self, disk: Disk, node: FormatNode, *, sparse: int, reads_zero: bool) -> None:
        super().__init__(disk, sparse=sparse, reads_zero=reads_zero)
        self.node = node
        node.check_writable()

    def hold(self) -> AbstractContextManager[object]:
        return self.disk.lease()

    @property
    def direct(self) -> bool:
        """Whether the direct path still holds: asked inside a lease, once for each piece, since filters come and go."""
        return lane_of(self.disk) is self.node

    def place(
        self, offset: int, buffer: bytearray, length: int, prepared: Any, gaps: Sequence[tuple[int, int]] = ()
    ) -> Any:
        if not self.direct:
            return _ThroughGateway(super().place(offset, buffer, length, prepared, gaps))
        parts: Parts = prepared
        if not self.reads_zero:
            self.zero_between(offset, length, [*parts, *gaps])
        return self.place_parts(offset, parts)

    def place_parts(self, offset: int, parts: Parts) -> list[_Move]:
        """Take the space for *parts* of the piece at *offset*; on an error nothing stays taken."""
        moves: list[_Move] = []
        try:
            for group in self._groups(offset, parts):
                position, end = group[0][0], group[-1][1]
                while position < end:
                    position = self._place_some(offset, group, position, end, moves)
                    # Between the parts nothing is placed.
                    position = max(position, min((begin for begin, stop in group if stop > position), default=end))
        except BaseException as error:
            self.give_up(moves, error)
            raise
        return moves

    def _groups(self, offset: int, parts: Parts) -> Iterator[Parts]:
        """Yield *parts* in groups that touch every unit from the first to the last."""
        group: Parts = []
        for part in parts:
            if group and (offset + part[0]) // self.unit > (offset + group[-1][1] - 1) // self.unit + 1:
                yield group
                group = []
            group.append(part)
        if group:
            yield group

    def _place_some(self, offset: int, group: Parts, position: int, end: int, moves: list[_Move]) -> int:
        """Place the beginning of what *group* has from *position* on; return up to where."""
        node = self.node
        start = offset + position
        count, flags, child, host = node.map(start, end - position)
        if flags & _IN_PLACE_MASK == _IN_PLACE:
            stop = position + count
            moves += [_Move(b, e, child, host + b - position, None) for b, e in _within(group, position, stop)]
            return stop
        reservation = node.claim(start, end - position, Kind.DATA)
        if reservation is None:
            return position  # somebody else allocated it meanwhile: look again
        stop = min(end, reservation.end - offset)
        unit_end = min(end, reservation.offset + reservation.length - offset)
        if reservation.begin != start or stop < unit_end:
            # There is data around it in its unit. A second reservation in that unit would wait for this one, so the format writes it, later.
            node.withdraw(reservation)
            stop = min(unit_end, position + self.unit - start % self.unit)
            moves += [_Move(b, e, None, -1, None) for b, e in _within(group, position, stop)]
            return stop
        found = self._without_holes(reservation, offset, _within(group, position, stop), stop)
        if found is None:
            # What lies between has to move with its unit: the format knows how.
            node.withdraw(reservation)
            moves += [_Move(b, e, None, -1, None) for b, e in _within(group, position, stop)]
            return stop
        host = reservation.host + (reservation.begin - reservation.offset) - position
        moves += [_Move(b, e, reservation.child, host + b, reservation) for b, e in found]
        moves[-1].last = True
        return stop

    def _without_holes(self, reservation: Reservation, offset: int, parts: Parts, stop: int) -> Parts | None:
        """Have *reservation* leave out what lies between *parts* and behind them; return what is to be written, None where it cannot."""
        out = parts[:1]
        for begin, end in [*parts[1:], (stop, stop)]:
            last = out[-1][1]
            if begin == last:
                out[-1] = (out[-1][0], end)
            elif self.node.spare(reservation, offset + last, offset + begin):
                out.append((begin, end))
            else:
                return None
        return [part for part in out if part[0] < part[1]]

    def store(self, offset: int, buffer: bytearray, placed: Any) -> None:
        if isinstance(placed, _ThroughGateway):
            super().store(offset, buffer, placed.parts)
            return
        moves: list[_Move] = placed
        view = memoryview(buffer)
        done = 0
        try:
            self._put_all(moves, view, offset)
            self.node.changed = True
            for move in moves:
                done += 1
                if move.reservation is not None and move.last:
                    self.node.finish(move.reservation)
        except BaseException as error:
            self.give_up(moves[done:], error)
            raise
        finally:
            for move in moves:
                for hook in self.node.hooks:
                    hook(offset + move.begin, move.end - move.begin)

    def _put_all(self, moves: Sequence[_Move], view: memoryview, offset: int) -> None:
        """Move the bytes of *moves*, whose places adjoin by one system call."""
        together: list[_Move] = []
        low, high = -1, 0
        for move in moves:
            reservation = move.reservation
            data = [view[move.begin : move.end]]
            if move.child is None:
                self.node.write(offset + move.begin, data)
                continue
            if reservation is not None and move.last:
                data += self._rest_of_unit(reservation, offset + move.end)
            if len(data) > 1 or self.node.encodes or move.child.lane is None or move.child.lane.lane_fd < 0:
                put = self.node.overwrite if reservation is None else self.node.store
                put(move.child, move.host, offset + move.begin, data)
                continue
            if together and not together[-1].followed_by(move):
                self._put_together(together, view)
                together = []
            together.append(move)
            low = move.host if low < 0 else min(low, move.host)
            high = max(high, move.host + move.end - move.begin)
        if together:
            self._put_together(together, view)
            if self.behind is not None:
                # All of it, with what lies between: the kernel finds what was written faster than it is told of each.
                self.behind.begin(together[-1].child.lane.lane_fd, low, high - low)

    def _put_together(self, moves: Sequence[_Move], view: memoryview) -> None:
        """Write *moves*, of which each lies behind the one before it, to the descriptor that their place is in."""
        first, child = moves[0], moves[0].child
        descriptor = child.lane.lane_fd
        length = moves[-1].host - first.host + moves[-1].end - moves[-1].begin
        if first.reservation is not None and first.reservation.fresh:
            self.ahead.allocate(descriptor, first.host, length, child.node.filename)
        write_fully(descriptor, [view[move.begin : move.end] for move in moves], first.host, child.node.filename)

    def _rest_of_unit(self, reservation: Reservation, start: int) -> list[memoryview]:
        """Return what follows a piece in its last unit: what the disk shows from *start* on, as far as it goes.

        Behind the end of the disk what lay there must not come back when the disk grows, and the file ends with a whole unit.
        """
        out: list[memoryview] = []
        inside = min(reservation.end, self.node.size) - start
        if inside > 0:
            shown = bytearray(inside)
            self.node.read_into(start, shown)
            out.append(memoryview(shown))
            start += inside
        padding = reservation.end - start
        return out + [ZEROES[: min(ZEROES_SIZE, padding - at)] for at in range(0, padding, ZEROES_SIZE)]

    def give_up(self, moves: Sequence[_Move], error: BaseException) -> None:
        """Take back what was reserved for *moves*."""
        for move in moves:
            if move.reservation is not None and move.last:
                self.node.give_up(move.reservation, error)


def _outside(gaps: Sequence[tuple[int, int]], parts: Parts) -> Parts:
    """Return what of *parts* lies in none of *gaps*; both rise."""
    if not gaps:
        return parts
    out: Parts = []
    first = 0
    for begin, end in parts:
        while first < len(gaps) and gaps[first][1] <= begin:
            first += 1
        at = first
        while at < len(gaps) and gaps[at][0] < end:
            if begin < gaps[at][0]:
                out.append((begin, gaps[at][0]))
            begin = gaps[at][1]
            at += 1
        if begin < end:
            out.append((begin, end))
    return out


def _within(parts: Parts, low: int, high: int) -> Parts:
    """Return what of *parts* lies in ``[low, high)``."""
    return [(max(begin, low), min(end, high)) for begin, end in parts if begin < high and end > low]


def write_fully(descriptor: int, views: Sequence[memoryview], offset: int, name: str) -> None:
    """Write all of *views* (of bytes), one behind the other, at *offset*; raises IOFailed or NoSpace naming the file *name*."""
    waiting = list(views)
    while waiting:
        try:
            count = os.pwritev(descriptor, waiting[:MAX_BUFFERS], offset)
        except OSError as error:
            raised = from_os_error(error, name, doing="writing")
            raised.offset = offset
            raise raised from error
        if count == 0:
            raise IOFailed("writing failed: no bytes were taken", path=name, offset=offset)
        offset += count
        done = 0
        while done < len(waiting) and count >= len(waiting[done]):
            count -= len(waiting[done])
            done += 1
        waiting = waiting[done:]
        if count:
            waiting[0] = waiting[0][count:]


def lane_of(disk: Disk) -> FormatNode | None:
    """Return the format that a copy may reserve space of by itself, or None where every write has to pass the gateway.

    There is no lane where a filter or padding stands between, or in write-through mode.
    """
    node = disk.root
    if disk.write_through or not isinstance(node, FormatNode):
        return None
    if node.event_sink is not None or node.limits.request_alignment > 1:
        return None
    primary = node.primary
    if primary is None or primary.lane is None or primary.lane.lane_fd < 0:
        return None
    return node


def choose(disk: Disk, *, sparse: int, reads_zero: bool) -> Sink:
    """Return the fastest way to write to *disk*."""
    node = lane_of(disk)
    if node is None:
        return Sink(disk, sparse=sparse, reads_zero=reads_zero)
    return LaneSink(disk, node, sparse=sparse, reads_zero=reads_zero)
