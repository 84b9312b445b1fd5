"""Putting the bytes of a batch's first writes into the space that was reserved for them, with what surrounds them; neighbours together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.format_io.batch_rows import SINGLY, UnitWrites
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, give, take

if TYPE_CHECKING:
    from cowhand.block.format_io.format_node import FormatNode

#: Rows that are done by one system call, at most; bytes that are, where they are filled up; and from how many on a second thread helps.
_MAX_TOGETHER = 64
_GROUP = 512 << 10
_WORTH_A_THREAD = 512 << 10
_pwritev = getattr(os, "pwritev", None)


def put(node: FormatNode, writes: UnitWrites, failures: dict[int, Exception]) -> None:
    """Place the bytes of *writes*, which are reserved, and what surrounds them. A row's error goes into *failures*, and the others are done."""
    lane = writes.child.lane
    descriptor = lane.lane_fd if lane is not None and _pwritev is not None else -1
    part, bare, mixed, encodes = writes.part, writes.bare, writes.mixed, node.encodes
    hosts, offsets, lengths, buffers = writes.hosts, writes.offsets, writes.lengths, writes.buffers
    filling: list[int] = []
    last, done = len(hosts) - 1, 0
    for row, host in enumerate(hosts):
        if host == SINGLY or row < done:
            continue
        length = lengths[row]
        if encodes or not (bare[row] or not ((offsets[row] | length) % part or row in mixed)):
            filling.append(row)
        elif descriptor < 0 or row in mixed or (row < last and hosts[row + 1] == host + length):
            done = _put_run(writes, row, failures)
        else:
            # Nothing has to be put around it: old and new read as zeroes, or it is all that changes.
            try:
                if _pwritev(descriptor, buffers[row], host) == length:  # type: ignore[misc]
                    continue
            except OSError:
                pass  # the long way meets the same, and deals with it
            _put_row(writes, row, failures)
    if filling:
        _fill(node, writes, filling, failures)


def _put_run(writes: UnitWrites, first: int, failures: dict[int, Exception]) -> int:
    """Write row *first*, around which nothing has to be put, and those behind it that are like it and adjoin it; return the row after them."""
    part, bare, mixed, hosts, lengths = writes.part, writes.bare, writes.mixed, writes.hosts, writes.lengths
    row, end = first, hosts[first]
    run: list[Buffer] = []
    while row < len(hosts) and hosts[row] == end and row not in mixed and row < first + _MAX_TOGETHER:
        if not bare[row] and (writes.offsets[row] | lengths[row]) % part:
            break
        run += writes.buffers[row]
        end += lengths[row]
        row += 1
    if row > first + 1:
        try:
            writes.child.write(hosts[first], run)
            return row
        except Exception:  # noqa: BLE001 - one by one: whose fault it is is found out, and the others get what is theirs
            pass
    row = max(row, first + 1)
    for each in range(first, row):
        _put_row(writes, each, failures)
    return row


def _put_row(writes: UnitWrites, row: int, failures: dict[int, Exception]) -> None:
    """Write one row around which nothing has to be put."""
    host = writes.hosts[row] - writes.offsets[row]
    try:
        if row in writes.mixed:
            for offset, what in writes.mixed[row]:
                writes.child.write(host + offset, (what,))
        else:
            writes.child.write(writes.hosts[row], writes.buffers[row])
    except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
        failures[row] = error


# -- with what was there before


def _fill(node: FormatNode, writes: UnitWrites, rows: list[int], failures: dict[int, Exception]) -> None:
    """Copy what the copy units of *rows* read before to their new places, with what is written there."""
    groups = list(_neighbours(node, writes, rows))
    if len(groups) < 2 or len(rows) * writes.part < _WORTH_A_THREAD:
        for group in groups:
            _fill_group(node, writes, group, failures)
        return
    from cowhand.core.pairs import both

    # Both take from one iterator, which hands each group out once.
    remaining = iter(groups)

    def work() -> None:
        for group in remaining:
            _fill_group(node, writes, group, failures)

    both(work, work)


def _neighbours(node: FormatNode, writes: UnitWrites, rows: list[int]) -> Iterator[list[int]]:
    """Yield *rows* in groups whose new places adjoin."""
    group: list[int] = []
    end = total = 0
    for row in rows:
        begin, stop = writes.span(row)
        place = writes.hosts[row] - (writes.offsets[row] - begin)
        # What is stored in another form goes by its guest offset, one row after the other.
        if group and (node.encodes or place != end or total + stop - begin > _GROUP):
            yield group
            group, total = [], 0
        group.append(row)
        total += stop - begin
        end = place + stop - begin
    if group:
        yield group


def _fill_group(node: FormatNode, writes: UnitWrites, group: list[int], failures: dict[int, Exception]) -> None:
    """Fill the places of a group in one write."""
    borrowed: list[memoryview] = []
    first = group[0]
    begin, _ = writes.span(first)
    try:
        pieces = [piece for row in group for piece in _filled(node, writes, row, borrowed)]
        node.store(writes.child, writes.hosts[first] - (writes.offsets[first] - begin), begin, pieces)
    except Exception as error:  # noqa: BLE001 - the first is raised after the rest has ended
        if len(group) == 1:
            failures[first] = error
            return
    else:
        return
    finally:
        for piece in borrowed:
            give(piece)
    for row in group:
        # One by one: whose fault it is is found out, and the others get what is theirs.
        _fill_group(node, writes, [row], failures)


def _filled(node: FormatNode, writes: UnitWrites, row: int, borrowed: list[memoryview]) -> list[Buffer]:
    """Return the bytes of all that *row* changes; what was taken for it is added to *borrowed*."""
    from cowhand.block.format_io.mapped import MappedFormat

    begin, end = writes.span(row)
    offset = writes.offsets[row]
    if row not in writes.mixed:
        stop = offset + writes.lengths[row]
        if stop - offset == end - begin:
            return writes.buffers[row]
        if node.known_zero(begin, end - begin):
            return [*_zeroes(offset - begin), *writes.buffers[row], *_zeroes(end - stop)]
    piece = take(end - begin)
    borrowed.append(piece)
    # All of it at once, and the guest's bytes put over it: one system call instead of two.
    MappedFormat.read_into(node, begin, piece)
    for at, buffer in writes.requests(row):
        piece[at - begin : at - begin + len(buffer)] = buffer
    return [piece]


def _zeroes(length: int) -> list[Buffer]:
    return [ZEROES[: min(ZEROES_SIZE, length - at)] for at in range(0, length, ZEROES_SIZE)]
