"""Reservations: who may change which allocation units of an image, and the three steps of a change.

*Reserve* takes space, and nothing that a reader sees changes; *bytes* puts the guest's data and what is copied around it in place; *link*
makes readers see it. From reserve to link a request owns whole allocation units in the in-flight table; who wants one of these units
meanwhile waits, then looks again. Here too: the first change of an image, and its poisoning when its state in memory cannot be trusted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.graph.graph import disks_above
from cowhand.block.node.node import BlockNode, Child
from cowhand.block.node.options import NodeOptions
from cowhand.core.errors import CowhandError, NotSupported, Poisoned, ReadOnly
from cowhand.core.extents import NO_HOST
from cowhand.core.locks import RANK_ALLOCATION, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.format_io.batch_rows import UnitWrites


class Kind(IntEnum):
    """What a reservation is for."""

    DATA = 0
    ZERO = 1  #: read as zeroes, keeping space
    ZERO_UNMAP = 2  #: read as zeroes, giving space back
    DISCARD = 3  #: a guest's discard: reads as zeroes, or as before; never as the backing file
    COMPRESSED = 4  #: ``nbytes`` of encoded payload for one allocation unit
    EMPTY = 5  #: not allocated any more: the backing file shows through (after a commit)


class Reservation:
    """Allocation units ``[offset, offset + length)`` on their way to a new state; made by a driver's ``reserve``.

    ``[begin, end)``, all of it unless a driver says less, is what changes inside these units: what is to be filled with bytes.
    ``child`` and ``host`` say where the bytes go (kinds DATA and COMPRESSED); ``fresh`` that the new place reads as zeroes by itself,
    ``blank`` that the old content is known to read as zeroes (False: not known). ``state`` is the driver's own.
    """

    __slots__ = ("begin", "blank", "child", "end", "fresh", "host", "kind", "length", "offset", "state", "waiters")

    def __init__(
        self,
        offset: int,
        length: int,
        kind: Kind,
        child: Child | None = None,
        host: int = NO_HOST,
        *,
        fresh: bool = False,
        blank: bool = False,
        state: Any = None,
    ) -> None:
        self.offset = offset
        self.length = length
        self.begin = offset
        self.end = offset + length
        self.kind = kind
        self.child = child
        self.host = host
        self.fresh = fresh
        self.blank = blank
        self.state = state
        self.waiters: list[Any] = []


class Unprepared(Exception):
    """Raised by ``reserve`` when something must be done without the lock first; :meth:`ReservingNode.claim` does it and begins again."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        super().__init__()
        self.prepare = prepare


def _understood(error: BaseException) -> bool:
    """Tell whether *error* came by an error path of its own; after another one it is not known what was done."""
    return isinstance(error, (CowhandError, OSError, MemoryError))


