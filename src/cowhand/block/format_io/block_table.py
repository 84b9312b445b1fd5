"""Formats whose disk is an array of blocks of one size with an entry for each in a table: the mapping, and how it is changed.

A driver says how an entry reads (*word*, *scale*, *base*, *special*) and where the pages of its table lie (``page_host``). Pages are read when they
are first asked for. A new block's entry reaches the file only by a flush, after the block's bytes are stable: a crash loses what was not flushed, and
leaves blocks that no entry names.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind, Reservation, Unprepared
from cowhand.block.node.node import Capabilities, Zeroing
from cowhand.block.node.options import NodeOptions
from cowhand.core.errors import NoSpace, NotSupported
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, IN_PLACE, NO_HOST, OFFSET, ZERO, ExtentBatch
from cowhand.core.locks import RANK_FLUSH, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.node.node import Child
    from cowhand.block.node.records import CheckResult, Say

#: Places of blocks that are not stored. All others are byte offsets in the file; no format stores a block in its first bytes.
UNALLOCATED, ZEROED = 0, 1
#: Set in the place of a block that is stored compressed; the other bits are the driver's.
PACKED = 1 << 63
#: Pages of tables in memory that are not about to be written; one has at most 64 KiB.
_KEPT_PAGES = 1024
#: Pages that changed before a flush is due.
_DIRTY_PAGES = 256
#: Blocks that one run tells of, and absent pages that it looks at.
_RUN_BLOCKS = 256
#: Entries that are worth an import of numpy.
_MANY = 1 << 16
#: Parts of new blocks that need not be written, in a new image without a backing file.
_SPARE = 4096
_LITTLE = sys.byteorder == "little"


class Page:
    """A part of the table: *entries* as they are in the file (None: nothing is there), at *host*; [*low*, *high*) of them changed."""

    __slots__ = ("entries", "high", "host", "low", "pins")

    def __init__(self, entries: array[int] | None, host: int) -> None:
        self.entries = entries
        self.host = host
        self.low, self.high = sys.maxsize, 0
        self.pins = 0  #: reservations and write-backs that hold it

    def touch(self, low: int, high: int) -> None:
        """Remember that entries [low, high) changed."""
        self.low, self.high = min(self.low, low), max(self.high, high)


class Piece(NamedTuple):
    """Bytes of *page* of the table that changed, on their way to *host* in the file."""

    page: int
    host: int
    data: bytes


class BlockTableFormat(FormatNode):
    """A format over a table of blocks. Drivers set what is declared here, ``allocation_unit`` and ``copy_unit`` when they start."""

    #: Type code of an entry ("I": 32 bits, "Q": 64), and whether its bytes are in the big-endian order.
    word: ClassVar[str] = "I"
    big_endian: ClassVar[bool] = False
    #: A stored block begins at ``entry * scale + base``, unless the entry is in ``special``.
    scale: int = 512
    base: int = 0
    special: dict[int, int]
    #: Entries in a page, and how many the table has in all.
    per_page: int
    entry_count: int
    #: Bytes of the file from one block to the next when they are taken one behind the other.
    stride: int
    #: What an entry is less than.
    entry_limit: int = 1 << 32
    #: Whether users are told how large a block is (QEMU does not, of some formats).
    tells_cluster_size: bool = True
    #: Whether the format is one that can be checked.
    checked: ClassVar[bool] = True
    #: Where blocks may begin: the end of the header.
    data_from: int = 512
    #: Whether an entry can say "reads as zeroes"; only where there may be a backing file does that differ from "not stored".
    zero_entry: int | None = None

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.pages: dict[int, Page] = {}
        self._dirty: dict[int, Page] = {}
        self._end = 0  #: new blocks are taken from here on, once writing has begun
        self._handed_out = 0  #: up to where anything may have been written
        self._flushing = ranked_lock(RANK_FLUSH, "flush")

    # -- what a driver answers

    @abstractmethod
    def page_host(self, index: int) -> int | None:
        """Return where page *index* of the table lies in the file; None where nothing of it is stored."""

    def place(self, raw: int) -> int:
        """Return the place that an entry names."""
        known = self.special.get(raw)
        return raw * self.scale + self.base if known is None else known

    def places_of(self, raw: Any) -> Any:
        """Return the places that a numpy array of entries names, as uint64."""
        import numpy

        out = raw.astype(numpy.uint64) * numpy.uint64(self.scale) + numpy.uint64(self.base)
        for value, place in self.special.items():
            out[raw == value] = place
        return out

    def entry(self, place: int) -> int:
        """Return the entry that names *place*, a block's; the reverse of :meth:`place`."""
        return (place - self.base) // self.scale

    def empty_entry(self) -> int:
        """Return the entry of a block that is not stored."""
        return next(raw for raw, place in self.special.items() if place == UNALLOCATED)

    def new_page(self, index: int) -> int:
        """Take space for page *index*, which the file has not; return where. With the lock held."""
        raise NotSupported(f"driver '{self.driver}' has its whole table from the beginning")

    def take_blocks(self, count: int) -> tuple[int, int]:
        """Take space for up to *count* blocks; return where the first one's bytes will lie, and how many follow one another there."""
        host = self._end
        if self.stride != self.allocation_unit:
            count = 1
        self._end += count * self.stride
        return host + self.stride - self.allocation_unit, count

    def free_from(self) -> int:
        """Return where new blocks may begin when the image is first written."""
        unit = self.stride
        return max(self.data_from, -(-(self.file.node.size - self.base) // unit) * unit + self.base)

    def end_of_blocks(self) -> int:
        """Return where the block ends that lies last in the file; 0 where there is none."""
        end = 0
        for index in range(-(-self.entry_count // self.per_page)):
            entries = self.page(index).entries
            places = [self.place(raw) for raw in set(entries or ())]
            end = max([end, *(place + self.allocation_unit for place in places if ZEROED < place < PACKED)])
        return end

    def before_barrier(self) -> None:
        """Write what has to be stable before any entry that was changed is (a header's counter, a footer). In a flush."""

    def write_entries(self, pieces: list[Piece]) -> None:
        """Write changed *pieces* of the table: what they name is stable. In a flush; the end of it makes them so."""
        for piece in pieces:
            self.file.write(piece.host, (piece.data,))

    def upper_changes(self) -> list[tuple[int, bytes]]:
        """Return what names pages that are new, (offset in the file, bytes), to be written once these are stable. With the lock held."""
        return []

    # -- the mapping

    def set_capabilities(self) -> None:
        """Work out what can be done; a driver calls it when it has started."""
        self.cluster_size = self.allocation_unit if self.tells_cluster_size else None
        native = self.backing is None or self.zero_entry is not None
        self.capabilities = Capabilities(
            writable=self.writable,
            zeroes=Zeroing.NATIVE
            if native and self.file.node.capabilities.zeroes is Zeroing.NATIVE
            else Zeroing.EMULATED,
            discard=self.file.node.capabilities.discard,
            fua=True,
        )

    def page(self, index: int) -> Page:
        """Return page *index* of the table, read now if need be."""
        known = self.pages.get(index)
        if known is not None:
            return known
        host = self.page_host(index)
        if host is None:
            return Page(None, 0)
        count = min(self.per_page, self.entry_count - index * self.per_page)
        entries = array(self.word, bytes(count * (4 if self.word == "I" else 8)))
        self.file.read_into(host, memoryview(entries).cast("B"))
        if self.big_endian is _LITTLE:
            entries.byteswap()
        if len(self.pages) >= _KEPT_PAGES:
            self._drop_some()
        return self.pages.setdefault(index, Page(entries, host))

    def _load(self, index: int) -> None:
        self.page(index)

    def _drop_some(self) -> None:
        with self.lock:
            for index, page in list(self.pages.items())[: _KEPT_PAGES // 4]:
                if not page.pins and not page.high:
                    self.pages.pop(index, None)

    def _flags(self, place: int) -> int:
        if place == UNALLOCATED:
            return 0 if self.supports_backing else ZERO | ALLOCATED
        if place == ZEROED:
            return ZERO | ALLOCATED
        if place & PACKED:
            return DATA | ALLOCATED | COMPRESSED
        return DATA | ALLOCATED | OFFSET | IN_PLACE if self.writable else DATA | ALLOCATED | OFFSET

    def _check_place(self, place: int, number: int) -> None:
        if place > ZEROED and not place & PACKED and not self.data_from <= place < max(self.file.node.size, self._end):
            raise self.wrong(
                f"block {number} of the disk lies at {place:#x}, outside of the {self.file.node.size:#x} bytes of blocks",
                place,
            )

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        unit = self.allocation_unit
        number, within = divmod(offset, unit)
        index, slot = divmod(number, self.per_page)
        entries = self.page(index).entries
        have = unit - within
        if entries is None:
            have = (self._absent_until(index, offset + length) * self.per_page - slot) * unit - within
            return min(have, length), self._flags(UNALLOCATED), None, NO_HOST
        raw = entries[slot]
        place = self.place(raw)
        if have < length:
            step = 0 if place <= ZEROED else self._step(place)
            if step is not None:
                stop = min(len(entries), slot + _RUN_BLOCKS, slot - (-(length + within) // unit))
                following = slot + 1
                while following < stop and entries[following] == raw + step * (following - slot):
                    following += 1
                have += (following - slot - 1) * unit
        if place <= ZEROED:
            return min(have, length), self._flags(place), None, NO_HOST
        self._check_place(place, number)
        host = place if place & PACKED else place + within
        return min(have, length), self._flags(place), self.file, host

    def _step(self, place: int) -> int | None:
        """Return by how much the entry of a block differs from that of the block that lies before it in the file."""
        if place & PACKED or self.stride != self.allocation_unit:
            return None
        return self.stride // self.scale

    def _absent_until(self, index: int, end: int) -> int:
        """Return the first page after *index* that may be stored; not all are looked at."""
        last = min(-(-end // (self.allocation_unit * self.per_page)), index + _RUN_BLOCKS)
        index += 1
        while index < last and index not in self.pages and self.page_host(index) is None:
            index += 1
        return index

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        unit, end = self.allocation_unit, offset + length
        while offset < end and not batch.full:
            index, slot = divmod(offset // unit, self.per_page)
            entries = self.page(index).entries
            stop = -(-end // unit) - index * self.per_page
            if entries is None:
                until = min(end, self._absent_until(index, end) * self.per_page * unit)
                batch.add(offset, until - offset, self._flags(UNALLOCATED))
                offset = until
                continue
            part = entries[slot:stop]
            before = batch.end if batch.start else offset
            good = self._add_rows(batch, part, offset - offset % unit, many=(end - offset) // unit > _MANY)
            offset = min(end, batch.end)
            if not good:
                if before == batch.end or not batch.start:
                    number = max(before, batch.end) // unit
                    self._check_place(self.place(part[number - index * self.per_page - slot]), number)
                break
        return _cut(batch, end - length, end)

    def _add_rows(self, batch: ExtentBatch, part: array[int], start: int, *, many: bool) -> bool:
        """Add what the entries of *part*, whose first block is at *start*, say; False when one names no place of the file, or all is full."""
        unit, first = self.allocation_unit, part[0]
        place = self.place(first)
        step = 0 if place <= ZEROED else self._step(place)
        if len(part) > 1 and step is not None and part[-1] == first + step * (len(part) - 1):
            alike = array(self.word, range(first, first + step * len(part), step)) if step else None
            if part == alike if alike is not None else part.count(first) == len(part):
                if not self._stored(place, self._limit() - (unit * (len(part) - 1))):
                    part = part[:1]
                if self._stored(place, self._limit()):
                    self._add_row(batch, start, unit * len(part), place)
                    return True
                return False
        if len(part) > 64 and (many or "numpy" in sys.modules):
            return self._add_columns(batch, part, start)
        limit = self._limit()
        for raw in part:
            place = self.place(raw)
            if batch.full or not self._stored(place, limit):
                return False
            self._add_row(batch, start, unit, place)
            start += unit
        return True

    def _limit(self) -> int:
        return max(self.file.node.size, self._end)

    def _stored(self, place: int, limit: int) -> bool:
        return place <= ZEROED or place & PACKED != 0 or self.data_from <= place < limit

    def _add_row(self, batch: ExtentBatch, start: int, length: int, place: int) -> None:
        flags = self._flags(place)
        batch.add(start, length, flags, place if flags & OFFSET else NO_HOST, self.file.node if flags & DATA else None)

    def _add_columns(self, batch: ExtentBatch, part: array[int], start: int) -> bool:
        """See :meth:`_add_rows`; with numpy."""
        import numpy

        unit = numpy.uint64(self.allocation_unit)
        places = self.places_of(numpy.frombuffer(part, dtype=numpy.dtype(f"u{part.itemsize}")))
        kinds = numpy.where(places <= ZEROED, places, numpy.where(places >= PACKED, numpy.uint64(3), numpy.uint64(2)))
        plain = kinds == 2
        bad = plain & ((places < self.data_from) | (places >= self._limit()))
        good = True
        if bad.any():
            count = int(bad.argmax())
            places, kinds, plain, good = places[:count], kinds[:count], plain[:count], False
            if not count:
                return False
        begins = numpy.empty(len(places), dtype=bool)
        begins[0] = True
        begins[1:] = (kinds[1:] != kinds[:-1]) | (plain[1:] & (places[1:] != places[:-1] + unit))
        at = numpy.flatnonzero(begins)
        sizes = numpy.diff(numpy.append(at, len(places))).tolist()
        for place, index, size in zip(places[at].tolist(), at.tolist(), sizes, strict=True):
            if batch.full:
                return False
            self._add_row(batch, start + index * self.allocation_unit, size * self.allocation_unit, place)
        return good

    # -- changes

    def begin_writing(self) -> None:
        self._end = self.free_from()
        self._handed_out = max(self._end, self.file.node.size)

    def reserve(self, offset: int, length: int, kind: Kind, nbytes: int = 0) -> Reservation | None:
        unit = self.allocation_unit
        first = offset // unit
        index, slot = divmod(first, self.per_page)
        page = self.pages.get(index)
        if page is None:
            if self.page_host(index) is not None:
                raise Unprepared(partial(self._load, index))
            page = Page(None, 0)
        if len(self._dirty) >= _DIRTY_PAGES and not page.high:
            raise Unprepared(self.flush)
        last = min(-(-(offset + length) // unit), (index + 1) * self.per_page, self.entry_count)
        count = max(1, last - first)
        place = self.place(page.entries[slot]) if page.entries is not None else UNALLOCATED
        if kind is Kind.DATA:
            if place > ZEROED and not place & PACKED:
                return None
            count = self._alike(page, slot, count)
            page = self._stored_page(index, page)
            host, count = self.take_blocks(count)
            if self.entry(host + count * self.stride) >= self.entry_limit:
                self._end -= count * self.stride
                text = f"the file has grown to {self._end} bytes, and an entry cannot name what lies behind"
                raise NoSpace(text, path=self.filename, offset=offset)
            fresh = host >= self._handed_out
            self._handed_out = max(self._handed_out, self._end)
            page.pins += 1
            blank = place == ZEROED or (place == UNALLOCATED and self.backing is None)
            reservation = Reservation(
                first * unit, count * unit, kind, self.file, host, fresh=fresh, blank=blank, state=(page, slot, count)
            )
            if fresh and blank:
                # What surrounds the bytes reads as zeroes before and after, by itself.
                reservation.begin, reservation.end = offset, min(reservation.end, offset + length)
            return reservation
        if kind is Kind.EMPTY or (kind in (Kind.ZERO, Kind.ZERO_UNMAP) and self.zero_entry is not None):
            page = self._stored_page(index, page) if kind is not Kind.EMPTY or page.entries is not None else page
            page.pins += 1
            return Reservation(first * unit, count * unit, kind, state=(page, slot, count))
        raise NotSupported(f"driver '{self.driver}' has no entry for this", path=self.filename, offset=offset)

    def spare(self, reservation: Reservation, begin: int, end: int) -> bool:
        return reservation.fresh and reservation.blank

    @property
    def spare_unit(self) -> int:
        return self.allocation_unit if self.backing is not None else min(self.allocation_unit, _SPARE)

    def _alike(self, page: Page, slot: int, count: int) -> int:
        """Return how many of *count* blocks from *slot* on are without a place, as the first one is."""
        if page.entries is None:
            return count
        raw = page.entries[slot]
        return next((n for n in range(1, count) if page.entries[slot + n] != raw), count)

    def _stored_page(self, index: int, page: Page) -> Page:
        """Return *page*, with a place in the file and entries."""
        if page.entries is None:
            host = self.new_page(index)
            count = min(self.per_page, self.entry_count - index * self.per_page)
            page = self.pages[index] = Page(array(self.word, [self.empty_entry()]) * count, host)
            page.touch(0, count)
            self._dirty[index] = page
        return page

    def link(self, reservation: Reservation) -> None:
        page, slot, count = reservation.state
        if page.entries is not None:
            if reservation.kind is Kind.DATA:
                raw = self.entry(reservation.host)
                step = self.stride // self.scale
                page.entries[slot : slot + count] = array(self.word, range(raw, raw + step * count, step))
            elif reservation.kind is Kind.EMPTY:
                page.entries[slot : slot + count] = array(self.word, [self.empty_entry()]) * count
            else:
                assert self.zero_entry is not None
                page.entries[slot : slot + count] = array(self.word, [self.zero_entry]) * count
            page.touch(slot, slot + count)
            self._dirty[reservation.offset // self.allocation_unit // self.per_page] = page
        page.pins -= 1

    def abandon(self, reservation: Reservation) -> None:
        page, _, count = reservation.state
        page.pins -= 1
        if reservation.kind is Kind.DATA and reservation.host + count * self.allocation_unit == self._end:
            self._end -= count * self.stride

    def flush(self) -> None:
        if not self.begun:
            self.file.flush()
            return
        if self.poison is not None:
            raise self._poisoned()
        with self._flushing:
            with self.lock:
                self.changed = False
                dirty, self._dirty = self._dirty, {}
                pieces = [self._piece(index, page) for index, page in dirty.items()]
                if self.file.node.size < self._end:
                    # Under the lock nobody takes space, so that nothing is cut off that is being written behind the end.
                    self.file.node.resize(self._end)
                upper = self.upper_changes()
            try:
                if pieces or upper:
                    self.before_barrier()
                    self.file.flush()
                    self.write_entries(pieces)
                    if upper:
                        self.file.flush()
                        for host, data in upper:
                            self.file.write(host, (data,))
                self.file.flush()
            except BaseException as error:
                # What of the table is in the file is not known: nothing may be built on it.
                self.set_poison(error)
                raise
            finally:
                with self.lock:
                    for page in dirty.values():
                        page.pins -= 1

    def _piece(self, index: int, page: Page) -> Piece:
        assert page.entries is not None
        part = page.entries[page.low : page.high]
        if self.big_endian is _LITTLE:
            part.byteswap()
        host = page.host + page.low * part.itemsize
        page.low, page.high = sys.maxsize, 0
        page.pins += 1
        return Piece(index, host, part.tobytes())

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.check_writable()
        end = offset + length
        while offset < end:
            count, flags, child, host = self.map(offset, end - offset)
            if flags & (DATA | OFFSET | COMPRESSED) == DATA | OFFSET and child is not None:
                child.write_zeroes(host, count, unmap=unmap, fallback=fallback)
                self.changed = True
            elif not flags & ZERO and (self.backing is not None or flags & DATA):
                super().write_zeroes(offset, count, unmap=unmap, fallback=fallback)
            offset += count
        if fua:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        if self.options.discard == "ignore":
            return
        self.check_writable()
        end = offset + length
        while offset < end:
            count, flags, child, host = self.map(offset, end - offset)
            if flags & (DATA | OFFSET | COMPRESSED) == DATA | OFFSET and child is not None:
                child.discard(host, count)
                self.changed = True
            offset += count

    def check(self, repair: str | None, say: Say) -> CheckResult:
        if not self.checked:
            return super().check(repair, say)
        from cowhand.block.format_io.table_check import check

        return check(self, say)

    def close(self) -> None:
        if self.begun and self.poison is None:
            self.flush()
            self.end_writing()

    def end_writing(self) -> None:
        """Write what says that the image was closed in order. Everything is flushed."""


def _cut(batch: ExtentBatch, begin: int, end: int) -> ExtentBatch:
    """Have *batch*, whose rows are whole blocks, begin at *begin* and end at *end*."""
    if batch.start and (skip := begin - batch.start[0]) > 0:
        batch.start[0] = begin
        batch.length[0] -= skip
        if batch.host[0] != NO_HOST:
            batch.host[0] += skip
    if batch.start and (over := batch.end - end) > 0:
        batch.length[-1] -= over
    return batch
