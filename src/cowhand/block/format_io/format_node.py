"""The writing half of the format layer: write, copy-on-write, zero and discard over a mapping, written once for every format.

A driver answers :meth:`MappedFormat.map` (:mod:`cowhand.block.format_io.mapped`, the reading half) and ``reserve``,
``link`` and ``abandon``; it never
touches guest data.

In-place writes take no lock. Everything else goes by reservations, see :mod:`cowhand.block.format_io.reservations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from cowhand.block.format_io.mapped import PLAIN_MASK, MappedFormat
from cowhand.block.format_io.reservations import Kind, Reservation, ReservingNode
from cowhand.block.node.node import Child, Zeroing
from cowhand.block.node.options import NodeOptions
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, give, is_zero, take
from cowhand.core.errors import NotSupported
from cowhand.core.extents import DATA, ENCODED, IN_PLACE, OFFSET, ZERO
from cowhand.core.locks import RANK_SECTOR, ranked_lock

#: flags of a run whose bytes can be overwritten where they lie, and those that forbid it
IN_PLACE_RUN = DATA | OFFSET | IN_PLACE
IN_PLACE_MASK = PLAIN_MASK | IN_PLACE
#: the same for bytes that are stored in another form than their own: what is damaged has no OFFSET
STORED_MASK = IN_PLACE_MASK & ~ENCODED


class FormatNode(ReservingNode, MappedFormat):
    """A format that can be written. Drivers set ``allocation_unit`` and ``copy_unit`` (bytes) before any I/O."""

    DIRECT_WRITE: ClassVar[tuple[int, int]] = (IN_PLACE_MASK, IN_PLACE_RUN)
    #: Guest bytes are stored in another form than their own (see :meth:`encode`).
    encodes: bool = False

    @property
    def spare_unit(self) -> int:
        """Parts of new units that :meth:`spare` can leave out begin and end at its multiples."""
        return self.copy_unit

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.detects_zeroes = options.detect_zeroes != "off"
        #: Up to where the file of the data has to reach when tables are next written: new units were filled in part, and read as zeroes behind that.
        self.blank_end = 0
        #: Held while encoded blocks are written in place, see :mod:`cowhand.block.format_io.encoded`.
        self.block_lock = ranked_lock(RANK_SECTOR, "sector")

    def refit(self) -> None:
        super().refit()
        self.detects_zeroes = self.options.detect_zeroes != "off"

    # -- what a driver answers

    def encode(self, host: int, offset: int, data: memoryview) -> Buffer:
        """Return what is to be stored at *host* for the guest's *data* at *offset*, where ``encodes`` says that this differs."""
        raise NotSupported(f"driver '{self.driver}' cannot encode")

    def store(self, child: Child, host: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the guest's *buffers* at *offset*, whole units, to *host* of *child* as they are stored. Nobody sees the place yet."""
        if not self.encodes:
            child.write(host, buffers)
            return
        from cowhand.block.format_io import encoded

        encoded.store(self, child, host, offset, buffers)

    def overwrite(self, child: Child, host: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the guest's *buffers* at *offset* in place, to *host* of *child* as they are stored."""
        if not self.encodes:
            child.write(host, buffers)
            return
        from cowhand.block.format_io import encoded

        encoded.overwrite(self, child, host, offset, buffers)

    # -- writing

    @property
    def may_write_directly(self) -> bool:
        """True when a write in place needs no more than the write itself."""
        return self._writing and self.poison is None and not self.detects_zeroes

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        if not self._writing or self.poison is not None:
            self.check_writable()
        if len(buffers) == 1 and not self.detects_zeroes:
            run = self.map(offset, len(buffers[0])) if len(buffers[0]) else None
            if run is None:
                return
            if run[1] & IN_PLACE_MASK == IN_PLACE_RUN and run[0] == len(buffers[0]) and run[2] is not None:
                if self.event_sink is not None:
                    self.event_sink("write_aio")
                run[2].write(run[3], buffers)
                self.changed = True
                if fua:
                    # The mapping of these bytes may itself not be stable yet.
                    self.flush()
                return
        views = [memoryview(buffer) for buffer in buffers]
        length = sum(len(view) for view in views)
        position = 0
        while position < length:
            position += self._write_piece(offset + position, views, position, length - position)
        if fua:
            self.flush()

    def _write_piece(self, offset: int, views: Sequence[memoryview], skip: int, length: int) -> int:
        """Write the longest piece that one run or one reservation takes; return its length."""
        if self.detects_zeroes:
            done = self._write_detected(offset, views, skip, length)
            if done:
                return done
        while True:
            count, flags, child, host = self.map(offset, length)
            reservation = None
            in_place = flags & STORED_MASK == IN_PLACE_RUN and child is not None
            if not in_place or (count < length and self._goes_on(offset, count, length, host)):
                reservation = self.claim(offset, length, Kind.DATA, continues=skip > 0)
            if reservation is not None:
                break
            if in_place and child is not None:
                if self.event_sink is not None:
                    self.event_sink("write_aio")
                self.overwrite(child, host, offset, _slice(views, skip, count))
                self.changed = True
                return count
        count = min(length, reservation.end - offset)
        try:
            self.put(reservation, offset, _slice(views, skip, count), count)
        except BaseException as error:
            self.give_up(reservation, error)
            raise
        self.finish(reservation)
        return count

    def _goes_on(self, offset: int, count: int, length: int, host: int) -> bool:
        """Tell whether what follows *count* bytes that are written in place has its own place right behind, but reads as zeroes."""
        if offset % self.allocation_unit:
            return False
        flags, place = self.map(offset + count, length - count)[1:4:2]
        return flags & (ZERO | OFFSET) == ZERO | OFFSET and place == host + count

    def _write_detected(self, offset: int, views: Sequence[memoryview], skip: int, length: int) -> int:
        unit = self.allocation_unit
        if offset % unit or length < unit:
            return 0
        count = length - length % unit
        if not all(is_zero(view) for view in _slice(views, skip, count)):
            return 0
        self.write_zeroes(offset, count, unmap=self.options.detect_zeroes == "unmap")
        return count

    def put(self, reservation: Reservation, offset: int, data: list[memoryview], count: int) -> None:
        """Place guest *data* and what has to surround it in the reserved units."""
        child = reservation.child
        assert child is not None
        begin, end = reservation.begin, reservation.end
        head, tail = offset - begin, end - (offset + count)
        borrowed: list[memoryview] = []
        try:
            before = self._surroundings(reservation, begin, head, borrowed)
            after = self._surroundings(reservation, offset + count, tail, borrowed)
            pieces = [*before, *data, *after]
            if tail > 0 and not after:
                # The next write-back makes the file reach so far, once for many writes.
                self.blank_end = max(self.blank_end, reservation.host + (end - reservation.offset))
            if self.event_sink is not None:
                self.event_sink("write_aio")
            start = begin if before or not head else offset
            self.store(child, reservation.host + (start - reservation.offset), start, pieces)
        finally:
            for buffer in borrowed:
                give(buffer)

    def _surroundings(
        self, reservation: Reservation, offset: int, length: int, borrowed: list[memoryview]
    ) -> list[memoryview]:
        """Return what is to be copied to ``[offset, offset + length)`` of new units; nothing where both old and new read as zeroes."""
        if length <= 0:
            return []
        if reservation.blank or self.known_zero(offset, length):
            if reservation.fresh and not self.encodes:
                return []
            return [ZEROES[: min(ZEROES_SIZE, length - at)] for at in range(0, length, ZEROES_SIZE)]
        buffer = take(length)
        borrowed.append(buffer)
        if self.event_sink is not None:
            self.event_sink("cow_read")
        MappedFormat.read_into(self, offset, buffer)
        return [buffer]

    def known_zero(self, offset: int, length: int) -> bool:
        """Tell whether ``[offset, offset + length)`` reads as zeroes by what this layer says, without a look at those below."""
        run = self.map(offset, length)
        if run[0] < length:
            return False
        if run[1] & (ZERO | DATA):
            return bool(run[1] & ZERO)
        below = self.children.get("backing")
        return below is None or offset >= below.node.size

    # -- zeroes and discards

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.check_writable()
        unit = self.copy_unit
        end = offset + length
        kind = Kind.ZERO_UNMAP if unmap else Kind.ZERO
        while offset < end:
            begin = offset - offset % unit
            whole = end if end == self.size else end - end % unit
            if offset == begin and offset < whole and self.capabilities.zeroes is Zeroing.NATIVE:
                whole = self._end_of_zeroes(offset, whole)
                try:
                    self.change(offset, -(-(whole - offset) // unit) * unit, kind)
                except NotSupported:
                    # The driver refuses by kind, before anything is changed: this image cannot say "zero here".
                    if not fallback:
                        raise
                    self._zero_bytes(offset, whole - offset)
                offset = whole
                continue
            count = min(end, begin + unit) - offset
            self._zero_partial(offset, count, kind, fallback)
            offset += count
        if fua:
            self.flush()

    def _end_of_zeroes(self, offset: int, end: int) -> int:
        """Return up to where one change goes: a part of an allocation unit, or whole ones. A driver may refuse a part."""
        unit = self.allocation_unit
        if unit == self.copy_unit:
            return end
        if offset % unit:
            return min(end, offset - offset % unit + unit)
        return end if end == self.size or end < offset + unit else end - end % unit

    def _zero_partial(self, offset: int, length: int, kind: Kind, fallback: bool) -> None:
        """Zero a part of one unit: the whole unit where the rest reads as zeroes anyway and no data is stored for it."""
        unit = self.copy_unit
        begin = offset - offset % unit
        inside = min(unit, self.size - begin)
        _, flags, _, _ = self.map(begin, inside)
        around = self.capabilities.zeroes is Zeroing.NATIVE and not flags & DATA
        if (
            around
            and self.reads_zero(begin, offset - begin)
            and self.reads_zero(offset + length, begin + inside - offset - length)
        ):
            try:
                self._zero_unit_unless_written(begin, inside, kind)
                return
            except NotSupported:
                if self.reads_zero(offset, length):
                    return
        if not fallback:
            raise NotSupported(
                "less than an allocation unit can only be zeroed by writing bytes", path=self.filename, offset=offset
            )
        self._zero_bytes(offset, length)

    def _zero_unit_unless_written(self, begin: int, inside: int, kind: Kind) -> None:
        # Between the look at the neighbours and the reservation somebody may have written there; so look again while holding the unit.
        reservation = self.claim(begin, self.copy_unit, kind)
        assert reservation is not None
        if self.reads_zero(begin, inside) or not self.map(begin, inside)[1] & DATA:
            self.finish(reservation)
            return
        self.withdraw(reservation)
        raise NotSupported("the unit was written meanwhile", path=self.filename, offset=begin)

    def _zero_bytes(self, offset: int, length: int) -> None:
        for position in range(offset, offset + length, ZEROES_SIZE):
            count = min(ZEROES_SIZE, offset + length - position)
            done = 0
            while done < count:
                done += self._write_raw_piece(position + done, count - done)

    def _write_raw_piece(self, offset: int, length: int) -> int:
        # Not through _write_piece: zero detection would come back here.
        count, flags, child, host = self.map(offset, length)
        if flags & STORED_MASK == IN_PLACE_RUN and child is not None:
            self.overwrite(child, host, offset, (ZEROES[:count],))
            self.changed = True
            return count
        reservation = self.claim(offset, length, Kind.DATA)
        if reservation is None:
            return 0
        count = min(length, reservation.end - offset)
        try:
            self.put(reservation, offset, [ZEROES[:count]], count)
        except BaseException as error:
            self.give_up(reservation, error)
            raise
        self.finish(reservation)
        return count

    def discard(self, offset: int, length: int) -> None:
        if self.options.discard == "ignore":
            return
        unit = self.allocation_unit
        end = offset + length
        begin = -(-offset // unit) * unit
        whole = -(-end // unit) * unit if end == self.size else end - end % unit
        if begin < whole:
            self.change(begin, whole - begin, Kind.DISCARD)
        if (offset < begin or whole < end) and self.poison is not None:
            raise self._poisoned()  # the rest changes nothing, but is a request like any other

    def make_empty(self) -> bool:
        """Let the backing file show through everywhere at once (inside a quiesce); False where that is done unit by unit. Raises CowhandError."""
        return False

    def unused_space(self, end: int) -> int | None:
        """Return the bytes before *end* of the file that new units could still be given, at most; None where that is not known."""
        return None

    def tables_needed(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Return the bytes that new units for *ranges*, (offset, length) and rising, need beside their data."""
        return 0

    def write_compressed(self, offset: int, payload: Buffer) -> None:
        """Store *payload*, the encoded form of the one allocation unit at *offset*. Raises NotSupported where the unit holds data already."""
        self.check_writable()
        reservation = self.claim(offset, self.allocation_unit, Kind.COMPRESSED, len(payload))
        if reservation is None:
            raise NotSupported(
                "compressed data can only be written to unallocated clusters",
                qemu="Input/output error", path=self.filename, offset=offset, errno=5,
            )  # fmt: skip
        try:
            assert reservation.child is not None
            if self.event_sink is not None:
                self.event_sink("write_compressed")
            reservation.child.write(reservation.host, (payload,))
        except BaseException as error:
            self.give_up(reservation, error)
            raise
        self.finish(reservation)


def _slice(views: Sequence[memoryview], skip: int, length: int) -> list[memoryview]:
    """Return the *length* bytes that follow the first *skip* of *views*, without copying."""
    if len(views) == 1:
        return [views[0][skip : skip + length]]
    out: list[memoryview] = []
    for view in views:
        size = len(view)
        if skip >= size:
            skip -= size
            continue
        piece = view[skip : skip + length]
        skip = 0
        out.append(piece)
        length -= len(piece)
        if not length:
            break
    return out
