"""The copy engine: runs in, bytes moved by workers that each own their buffer; the first error stops all, and is the one that is raised.

Workers take pieces of two MiB from one iterator, so that nothing piles up. Each reads its piece and looks for zeroes by itself; taking
space in the target is done in the order of the disk (unless that is not wanted), since this decides how the target is laid out; then the
bytes are written by all workers at once. A worker that compressed its piece before its turn leaves it to the one whose turn it is and goes
on with the next. Threads help because system calls and compression release the interpreter lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.copy.engine.plan import DATA, SKIP, ZERO, Run
from cowhand.core.buffers import fill_zero
from cowhand.core.errors import CowhandError
from cowhand.core.progress import CancelToken, Progress

if TYPE_CHECKING:
    from cowhand.copy.engine.clone import Cloner
    from cowhand.copy.engine.sink import Sink
    from cowhand.copy.engine.source import Source
    from cowhand.copy.engine.throttle import Throttle

#: Bytes that are read and written at once: large enough to hide the interpreter, small enough to stay in the processor's cache.
PIECE = 2 << 20
#: Bytes that are made zero at once, so that cancelling does not wait long.
ZERO_PIECE = 1 << 30
#: Two threads keep the kernel busy on both ends of a plain copy; more gain nothing.
WORKERS = 2
MAX_WORKERS = 16


class Engine:
    """One copy from *source* to *sink*. Make it, call :meth:`run` once.

    *in_order* takes space in the order of the disk. *progress* counts bytes of runs that are copied, and of zeroes where they have to be written.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        *,
        workers: int = WORKERS,
        in_order: bool = True,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
        throttle: Throttle | None = None,
        cloner: Cloner | None = None,
    ) -> None:
        self.source = source
        self.sink = sink
        self.workers = max(1, min(workers, MAX_WORKERS))
        self.progress = progress or Progress()
        self.cancel = cancel or CancelToken()
        self.piece = max(PIECE, sink.unit)
        self._throttle = throttle
        self._cloner = cloner
        self._turns = _Turns(self.workers if sink.works_long else 0) if in_order and self.workers > 1 else None
        self._spare: list[bytearray] = []  #: buffers that nobody has
        self._lock = threading.Lock()  #: guards the iterator of pieces
        self._pieces: Iterator[_Piece] = iter(())
        self._numbers = 0
        self._failure: BaseException | None = None

    def run(self, runs: Iterable[Run]) -> None:
        """Copy *runs*; return when the last byte is where it belongs. Raises the first error, or Cancelled."""
        pieces: Iterator[_Piece] = (_Piece(*piece) for piece in self._cut(runs))
        # A fragmented source is copied in large pieces.
        if self.source.joins:
            pieces = self._announced(self._joined(pieces) if self.sink.joins else pieces)
        self._pieces = pieces
        threads = [threading.Thread(target=self._work, name=f"copy-{index}") for index in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:
            # An interrupt, or the system has no more threads: the workers hold buffers and reservations, so they end by themselves.
            self._fail(error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._failure is not None:
            raise self._failure
        self.sink.finish()

    def _cut(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yield *runs* cut into pieces that begin and end on multiples of the piece size."""
        for start, length, kind in runs:
            if kind == SKIP or (kind == ZERO and self.sink.reads_zero):
                continue
            end = start + length
            while start < end:
                size = self.piece
                if kind == ZERO:
                    size = ZERO_PIECE
                elif self._clones and self._throttle is None:
                    assert self._cloner is not None
                    size = self._cloner.piece
                stop = min(start - start % size + size, end)
                yield Run(start, stop - start, kind)
                start = stop

    @property
    def _clones(self) -> bool:
        """Whether blocks are shared instead of copied, as far as is known."""
        return self._cloner is not None and self._cloner.active

    def _joined(self, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
        """Yield *pieces* with those of data that one buffer takes made one."""
        last: _Piece | None = None
        for piece in pieces:
            if last is not None:
                begin, end = last.start + last.length, piece.start
                if piece.kind != DATA or (piece.start + piece.length - 1) // self.piece != last.start // self.piece:
                    yield last
                    last = None
                else:
                    gaps = (*last.gaps, (begin - last.start, end - last.start)) if begin < end else last.gaps
                    last = _Piece(last.start, piece.start + piece.length - last.start, DATA, gaps)
                    continue
            if piece.kind == DATA and not self._clones:
                last = piece
            else:
                yield piece
        if last is not None:
            yield last

    def _announced(self, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
        """Yield *pieces*, each a little after its source was told of it: the medium reads the next ones while workers write."""
        waiting: deque[_Piece] = deque()
        for piece in pieces:
            if piece.kind == DATA and not self._clones:
                self.source.announce(piece.start, piece.length)
            waiting.append(piece)
            while len(waiting) > (0 if self._clones else self.workers):
                yield waiting.popleft()
        yield from waiting

    # -- a worker

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._failure is not None:
                        return
                    self.cancel.check()
                    piece = next(self._pieces, None)
                    number = self._numbers
                    self._numbers += 1
                if piece is None:
                    return
                start, length, kind, _ = piece
                if self._throttle is not None:
                    self._throttle.take(piece.amount, self.cancel)
                if kind == DATA:
                    if length <= self.piece and not self._clones:
                        self._copy_piece(piece, number)
                    else:
                        self._copy(start, length, number)
                else:
                    self._await_turn(number)
                    self._writing(start, self.sink.zero, start, length)
                    self.progress.advance(length)
                    self._put_following(self._end_turn())
        except BaseException as error:  # noqa: BLE001 - raised by run() in the caller's thread
            self._fail(error)

    def _copy(self, start: int, length: int, number: int) -> None:
        cloner = self._cloner
        whole = length
        self._await_turn(number)
        if cloner is not None and cloner.active:
            done = self._writing(start, cloner.clone, start, length)
            start += done
            length -= done
        # What cannot be shared of this large piece goes the common way.
        buffer = self._buffer()
        end = start + length
        while start < end:
            stop = min(start - start % self.piece + self.piece, end)
            prepared = self._read(buffer, start, stop - start)
            with self.sink.hold():
                placed = self._writing(start, self.sink.place, start, buffer, stop - start, prepared)
                self._writing(start, self.sink.store, start, buffer, placed)
            start = stop
        self._spare.append(buffer)
        self.progress.advance(whole)
        self._put_following(self._end_turn())

    def _copy_piece(self, piece: _Piece, number: int) -> None:
        buffer = self._buffer()
        ready = _Ready(piece, buffer, self._read(buffer, piece.start, piece.length, piece.gaps))
        if self._turns is not None and self._turns.leave(number, ready):
            return
        self._await_turn(number)
        self._put_following(ready)

    def _put_following(self, ready: _Ready | None) -> None:
        """Write *ready*, whose turn it is, and what was left for the turns after it."""
        while ready is not None:
            piece, buffer, prepared = ready
            start, length = piece.start, piece.length
            with self.sink.hold():
                placed = self._writing(start, self.sink.place, start, buffer, length, prepared, piece.gaps)
                ready = self._end_turn()
                self._writing(start, self.sink.store, start, buffer, placed)
            self._spare.append(buffer)
            self.progress.advance(piece.amount)

    def _buffer(self) -> bytearray:
        try:
            return self._spare.pop()
        except IndexError:
            return bytearray(self.piece)

    def _read(self, buffer: bytearray, start: int, length: int, gaps: tuple[tuple[int, int], ...] = ()) -> Any:
        view = memoryview(buffer)
        position = 0
        wanted: list[tuple[int, memoryview]] = []
        for begin, end in gaps:
            wanted.append((start + position, view[position:begin]))
            if self.sink.grain:
                fill_zero(view[begin:end])
            position = end
        wanted.append((start + position, view[position:length]))
        try:
            self.source.read_all(wanted)
        except CowhandError as error:
            error.facts["doing"] = "reading"
            start = error.facts.get("disk_offset", start)
            place = error.facts.get("source_offset", start)
            raise error.within(f"reading at {place:#x}", qemu=f"error while reading at byte {start}") from None
        return self.sink.prepare(start, buffer, length, gaps)

    def _writing(self, start: int, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except CowhandError as error:
            error.facts["doing"] = "writing"
            raise error.within(f"writing at {start:#x}", qemu=f"error while writing at byte {start}") from None

    # -- order, and the end

    def _await_turn(self, number: int) -> None:
        if self._turns is not None and not self._turns.wait(number):
            raise _Stopped

    def _end_turn(self) -> _Ready | None:
        return self._turns.advance() if self._turns is not None else None

    def _fail(self, error: BaseException) -> None:
        if self._failure is None and not isinstance(error, _Stopped):
            self._failure = error
        if self._turns is not None:
            self._turns.stop()


class _Stopped(Exception):
    """Another worker failed while this one waited for its turn."""


class _Piece(NamedTuple):
    """What a worker does at once: a part of a run, or data of several without the *gaps* between (positions in the piece)."""

    start: int
    length: int
    kind: int
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def amount(self) -> int:
        """How many bytes are copied."""
        return self.length - sum(end - begin for begin, end in self.gaps)


class _Ready(NamedTuple):
    """A piece that was read and prepared."""

    piece: _Piece
    buffer: bytearray
    prepared: Any


class _Turns:
    """Lets pieces through in the order of their numbers; up to *room* of them may be left for those whose turn is earlier."""

    def __init__(self, room: int) -> None:
        self._condition = threading.Condition()
        self._next = 0
        self._room = room
        self._left: dict[int, _Ready] = {}
        self._stopped = False

    def leave(self, number: int, ready: _Ready) -> bool:
        """Leave *number*'s piece to whoever has the turn before it; False where its turn has come, or there is no room."""
        with self._condition:
            if self._next == number or self._stopped or len(self._left) >= self._room:
                return False
            self._left[number] = ready
            return True

    def wait(self, number: int) -> bool:
        """Wait until it is *number*'s turn; False when all is to end instead."""
        with self._condition:
            while self._next != number and not self._stopped:
                self._condition.wait()
            return not self._stopped

    def advance(self) -> _Ready | None:
        """End a turn; return the piece that was left for the next one, whose turn is the caller's then."""
        with self._condition:
            self._next += 1
            ready = self._left.pop(self._next, None)
            if ready is None:
                self._condition.notify_all()
            return ready

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._left.clear()
            self._condition.notify_all()
