"""Comparing what two disks hold: extents first, then memory against memory in large pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from cowhand.copy.engine.engine import PIECE, WORKERS
from cowhand.core.buffers import is_zero
from cowhand.core.errors import CowhandError
from cowhand.core.extents import ALLOCATED, DATA, EOF, OFFSET, ZERO
from cowhand.core.malloc_tuning import expect_bulk
from cowhand.core.progress import CancelToken, Progress
from cowhand.image.open import Image, open_source

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.opening.policy import Policy

SECTOR = 512
#: What strictness looks at. EOF too, as in QEMU: it differs where one disk's last extent begins before the other's.
_STRICT = DATA | ZERO | ALLOCATED | OFFSET | EOF


class Difference(Enum):
    """Why two disks are not the same."""

    CONTENT = "content"  #: bytes differ, at ``offset``
    STATUS = "status"  #: strict: what is allocated or known to be zero differs, at ``offset``
    SIZE = "size"  #: strict: the sizes differ


class CompareResult(NamedTuple):
    """``identical``, or why not. *offset* is that of the first 512-byte sector that differs (as qemu-img tells it).

    ``sizes_differ``: the sizes differ; the disks are identical all the same when the longer one goes on with zeroes. ``size_mismatch`` is the same
    as far as qemu-img tells it: only where the comparison came to the end of the shorter disk.
    """

    identical: bool
    reason: Difference | None = None
    offset: int | None = None
    size_mismatch: bool = False
    sizes_differ: bool = False

    @property
    def message(self) -> str:
        """The line that qemu-img compare prints."""
        if self.reason is Difference.CONTENT:
            return f"Content mismatch at offset {self.offset}!"
        if self.reason is Difference.STATUS:
            return f"Strict mode: Offset {self.offset} block status mismatch!"
        if self.reason is Difference.SIZE:
            return "Strict mode: Image size mismatch!"
        return "Images are identical."


class _Piece(NamedTuple):
    """A stretch and who has to be read there; the other side is zero. Both False: the status differs, which ends the comparison."""

    start: int
    length: int
    first: bool
    second: bool


def compare(
    first: Image,
    second: Image,
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    strict: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    policy: Policy | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> CompareResult:
    """Tell whether two disks have the same content, and where they first differ.

    With *strict* their sizes and what is allocated in them have to be the same too. Nothing is written. Raises CowhandError naming the file
    and the offset where one cannot be read; its facts tell the "side" (0 or 1), and what one was "doing": "reading" or "status".
    """
    with ExitStack() as stack:
        one = open_source(first, stack, first_format, cache=cache, force_share=force_share, policy=policy)
        two = open_source(second, stack, second_format, cache=cache, force_share=force_share, policy=policy)
        mismatch = one.size != two.size
        if strict and mismatch:
            return CompareResult(False, Difference.SIZE, size_mismatch=True, sizes_differ=True)
        comparison = _Comparison(one, two, strict, progress or Progress(), cancel or CancelToken())
        found = comparison.run(workers)
        if found is None:
            return CompareResult(True, size_mismatch=mismatch, sizes_differ=mismatch)
        offset, reason = found
        reached = offset >= min(one.size, two.size)
        return CompareResult(False, reason, offset, mismatch and reached, sizes_differ=mismatch)


class _Comparison:
    """One comparison: workers take pieces in order; the lowest difference wins."""

    def __init__(self, first: Disk, second: Disk, strict: bool, progress: Progress, cancel: CancelToken) -> None:
        self.first = first
        self.second = second
        self.strict = strict
        self.progress = progress
        self.cancel = cancel
        self.found: tuple[int, Difference] | None = None
        progress.total = max(first.size, second.size)
        expect_bulk(progress.total)
        self._pieces = self._cut()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._failed_at = 0
        self._reached = 0  #: the end of the last piece that somebody took

    def run(self, workers: int) -> tuple[int, Difference] | None:
        threads = [threading.Thread(target=self._work, name=f"compare-{index}") for index in range(max(1, workers))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._failure = error
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        # A difference that lies before what could not be read is an answer all the same, as it is when one reads in order.
        if self._failure is not None:
            if self.found is None or self._failed_at < self.found[0]:
                raise self._failure
        if self.found is None:
            self.progress.finish()
        return self.found

    # -- what has to be read

    def _cut(self) -> Iterator[_Piece]:
        """Yield the pieces of which at least one side has to be read, in order."""
        pending: _Piece | None = None
        failure: CowhandError | None = None
        try:
            for start, length, one, two in self._pairs():
                if self.strict and (one ^ two) & _STRICT:
                    if pending is not None:
                        yield from self._split(pending)
                    yield _Piece(start, length, False, False)
                    return
                piece = _Piece(start, length, not one & ZERO, not two & ZERO)
                if not piece.first and not piece.second:
                    self.progress.advance(length)
                    continue
                if pending is not None:
                    if pending[2:] == piece[2:] and pending.start + pending.length == start:
                        pending = pending._replace(length=pending.length + length)
                        continue
                    yield from self._split(pending)
                pending = piece
        except CowhandError as error:
            failure = error
        # What lies before a stretch of which nobody can tell what it is may differ: that is the answer then.
        if pending is not None:
            yield from self._split(pending)
        if failure is not None:
            raise failure

    @staticmethod
    def _split(piece: _Piece) -> Iterator[_Piece]:
        start, end = piece.start, piece.start + piece.length
        while start < end:
            stop = min(start - start % PIECE + PIECE, end)
            yield piece._replace(start=start, length=stop - start)
            start = stop

    def _pairs(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (start, length, flags, flags) of both disks side by side; behind the end of one its bytes count as zeroes."""
        rows = [_rows(self.first, 0), _rows(self.second, 1)]
        ends = [0, 0]
        flags = [ZERO, ZERO]
        position, total = 0, max(self.first.size, self.second.size)
        while position < total:
            for side in (0, 1):
                if ends[side] <= position:
                    ends[side], flags[side] = next(rows[side], (total, ZERO))
            stop = min(ends)
            yield position, stop - position, flags[0], flags[1]
            position = stop

    # -- a worker

    def _work(self) -> None:
        buffers = (bytearray(PIECE), bytearray(PIECE))
        position = 0
        try:
            while True:
                with self._lock:
                    if self._failure is not None or self.found is not None:
                        return
                    self.cancel.check()
                    position = self._reached  # where an error of the next line lies, at least
                    piece = next(self._pieces, None)
                    if piece is None:
                        return
                    position, self._reached = piece.start, piece.start + piece.length
                if not piece.first and not piece.second:
                    self._tell(piece.start, Difference.STATUS)
                    return
                at = self._look(piece, *buffers)
                if at >= 0:
                    self._tell((piece.start + at) // SECTOR * SECTOR, Difference.CONTENT)
                    return
                self.progress.advance(piece.length)
        except BaseException as error:  # noqa: BLE001 - raised by run() in the caller's thread
            with self._lock:
                if self._failure is None or position < self._failed_at:
                    self._failure, self._failed_at = error, position

    def _tell(self, offset: int, reason: Difference) -> None:
        with self._lock:
            if self.found is None or offset < self.found[0]:
                self.found = (offset, reason)

    def _look(self, piece: _Piece, one: bytearray, two: bytearray) -> int:
        """Return where in *piece* the first different byte lies, or -1."""
        start, length = piece.start, piece.length
        if length != len(one):
            one, two = bytearray(length), bytearray(length)
        if piece.first:
            _read(self.first, 0, start, one)
        if piece.second:
            _read(self.second, 1, start, two)
        if piece.first and piece.second:
            return -1 if one == two else first_difference(one, two)
        data = one if piece.first else two
        return -1 if is_zero(data) else first_difference(data, bytes(length))


def _rows(disk: Disk, side: int) -> Iterator[tuple[int, int]]:
    try:
        for batch in disk.extents():
            for start, length, flags in zip(batch.start, batch.length, batch.flags, strict=True):
                end = start + length
                yield end, flags | EOF if end == disk.size else flags
    except CowhandError as error:
        error.facts.update(side=side, doing="status")
        raise error.within(qemu=f"Sector allocation test failed for {disk.filename}") from None


def _read(disk: Disk, side: int, offset: int, buffer: bytearray) -> None:
    try:
        disk.read_into(offset, buffer)
    except CowhandError as error:
        if error.offset is None:
            error.offset = offset
        error.facts.update(side=side, doing="reading", disk_offset=offset)
        raise error.within(
            f"comparing at {offset:#x}", qemu=f"Error while reading offset {offset} of {disk.filename}"
        ) from None


def first_difference(one: bytes | bytearray, two: bytes | bytearray) -> int:
    """Return the index of the first byte in which two sequences of the same length differ; they must differ."""
    begin, end = 0, len(one)
    while end - begin > 1:
        middle = (begin + end) // 2
        if one[begin:middle] == two[begin:middle]:
            begin = middle
        else:
            end = middle
    return begin
