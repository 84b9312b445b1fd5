"""What a copy has to do, from what the source is made of: extents in, runs out. No I/O.

A run is a stretch of the target with one thing to do: copy it (DATA), make it read as zeroes (ZERO), or leave it to the target's backing file
(SKIP). Runs to be copied begin and end on the target's units, so that none is allocated for half its bytes and copied for the
other half; what they take in beside data reads as zeroes, or as what shows through, in the source as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cowhand.core import extents
from cowhand.core.extents import ExtentBatch

DATA = 0
ZERO = 1
SKIP = 2


class Run(NamedTuple):
    """Bytes ``[start, start + length)`` of the target and what is to be done there: DATA, ZERO or SKIP."""

    start: int
    length: int
    kind: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Totals(NamedTuple):
    """Bytes by what is to be done with them; their sum is the target's size."""

    data: int
    zero: int
    skip: int


class Policy(NamedTuple):
    """How extents become runs.

    ``unit``: runs of data begin and end on multiples of it. ``skip_unallocated``: what the asked layers do not allocate is left to the
    target's backing file; otherwise it is data. ``skip_zero_from``: from there on the target reads as zeroes by itself (its backing file has
    ended, or it has just grown). ``zeroes_are_data``: every byte is written, which keeps the target fully allocated.
    """

    unit: int = 1
    skip_unallocated: bool = False
    skip_zero_from: int | None = None
    zeroes_are_data: bool = False


def rows_of(batches: Iterable[ExtentBatch], base: int, policy: Policy) -> Iterator[Run]:
    """Yield one source's extents as runs, its byte 0 at *base* of the target; joined within a batch, not yet rounded."""
    limit = policy.skip_zero_from
    for batch in batches:
        for start, length, kind in _of_one_kind(batch, policy):
            start += base
            if kind == ZERO and limit is not None and start + length > limit:
                if start < limit:
                    yield Run(start, limit - start, ZERO)
                    length -= limit - start
                    start = limit
                kind = SKIP
            yield Run(start, length, kind)


def _of_one_kind(batch: ExtentBatch, policy: Policy) -> Iterator[tuple[int, int, int]]:
    """Yield (start, length, kind) of *batch*, neighbours of one kind as one: a fragmented disk has many more extents than runs."""
    meaning = {flags: _kind(flags, policy) for flags in set(batch.flags)}
    begin, last = batch.begin, -1
    for start, flags in zip(batch.start, batch.flags, strict=True):
        kind = meaning[flags]
        if kind != last:
            if last >= 0:
                yield begin, start - begin, last
            begin, last = start, kind
    if last >= 0:
        yield begin, batch.end - begin, last


def _kind(flags: int, policy: Policy) -> int:
    if flags & extents.ZERO:
        return DATA if policy.zeroes_are_data else ZERO
    return DATA if flags & extents.DATA or not policy.skip_unallocated else SKIP


def rounded(rows: Iterable[Run], unit: int, end: int) -> Iterator[Run]:
    """Yield *rows*, which adjoin from 0 on, with data widened to whole units (at most to *end*) at the cost of its neighbours."""
    if unit == 1:
        yield from rows
        return
    covered = 0  # the end of the last widened data
    waiting: list[Run] = []  # parts of one unit, its beginning included, that data may still take in
    for row in rows:
        if not waiting and row.start >= covered and not (row.start | row.start + row.length) % unit:
            yield row
            continue
        if row.kind == DATA:
            waiting = []
            start = max(row.start - row.start % unit, covered)
            covered = max(min(-(-row.end // unit) * unit, end), covered)
            if start < covered:
                yield Run(start, covered - start, DATA)
            continue
        start = max(row.start, covered)
        whole = row.end - row.end % unit
        if waiting and whole > waiting[0].start:
            yield from waiting
            waiting = []
        if whole > start:
            yield Run(start, whole - start, row.kind)
            start = whole
        if start < row.end:
            waiting.append(Run(start, row.end - start, row.kind))
    yield from waiting


def joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield *runs* with neighbours of one kind made one."""
    last: Run | None = None
    for run in runs:
        if last is not None and last.kind == run.kind and last.end == run.start:
            last = Run(last.start, last.length + run.length, run.kind)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def totals(runs: Iterable[Run]) -> Totals:
    """Add up what *runs* ask for."""
    amounts = [0, 0, 0]
    for run in runs:
        amounts[run.kind] += run.length
    return Totals(*amounts)
