"""``aio_read``, ``aio_write``, ``aio_flush``: requests in the background. Such a command succeeds when its request was started."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowhand.cli.compat.io import parsing
from cowhand.cli.compat.io.parsing import Complaint, UsageComplaint, number
from cowhand.cli.compat.io.report import Timer, dump, number_of, statistics, verify
from cowhand.cli.compat.io.requests import DEFAULT_PATTERN, read_disk, room, the_disk, unread
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.cli.compat.io.session import Session


def _request(work: Callable[[], object], what: str, show: Callable[[Timer], None]) -> Callable[[], Callable[[], None]]:
    """Return what the thread runs: *work*, then the function that shows its result or its error."""
    timer = Timer()

    def run() -> Callable[[], None]:
        try:
            work()
        except CowhandError as error:
            failure = error
            return lambda: print(f"{what} failed: {os.strerror(number_of(failure))}")
        timer.stop()
        return lambda: show(timer)

    return run


def aio_read(session: Session, words: Sequence[str]) -> bool:
    """Read a range in the background."""
    positional: list[str] = []
    flags: set[str] = set()
    byte = None
    for key, value in parsing.options(words, "CiP:qv", positional, registered=True):
        if key == "P":
            byte = parsing.pattern(value)
        elif key == "i":
            print("injecting invalid read request")
            return True
        flags.add(key)
    if len(positional) < 2:
        raise UsageComplaint
    offset = number(positional[0])
    buffer = unread(sum(parsing.lengths(positional[1:])))
    disk = the_disk(session)

    def show(timer: Timer) -> None:
        if byte is not None:
            verify(buffer, byte, offset)
        if "q" not in flags:
            if "v" in flags:
                dump(buffer, offset)
            statistics("read", timer, offset, len(buffer), len(buffer), terse="C" in flags)

    session.background.start(_request(lambda: read_disk(disk, offset, buffer), "readv", show))
    return True


def aio_write(session: Session, words: Sequence[str]) -> bool:
    """Write a range in the background."""
    positional: list[str] = []
    flags: set[str] = set()
    byte = DEFAULT_PATTERN
    for key, value in parsing.options(words, "CfiP:quz", positional, registered=True):
        if key == "P":
            byte = parsing.pattern(value)
        elif key == "i":
            print("injecting invalid write request")
            return True
        flags.add(key)
    if len(positional) < 2:
        raise UsageComplaint
    if "z" in flags and len(positional) != 2:
        raise Complaint("-z supports only a single length parameter")
    if "u" in flags and "z" not in flags:
        raise Complaint("-u requires -z to be specified")
    if {"z", "P"} <= flags:
        flags.discard("P")  # as QEMU: zeroes are written
    offset = number(positional[0])
    disk = the_disk(session)
    fua = "f" in flags
    if "z" in flags:
        count = number(positional[1])

        def work() -> None:
            disk.write_zeroes(offset, room(disk, offset, count), unmap="u" in flags, fua=fua)

    else:
        count = sum(parsing.lengths(positional[1:]))
        data = bytes([byte]) * count

        def work() -> None:
            disk.write(offset, memoryview(data)[: room(disk, offset, count)], fua=fua)

    def show(timer: Timer) -> None:
        if "q" not in flags:
            statistics("wrote", timer, offset, count, count, terse="C" in flags)

    session.background.start(_request(work, "aio_write", show))
    return True


def aio_discard(session: Session, words: Sequence[str]) -> bool:
    """Discard a range in the background."""
    positional: list[str] = []
    flags = {key for key, _ in parsing.options(words, "Cq", positional)}
    if len(positional) != 2:
        raise UsageComplaint
    offset, count = number(positional[0]), number(positional[1])
    disk = the_disk(session)

    def show(timer: Timer) -> None:
        if "q" not in flags:
            statistics("discarded ", timer, offset, count, count, terse="C" in flags)

    def work() -> None:
        disk.discard(offset, room(disk, offset, count))

    session.background.start(_request(work, "aio_discard", show))
    return True


def aio_flush(session: Session, words: Sequence[str]) -> bool:
    """Wait for all requests in the background."""
    session.background.wait()
    return True
