"""Writing a disk as raw bytes, in order, into a descriptor that may not be able to seek: a pipe, or standard output."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cowhand.copy.engine import plan
from cowhand.copy.engine.engine import PIECE
from cowhand.copy.engine.plan import Policy
from cowhand.copy.engine.source import Part, SalvagingSource, Source
from cowhand.copy.ops.convert import ConvertResult
from cowhand.copy.ops.settings import Settings, throttle_for
from cowhand.copy.ops.unreadable import Unreadable
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import InvalidArgument, from_os_error
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.units import parse_size
from cowhand.image.open import Image, open_source

if TYPE_CHECKING:
    from cowhand.block.opening.policy import Policy as OpenPolicy

#: Seconds after which a writer that waits for its reader looks whether it was cancelled.
_PATIENCE = 0.2


def stream(
    sources: Image | Sequence[Image],
    descriptor: int,
    *,
    name: str = "standard output",
    source_format: str | None = None,
    snapshot: str | None = None,
    begin: int = 0,
    end: int | None = None,
    salvage: bool = False,
    rate_limit: int | str = 0,
    source_cache: str = "writeback",
    force_share: bool = False,
    policy: OpenPolicy | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
    warn: Callable[[str], None] | None = None,
) -> ConvertResult:
    """Write the bytes [*begin*, *end*) of *sources*, one behind the other, to *descriptor* from its position on; *name* is for messages.

    Into a regular file that ends there, zeroes become holes. Other arguments as for :func:`cowhand.copy.ops.convert.convert`; a part is taken
    of one source only. Raises CowhandError, BrokenPipeError when the reader has gone, Cancelled.
    """
    inputs = sources if isinstance(sources, (list, tuple)) else (sources,)
    if len(inputs) > 1 and (snapshot is not None or begin or end is not None):
        raise InvalidArgument("a snapshot, or a part, is taken of one source only")
    lost = Unreadable()
    with ExitStack() as stack:
        disks = [
            open_source(
                what,
                stack,
                source_format,
                snapshot=snapshot,
                cache=source_cache,
                force_share=force_share,
                policy=policy,
            )
            for what in inputs
        ]
        parts: list[Part] = [Part(disk, 0, disk.size) for disk in disks]
        if begin or end is not None:
            stop = disks[0].size if end is None else min(end, disks[0].size)
            parts = [Part(disks[0], min(begin, stop), max(0, stop - begin))]
        source = SalvagingSource(parts, report=lost.add) if salvage else Source(parts)
        writer = _Writer(descriptor, name, cancel or CancelToken())
        moved = _copy(source, writer, Settings(rate_limit=parse_size(rate_limit)), progress or Progress())
        return ConvertResult(name, "raw", source.size, moved.data, moved.zero, 0, lost.ranges(source.size), lost.reason)


def _copy(source: Source, writer: _Writer, settings: Settings, progress: Progress) -> plan.Totals:
    totals = plan.totals(source.runs(Policy()))
    progress.total = source.size
    throttle = throttle_for(settings)
    buffer = bytearray(PIECE)
    for start, length, kind in source.runs(Policy()):
        if kind == plan.ZERO:
            writer.zeroes(length)
            progress.advance(length)
            continue
        for position in range(start, start + length, PIECE):
            view = memoryview(buffer)[: min(PIECE, start + length - position)]
            writer.cancel.check()
            if throttle is not None:
                throttle.take(len(view), writer.cancel)
            source.read_into(position, view)
            writer.write(view)
            progress.advance(len(view))
    writer.finish()
    progress.finish()
    return totals


class _Writer:
    """The descriptor's end of it. Raises what the system says; a closed pipe as BrokenPipeError."""

    def __init__(self, descriptor: int, name: str, cancel: CancelToken) -> None:
        self.descriptor = descriptor
        self.cancel = cancel
        self._name = name
        found = os.fstat(descriptor)
        self._sparse = stat.S_ISREG(found.st_mode) and not self._appends()
        if self._sparse:
            # Holes only where nothing lies yet.
            self._sparse = os.lseek(descriptor, 0, os.SEEK_CUR) >= found.st_size

    def _appends(self) -> bool:
        try:
            import fcntl
        except ImportError:
            return False
        return bool(fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & os.O_APPEND)

    def write(self, view: memoryview) -> None:
        try:
            while view:
                self._wait()
                view = view[os.write(self.descriptor, view[:PIECE]) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise from_os_error(error, self._name, doing="writing") from error

    def _wait(self) -> None:
        """Wait until a reader takes more, or the copy is cancelled."""
        if not hasattr(select, "poll"):
            return
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        while not poll.poll(_PATIENCE * 1000):
            self.cancel.check()

    def zeroes(self, length: int) -> None:
        if self._sparse:
            os.lseek(self.descriptor, length, os.SEEK_CUR)
            return
        while length > 0:
            self.cancel.check()
            count = min(length, ZEROES_SIZE)
            self.write(ZEROES[:count])
            length -= count

    def finish(self) -> None:
        """Let a file end where the disk does."""
        if self._sparse:
            try:
                end = os.lseek(self.descriptor, 0, os.SEEK_CUR)
                if end > os.fstat(self.descriptor).st_size:
                    os.ftruncate(self.descriptor, end)
            except OSError as error:
                raise from_os_error(error, self._name, doing="writing") from error
