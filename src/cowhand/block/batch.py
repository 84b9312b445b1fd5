"""Many requests at once on a format: what can be done in place goes straight to the descriptor, neighbours together.

Writes that need space take it together as well: one pass that reserves, the bytes, one pass that links. Such writes to one unit that adjoin
are one write. What is difficult (one that straddles two units, a unit that somebody owns) goes singly.

A loop over plain tuples with as few calls as possible: at 4 KiB a request costs 2 µs, of which the system call takes three quarters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.block.node import READ, WRITE_REQUEST, Request, one_by_one
from cowhand.core.buffers import Buffer, give, take
from cowhand.core.errors import CowhandError
from cowhand.core.extents import DATA

if TYPE_CHECKING:
    from cowhand.block.format import FormatNode
    from cowhand.block.node import Child
    from cowhand.block.reserving import Reservation

#: Neighbours that are done by one system call, at most.
_MAX_TOGETHER = 64
#: Units that are copied up by one write; and from how many bytes on a second thread helps.
_GROUP = 8
_WORTH_A_THREAD = 512 << 10
#: in an answer of ``places``
NEEDS_SPACE = -2
_preadv = getattr(os, "preadv", None)
_pwritev = getattr(os, "pwritev", None)


def submit(node: FormatNode, batch: Sequence[Request]) -> None:
    """Do *batch* on *node*; the first error is raised after the rest has ended."""
    if node.event_sink is not None or _preadv is None or _pwritev is None:
        one_by_one(node, batch)
        return
    failure: Exception | None = None
    index, count = 0, len(batch)
    gathered = _Gathered(node, count)
    if count > 1 and (places := node.places(batch)) is not None:
        failure = gathered.allocate(_one_after_another(node, batch, places, gathered))
        if failure is not None:
            raise failure
        return
    look = node.map
    read_mask, read_flags = node.DIRECT_READ
    write_mask, write_flags = node.DIRECT_WRITE
    while index < count:
        kind, offset, what = batch[index]
        done = 0
        try:
            if kind <= WRITE_REQUEST:
                length = len(what)
                found, flags, child, host = look(offset, length)
                if (
                    flags & read_mask == read_flags
                    if kind == READ
                    else flags & write_mask == write_flags and node.may_write_directly
                ):
                    lane = child.lane  # type: ignore[union-attr]  # who says where bytes lie says in which file
                    if lane is not None and found == length and lane.lane_fd >= 0 and length:
                        if index + 1 < count and batch[index + 1][1] == offset + length:
                            done = _together(node, batch, index, child, host)
                        # Short at the end of the file, interrupted, or failed: the long way meets the same, and deals with it.
                        elif kind == READ:
                            done = _preadv(lane.lane_fd, (what,), host) == length
                        else:
                            done = _pwritev(lane.lane_fd, (what,), host) == length
                            node.changed = True
        except OSError:
            done = 0
        except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
            failure = failure or error
            done = 1
        if not done:
            failure = gathered.take_or_do(batch[index], failure)
        index += done or 1
    failure = gathered.allocate(failure)
    if failure is not None:
        raise failure


def _one_after_another(
    node: FormatNode, batch: Sequence[Request], places: tuple[int, list[int]], gathered: _Gathered
) -> Exception | None:
    """Do *batch*, all reads or all writes of which no two adjoin, at their *places*; return the first error."""
    failure: Exception | None = None
    descriptor, hosts = places
    writing = batch[0][0] != READ
    move: Any = _pwritev if writing else _preadv
    try:
        for request, host in zip(batch, hosts, strict=True):
            if host >= 0:
                what = request[2]
                try:
                    if move(descriptor, (what,), host) == len(what):
                        continue
                except OSError:
                    pass  # the long way meets the same, and deals with it
                except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
                    failure = failure or error
                    continue
            failure = gathered.take_or_do(request, failure, empty=host == NEEDS_SPACE)
    finally:
        # After the writes: a flush that begins before they have ended does not count for them.
        if writing:
            node.changed = True
    return failure


class _Gathered:
    """The writes of a batch that need space, each in a unit of its own, until all are done together."""

    def __init__(self, node: FormatNode, count: int) -> None:
        self.node = node
        self.unit = node.allocation_unit
        self.wanted = not node.detects_zeroes and count > 1
        self.writes: dict[int, _Write] = {}  #: by the number of their unit

    def take_or_do(self, request: Request, failure: Exception | None, *, empty: bool = False) -> Exception | None:
        """Keep *request* for later if it is such a write (*empty*: it looked so), or do it now; return *failure*, or else the first error."""
        kind, offset, what = request
        try:
            if self.wanted and kind == WRITE_REQUEST and (empty or _needs_unit(self.node, offset, len(what))):
                number = offset // self.unit
                known = self.writes.get(number)
                if known is None:
                    self.writes[number] = _Write(offset, what)
                    return failure
                if known.offset + known.length == offset:
                    known.add(what)
                    return failure
                failure = self.allocate(failure)
                # The unit has a place now; a part of it may still need one.
                if _needs_unit(self.node, offset, len(what)):
                    self.writes[number] = _Write(offset, what)
                    return failure
            if self.writes and _meets(self.writes, self.unit, kind, offset, what):
                # One that comes later in the batch finds what it would have found if they had been done one by one.
                failure = self.allocate(failure)
            one_by_one(self.node, (request,))
        except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
            failure = failure or error
        return failure

    def allocate(self, failure: Exception | None) -> Exception | None:
        """Do the writes that were kept; return *failure*, or else the first error."""
        if self.writes:
            writes = list(self.writes.values())
            self.writes.clear()
            failure = _allocate(self.node, writes, failure)
        return failure


class _Write:
    """Bytes for one unit, from one request or from several that adjoin, and the reservation for them."""

    __slots__ = ("buffers", "failure", "length", "offset", "reservation")

    reservation: Reservation

    def __init__(self, offset: int, what: Buffer) -> None:
        self.offset = offset
        self.length = len(what)
        self.buffers = [what]
        self.failure: Exception | None = None

    def add(self, what: Buffer) -> None:
        """Write *what* behind the rest."""
        self.length += len(what)
        self.buffers.append(what)


def _meets(gathered: dict[int, _Write], unit: int, kind: int, offset: int, what: Any) -> bool:
    """Tell whether a request may touch a unit that is about to be taken."""
    if kind > WRITE_REQUEST:
        return True
    return any(number in gathered for number in range(offset // unit, (offset + len(what) - 1) // unit + 1))


def _needs_unit(node: FormatNode, offset: int, length: int) -> bool:
    """Tell whether a write lies in one unit that holds nothing yet in all of that place."""
    if not 0 < length <= node.allocation_unit - offset % node.allocation_unit:
        return False
    found, flags, _, _ = node.map(offset, length)
    # A part that holds data is written at once by those who come later in the batch: they must not overtake it.
    return found == length and not flags & DATA


def _allocate(node: FormatNode, writes: list[_Write], failure: Exception | None) -> Exception | None:
    """Do *writes*, each into a unit of its own that has no place yet; return *failure*, or else the first error."""
    try:
        node.check_writable()
        reservations = node.claim_units([(write.offset, write.length) for write in writes])
    except CowhandError as error:
        return failure or error
    reserved: list[_Write] = []
    singly: list[_Write] = []
    for number, write in enumerate(writes):
        reservation = reservations[number] if number < len(reservations) else None
        if reservation is None:
            singly.append(write)
        else:
            write.reservation = reservation
            reserved.append(write)
    try:
        _put_all(node, reserved)
    except BaseException as error:
        for write in reserved:
            node.give_up(write.reservation, error)
        raise
    placed: list[Reservation] = []
    for write in reserved:
        if write.failure is None:
            placed.append(write.reservation)
        else:
            node.give_up(write.reservation, write.failure)
            failure = failure or write.failure
    if placed:
        error_of_link = node.finish_units(placed)
        failure = failure or error_of_link
    for write in singly:
        try:
            node.write(write.offset, write.buffers)
        except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
            failure = failure or error
    return failure


def _put_all(node: FormatNode, writes: list[_Write]) -> None:
    """Place the bytes of *writes* and what surrounds them; each keeps its error."""
    copying: list[_Write] = []
    for write in writes:
        reservation, child = write.reservation, write.reservation.child
        try:
            if (
                child is not None
                and not node.encodes
                and (
                    (reservation.blank and reservation.fresh)
                    or write.length == reservation.end - reservation.begin < node.allocation_unit
                )
            ):
                # Nothing has to be put around it: old and new read as zeroes, or it is all that changes of a unit.
                host = reservation.host + write.offset - reservation.offset
                if not _go_straight(child, host, write):
                    child.write(host, write.buffers)
            elif node.encodes or node.known_zero(reservation.begin, reservation.end - reservation.begin):
                views = [memoryview(buffer) for buffer in write.buffers]
                node.put(reservation, write.offset, views, write.length)
            else:
                copying.append(write)
        except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
            write.failure = error
    groups = list(_neighbours(copying))
    if len(groups) < 2 or len(copying) * node.copy_unit < _WORTH_A_THREAD:
        for group in groups:
            _copy_up(node, group)
        return
    from cowhand.core.pairs import both

    # Both take from one iterator, which hands each group out once.
    remaining = iter(groups)

    def work() -> None:
        for group in remaining:
            _copy_up(node, group)

    both(work, work)


def _go_straight(child: Child, host: int, write: _Write) -> bool:
    """Write to the descriptor that *child* ends in, if it does; False when it has to be the long way, which finds out what is wrong."""
    lane = child.lane
    if lane is None or lane.lane_fd < 0 or len(write.buffers) > _MAX_TOGETHER or _pwritev is None:
        return False
    try:
        return bool(_pwritev(lane.lane_fd, write.buffers, host) == write.length)
    except OSError:
        return False


def _neighbours(writes: list[_Write]) -> Iterator[list[_Write]]:
    """Yield *writes* in groups whose new places adjoin."""
    group: list[_Write] = []
    for write in writes:
        last = group[-1].reservation if group else None
        if last is not None and (
            len(group) == _GROUP
            or write.reservation.child is not last.child
            or _place(write.reservation) != _place(last) + last.end - last.begin
        ):
            yield group
            group = []
        group.append(write)
    if group:
        yield group


def _place(reservation: Reservation) -> int:
    """Return where the first byte goes that is to be filled."""
    return reservation.host + reservation.begin - reservation.offset


def _copy_up(node: FormatNode, group: list[_Write]) -> None:
    """Copy what a group of units read before to their new places, with what is written there, in one write."""
    borrowed: list[memoryview] = []
    try:
        pieces = [piece for write in group for piece in _filled(node, write, borrowed)]
        first = group[0].reservation
        assert first.child is not None
        first.child.write(_place(first), pieces)
    except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
        if len(group) == 1:
            group[0].failure = error
            return
    else:
        return
    finally:
        for piece in borrowed:
            give(piece)
    for write in group:
        # One by one: whose fault it is is found out, and the others get what is theirs.
        _copy_up(node, [write])


def _filled(node: FormatNode, write: _Write, borrowed: list[memoryview]) -> list[Buffer]:
    """Return the bytes of all that *write*'s reservation changes; what was taken for it is added to *borrowed*."""
    from cowhand.block.format import FormatNode

    begin, end = write.reservation.begin, write.reservation.end
    if write.length == end - begin:
        return write.buffers
    piece = take(end - begin)
    borrowed.append(piece)
    # All of it at once, and the guest's bytes put over it: one system call instead of two.
    FormatNode.read_into(node, begin, piece)
    at = write.offset - begin
    for buffer in write.buffers:
        piece[at : at + len(buffer)] = buffer
        at += len(buffer)
    return [piece]


def _together(node: FormatNode, batch: Sequence[Request], index: int, child: Any, host: int) -> int:
    """Do the request at *index*, which lies at *host* of *child*, and those behind it that adjoin it on disk and medium, with one system call.

    Returns how many were done, 0 if it has to be the long way. Raises OSError.
    """
    kind, offset, what = batch[index]
    mask, wanted = node.DIRECT_READ if kind == READ else node.DIRECT_WRITE
    buffers = [what]
    total = len(what)
    for next_kind, next_offset, buffer in batch[index + 1 : index + _MAX_TOGETHER]:
        if next_kind != kind or next_offset != offset + total:
            break
        size = len(buffer)
        found, flags, next_child, next_host = node.map(next_offset, size)
        if found != size or flags & mask != wanted or next_child is not child or next_host != host + total:
            break
        buffers.append(buffer)
        total += size
    descriptor = child.lane.lane_fd
    moved = _preadv(descriptor, buffers, host) if kind == READ else _pwritev(descriptor, buffers, host)  # type: ignore[misc]
    if kind == WRITE_REQUEST:
        node.changed = True
    return len(buffers) if moved == total else 0
