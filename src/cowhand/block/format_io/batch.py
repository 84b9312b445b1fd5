"""Many requests at once on a format: what can be done in place goes straight to the descriptor, neighbours together.

Writes that need space take it together as well: one pass that reserves, the bytes
(:mod:`cowhand.block.format_io.batch_data`), one pass that links, all of them one reservation in columns
(:mod:`cowhand.block.format_io.batch_rows`). Difficult requests (that straddle two units, or a unit that another
request owns) go singly.

Loops over plain tuples and lists with as few calls as possible: a request of 4 KiB in place costs 2 µs, three quarters of it for the system call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from cowhand.block.format_io import readahead
from cowhand.block.format_io.batch_data import put
from cowhand.block.format_io.batch_rows import SINGLY, UnitWrites
from cowhand.block.node.node import READ, WRITE_REQUEST, Failures, Request, one_by_one
from cowhand.core.errors import CowhandError
from cowhand.core.extents import DATA

if TYPE_CHECKING:
    from cowhand.block.format_io.format_node import FormatNode
    from cowhand.block.format_io.mapped import MappedFormat

#: Neighbours that are done by one system call, at most.
_MAX_TOGETHER = 64
#: in an answer of ``places``
NEEDS_SPACE = -2
_preadv = getattr(os, "preadv", None)
_pwritev = getattr(os, "pwritev", None)


def submit(node: MappedFormat, batch: Sequence[Request]) -> Failures | None:
    """Do *batch* on *node*; return those that failed, or None."""
    if node.event_sink is not None or _preadv is None or _pwritev is None:
        return one_by_one(node, batch)
    index, count = 0, len(batch)
    gathered = _Gathered(node, batch)
    if count > 1 and (places := node.places(batch)) is not None:
        _one_after_another(node, batch, places, gathered)
        gathered.allocate()
        return gathered.failures or None
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
                    if gathered.writes.numbers and gathered.writes.touches(offset, offset + length):
                        pass  # somebody else gave the unit its place since, and this must not overtake what waits for one
                    elif lane is not None and found == length and lane.lane_fd >= 0 and length:
                        if index + 1 < count and batch[index + 1][1] == offset + length:
                            done = _together(node, batch, index, child, host, gathered.writes)
                        # Short at the end of the file, interrupted, or failed: the long way meets the same, and deals with it.
                        elif kind == READ:
                            done = _preadv(lane.lane_fd, (what,), host) == length
                        else:
                            done = _pwritev(lane.lane_fd, (what,), host) == length
                            node.changed = True
        except OSError:
            done = 0
        except Exception as error:  # noqa: BLE001 - the caller is told which one it was
            gathered.failures[index] = error
            done = 1
        if not done:
            gathered.take_or_do(index)
        index += done or 1
    gathered.allocate()
    return gathered.failures or None


def _one_after_another(
    node: MappedFormat, batch: Sequence[Request], places: tuple[int, list[int]], gathered: _Gathered
) -> None:
    """Do *batch*, all reads or all writes of which no two adjoin, at their *places*."""
    descriptor, hosts = places
    writing = batch[0][0] != READ
    move: Any = _pwritev if writing else _preadv
    flags = 0 if writing else readahead.NOWAIT
    wanted, unit, writes = gathered.wanted, gathered.unit, gathered.writes
    try:
        for index, (request, host) in enumerate(zip(batch, hosts, strict=True)):
            if host >= 0 and not (writes.numbers and writes.touches(request[1], request[1] + len(request[2]))):
                what = request[2]
                try:
                    if move(descriptor, (what,), host, flags) == len(what):
                        continue
                    if flags:
                        raise BlockingIOError
                except OSError as error:
                    # The long way meets the same, and deals with it.
                    if flags:
                        flags = 0  # it waits, or the file system does not know of reading without
                        if isinstance(error, BlockingIOError):
                            cold = [(at, len(each[2])) for each, at in zip(batch, hosts, strict=True) if at >= 0]
                            readahead.announce(descriptor, cold[: readahead.MOST])
                except Exception as error:  # noqa: BLE001 - the caller is told which one it was
                    gathered.failures[index] = error
                    continue
            elif host == NEEDS_SPACE and wanted:
                _, offset, what = request
                number = offset // unit
                if number not in writes.numbers:
                    writes.add(number, offset, what)
                    continue
                if writes.join(number, offset, what):
                    continue
            gathered.take_or_do(index, empty=host == NEEDS_SPACE)
            writes = gathered.writes
    finally:
        # After the writes: a flush that begins before they have ended does not count for them.
        if writing:
            node.changed = True


class _Gathered:
    """The writes of a batch that need space, until all are done together; and what of the batch failed."""

    def __init__(self, node: MappedFormat, batch: Sequence[Request]) -> None:
        self.node = node
        self.batch = batch
        self.failures: Failures = {}
        self.unit = node.allocation_unit
        self.wanted = node.writable and not node.detects_zeroes and len(batch) > 1
        self.writes = UnitWrites(self.unit, node.copy_unit)

    def blame(self, offset: int, what: Any, error: Exception) -> None:
        """Note that the write of *what* at *offset* failed. Rows do not know indices: on the way without errors nothing needs them."""
        for index, (kind, begin, buffer) in enumerate(self.batch):
            if begin == offset and buffer is what and kind == WRITE_REQUEST:
                self.failures.setdefault(index, error)

    def take_or_do(self, index: int, *, empty: bool = False) -> None:
        """Keep the request at *index* for later if it is such a write (*empty*: it looked so), or do it now."""
        request = self.batch[index]
        kind, offset, what = request
        try:
            if self.wanted and kind == WRITE_REQUEST and (empty or _needs_unit(self.node, offset, len(what))):
                number = offset // self.unit
                if number not in self.writes.numbers:
                    self.writes.add(number, offset, what)
                    return
                if self.writes.join(number, offset, what):
                    return
                self.allocate()
                # The unit has a place now; a part of it may still need one.
                if _needs_unit(self.node, offset, len(what)):
                    self.writes.add(number, offset, what)
                    return
            if self.writes.offsets and _meets(self.writes, kind, offset, what):
                # One that comes later in the batch finds what it would have found if they had been done one by one.
                self.allocate()
            failed = one_by_one(self.node, (request,))
            if failed is not None:
                self.failures[index] = failed[0]
        except Exception as error:  # noqa: BLE001 - the caller is told which one it was
            self.failures[index] = error

    def allocate(self) -> None:
        """Do the writes that were kept."""
        writes = self.writes
        if writes.offsets:
            self.writes = UnitWrites(self.unit, writes.part)
            _allocate(cast("FormatNode", self.node), writes, self.blame)  # what is writable is one


def _meets(writes: UnitWrites, kind: int, offset: int, what: Any) -> bool:
    """Tell whether a request may touch what is about to be written."""
    return kind > WRITE_REQUEST or writes.touches(offset, offset + len(what))


def _needs_unit(node: MappedFormat, offset: int, length: int) -> bool:
    """Tell whether a write lies in one unit that holds nothing yet in all of that place."""
    if not 0 < length <= node.allocation_unit - offset % node.allocation_unit:
        return False
    found, flags, _, _ = node.map(offset, length)
    # A part that holds data is written at once by those who come later in the batch: they must not overtake it.
    return found == length and not flags & DATA


def _claim(node: FormatNode, writes: UnitWrites) -> bool:
    try:
        node.check_writable()
        return node.claim_writes(writes)
    except CowhandError:
        return False  # each by itself meets the same, and tells of it


def _allocate(node: FormatNode, writes: UnitWrites, blame: Callable[[int, Any, Exception], None]) -> None:
    """Do *writes*: reserve, put the bytes, link; then one by one what could not be done so. *blame* hears of each that failed."""
    singly: Iterable[int] = range(len(writes.offsets))
    if _claim(node, writes):
        failures: dict[int, Exception] = {}
        try:
            put(node, writes, failures)
        except BaseException as error:
            node.give_up_writes(writes, error)
            raise
        singly = [row for row, host in enumerate(writes.hosts) if host == SINGLY] if SINGLY in writes.hosts else []
        for row, met in failures.items():
            if len(writes.requests(row)) == 1 or not isinstance(met, CowhandError):
                for offset, what in writes.requests(row):
                    blame(offset, what, met)
            else:
                singly.append(row)  # whose fault it is is found out, and the others get what is theirs
        try:
            node.finish_writes(writes, failures)
        except CowhandError as poisoned:
            for row in range(len(writes.offsets)):
                for offset, what in writes.requests(row):
                    blame(offset, what, poisoned)
    for row in singly:
        for offset, what in writes.requests(row):
            try:
                node.write(offset, (what,))
            except Exception as error:  # noqa: BLE001 - the caller is told which one it was
                blame(offset, what, error)


def _together(
    node: MappedFormat, batch: Sequence[Request], index: int, child: Any, host: int, waiting: UnitWrites
) -> int:
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
        if waiting.numbers and waiting.touches(next_offset, next_offset + size):
            break
        buffers.append(buffer)
        total += size
    descriptor = child.lane.lane_fd
    moved = _preadv(descriptor, buffers, host) if kind == READ else _pwritev(descriptor, buffers, host)  # type: ignore[misc]
    if kind == WRITE_REQUEST:
        node.changed = True
    return len(buffers) if moved == total else 0