class ReservingNode(BlockNode):
    """A node whose allocation units change by reservations. Drivers set ``allocation_unit`` (bytes) before any I/O."""

    is_format: ClassVar[bool] = True
    allocation_unit: int

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        #: Guards tables in memory and the in-flight table. Held during reserve and link, never during guest I/O.
        self.lock = ranked_lock(RANK_ALLOCATION, "allocation")
        self.poison: CowhandError | None = None
        self._reserved: list[Reservation] = []
        self._batches: list[UnitWrites] = []
        self._writing = False
        #: During ``reserve``: the same request has written what lies before.
        self.continues = False
        #: Something was, or may have been, written since the last flush began. Set after the bytes are down, so that none escapes a flush.
        self.changed = False

    # -- what a driver answers

    def begin_writing(self) -> None:
        """Do what the format demands once before its first change (dirty and autoclear bits, IN_USE, ids). Lock is held."""
        raise ReadOnly(f"driver '{self.driver}' only reads", path=self.filename)

    def reserve(self, offset: int, length: int, kind: Kind, nbytes: int = 0) -> Reservation | None:
        """Take what the beginning of ``[offset, offset + length)`` needs; None when it can be written in place (look at map again).

        Called with the lock held and no other reservation overlapping; *offset* lies anywhere for DATA, on a unit for the others. The
        reservation covers whole units. Nothing that a reader sees changes. On an error everything is as before.
        """
        raise NotSupported(f"driver '{self.driver}' cannot allocate")

    def link(self, reservation: Reservation) -> None:
        """Make readers see *reservation*, whose bytes are in place. Called with the lock held; on an error the old state stands."""
        raise NotSupported(f"driver '{self.driver}' cannot allocate")

    def abandon(self, reservation: Reservation) -> None:
        """Take *reservation* back. Never raises; a leak at worst. Called with the lock held."""

    def spare(self, reservation: Reservation, begin: int, end: int) -> bool:
        """Have ``[begin, end)`` of *reservation*, of kind DATA and not linked yet, stay as it was; False when bytes have to be put there.

        Its ``end`` falls where nothing is left behind *begin*. For a driver whose units have parts; no lock is held.
        """
        return False

    #: Whether the driver has the three methods below.
    takes_batches: ClassVar[bool] = False

    def reserve_writes(self, writes: UnitWrites) -> None:
        """Reserve for *writes* at once, as kind DATA; a row stays SINGLY where :meth:`reserve` has to look at it, and where its unit is busy.

        A row's copy units hold no data, or none that has to be kept but what is copied around the row. Called with the lock held. Raises as
        :meth:`reserve`; then nothing is taken.
        """
        raise NotSupported(f"driver '{self.driver}' cannot allocate")

    def link_writes(self, writes: UnitWrites) -> None:
        """Make readers see *writes*, whose bytes are in place; what was taken for rows that are SINGLY by now is given back. Lock is held."""
        raise NotSupported(f"driver '{self.driver}' cannot allocate")

    def abandon_writes(self, writes: UnitWrites) -> None:
        """Take *writes* back. Never raises; a leak at worst. Called with the lock held."""

    # -- before a change, and after a failure

    @property
    def begun(self) -> bool:
        """Whether the image was prepared for changes."""
        return self._writing

    def check_writable(self) -> None:
        """Raise unless changes may be made; the first call prepares the image for them."""
        if self.poison is not None:
            raise self._poisoned()
        if not self._writing:
            if not self.writable:
                raise ReadOnly(f"'{self.filename}' is open for reading only", path=self.filename)
            with self.lock:
                if not self._writing:
                    self.begin_writing()
                    self._writing = True

    def _poisoned(self) -> Poisoned:
        assert self.poison is not None
        return Poisoned(
            f"'{self.filename}' failed before and is not written any more: {self.poison.message}",
            qemu=self.poison.qemu_message, path=self.filename, errno=self.poison.errno, hint="Close it and open it again; check it first.",
        )  # fmt: skip

    def set_poison(self, error: BaseException) -> None:
        """Stop all writing, data and metadata, until the image is opened again: its state in memory can no longer be trusted."""
        if self.poison is None:
            known = isinstance(error, CowhandError)
            self.poison = error if known else Poisoned(f"interrupted by {type(error).__name__}")  # type: ignore[assignment]
            assert self.poison is not None
            for disk in disks_above((self,)):
                for listener in disk.listeners:
                    listener.failed(disk, self.poison)

    # -- the in-flight table

    def claim(
        self, offset: int, length: int, kind: Kind, nbytes: int = 0, *, continues: bool = False
    ) -> Reservation | None:
        """Reserve the beginning of ``[offset, offset + length)`` once nobody else owns a unit of it; None: write in place.

        *continues*: the same request has written what lies before it, so that new space is best taken right behind.
        The reservation ends with :meth:`finish` or :meth:`give_up`. The copy engine calls this too, and puts the bytes itself.
        """
        unit = self.allocation_unit
        begin = offset - offset % unit
        end = -(-(offset + length) // unit) * unit
        while True:
            prepare: Callable[[], None] | None = None
            waiter = None
            with self.lock:
                if self.poison is not None:
                    raise self._poisoned()
                other, limit = self._owner_of(begin, end)
                if other is None:
                    self.continues = continues
                    try:
                        reservation = self.reserve(offset, min(length, limit - offset), kind, nbytes)
                    except Unprepared as signal:
                        prepare = signal.prepare
                    except CowhandError:
                        raise
                    except BaseException as error:
                        self.set_poison(error)
                        raise
                    else:
                        if reservation is not None:
                            self._reserved.append(reservation)
                            self.changed = True
                        return reservation
                else:
                    waiter = threading.Lock()
                    waiter.acquire()
                    other.waiters.append(waiter)
            if prepare is not None:
                prepare()
            elif waiter is not None:
                waiter.acquire()

    def _owner_of(self, begin: int, end: int) -> tuple[Reservation | UnitWrites | None, int]:
        """Return who owns the unit at *begin*, or None and how far the units from there on are free."""
        for batch in self._batches:
            at = batch.owned(begin, end)
            if at == begin:
                return batch, begin
            if at is not None:
                end = at
        for known in self._reserved:
            if known.offset < end and begin < known.offset + known.length:
                if known.offset <= begin:
                    return known, begin
                end = known.offset
        return None, end

    def finish(self, reservation: Reservation) -> None:
        """Link *reservation*, whose bytes are in place, and let those go on who wait for its units."""
        with self.lock:
            self.changed = True
            try:
                if self.poison is not None:
                    # Found while the bytes were on their way: what was reserved may be somebody else's.
                    raise self._poisoned()
                self.link(reservation)
            except CowhandError:
                self.abandon(reservation)
                raise
            except BaseException as error:
                self.set_poison(error)
                raise
            finally:
                self._release(reservation)

    def give_up(self, reservation: Reservation, error: BaseException) -> None:
        """Take *reservation* back because of *error*; readers see what they saw."""
        with self.lock:
            self.changed = True  # a flush may have brought to the file what is taken back
            try:
                if _understood(error):
                    self.abandon(reservation)
                else:
                    self.set_poison(error)
            finally:
                self._release(reservation)

    def withdraw(self, reservation: Reservation) -> None:
        """Take *reservation* back, of which nothing came; readers see what they saw."""
        with self.lock:
            self.changed = True
            try:
                self.abandon(reservation)
            finally:
                self._release(reservation)

    def _release(self, reservation: Reservation) -> None:
        self._reserved.remove(reservation)
        for waiter in reservation.waiters:
            waiter.release()

    def claim_writes(self, writes: UnitWrites) -> bool:
        """Reserve for *writes* what can be done at once, see :meth:`reserve_writes`; False when nothing was, and :meth:`claim` has to do it all.

        True: they end with :meth:`finish_writes` or :meth:`give_up_writes`. This waits for nobody.
        """
        unit = self.allocation_unit
        while self.takes_batches:
            with self.lock:
                if self.poison is not None:
                    break
                if self._reserved or self._batches:
                    writes.busy = {
                        n for n in writes.numbers if self._owner_of(n * unit, n * unit + unit)[0] is not None
                    }
                try:
                    self.reserve_writes(writes)
                except Unprepared as signal:
                    prepare = signal.prepare
                except CowhandError:
                    break  # nothing was taken; the long way meets the same, and deals with it
                except BaseException as error:
                    self.set_poison(error)
                    raise
                else:
                    self._batches.append(writes)
                    self.changed = True
                    return True
            try:
                prepare()
            except CowhandError:
                break
        return False

    def finish_writes(self, writes: UnitWrites, failures: Mapping[int, BaseException]) -> None:
        """Link *writes*, whose bytes are in place, but for the rows of *failures*, which are taken back; let those go on who wait for their units."""
        with self.lock:
            self.changed = True
            try:
                for row, error in failures.items():
                    writes.drop(row)
                    if not _understood(error):
                        self.set_poison(error)
                if self.poison is not None:
                    # Also when it was found while the bytes were on their way: what was reserved may be somebody else's.
                    self.abandon_writes(writes)
                    raise self._poisoned()
                self.link_writes(writes)
            except Poisoned:
                raise
            except BaseException as error:
                self.set_poison(error)
                raise
            finally:
                self._release_writes(writes)

    def give_up_writes(self, writes: UnitWrites, error: BaseException) -> None:
        """Take all of *writes* back because of *error*; readers see what they saw."""
        with self.lock:
            self.changed = True  # as in give_up
            try:
                if _understood(error):
                    self.abandon_writes(writes)
                else:
                    self.set_poison(error)
            finally:
                self._release_writes(writes)

    def _release_writes(self, writes: UnitWrites) -> None:
        self._batches.remove(writes)
        for waiter in writes.waiters:
            waiter.release()

    def claim_compressed(self, pieces: Sequence[tuple[int, int]]) -> list[Reservation]:
        """Reserve, as kind COMPRESSED, a unit for each of *pieces* (guest offset, bytes), in rising order; as many of the first as go at once.

        :meth:`claim` does the others, and waits for whom it has to. They end with :meth:`finish_units`, or :meth:`give_up`.
        """
        made: list[Reservation] = []
        with self.lock:
            if self.poison is not None or not pieces:
                return made
            unit = self.allocation_unit
            owner, limit = self._owner_of(pieces[0][0], pieces[-1][0] + unit)
            if owner is not None:
                return made
            self.continues = False
            try:
                for offset, nbytes in pieces:
                    if offset >= limit:
                        break  # somebody owns this unit
                    reservation = self.reserve(offset, unit, Kind.COMPRESSED, nbytes)
                    if reservation is None:
                        break
                    made.append(reservation)
            except (CowhandError, Unprepared):
                pass  # for this one nothing was taken; the long way meets the same, and deals with it
            except BaseException as error:
                self.set_poison(error)
                raise
            self._reserved += made
            self.changed = True
        return made

    def finish_units(self, reservations: Sequence[Reservation]) -> CowhandError | None:
        """Link *reservations*, whose bytes are in place, under one lock; return the first error, after the others are linked."""
        failure: CowhandError | None = None
        with self.lock:
            self.changed = True
            try:
                for reservation in reservations:
                    try:
                        if self.poison is not None:
                            raise self._poisoned()
                        self.link(reservation)
                    except CowhandError as error:
                        self.abandon(reservation)
                        failure = failure or error
            except BaseException as error:
                self.set_poison(error)
                raise
            finally:
                done = set(map(id, reservations))
                self._reserved = [one for one in self._reserved if id(one) not in done]
                for reservation in reservations:
                    for waiter in reservation.waiters:
                        waiter.release()
        return failure

    def change(self, offset: int, length: int, kind: Kind) -> None:
        """Bring whole units to a state that needs no bytes: ZERO, ZERO_UNMAP, DISCARD or EMPTY."""
        self.check_writable()
        end = offset + length
        while offset < end:
            reservation = self.claim(offset, end - offset, kind)
            if reservation is None:
                raise AssertionError(f"driver '{self.driver}' reserved nothing for {kind.name}")
            self.finish(reservation)
            offset = reservation.end
