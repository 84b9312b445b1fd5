"""``open``, ``close``, ``reopen``, ``flush``, ``truncate``, breakpoints, and how the tool waits and ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cowhand.block.node.options import CACHE_MODES
from cowhand.cli.compat import optionstrings
from cowhand.cli.compat.io import parsing
from cowhand.cli.compat.io.opening import How
from cowhand.cli.compat.io.parsing import Complaint, UsageComplaint, c_integer, number
from cowhand.cli.compat.io.report import number_of
from cowhand.cli.compat.io.requests import the_disk
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.filters.blkdebug.node import BlkDebugNode
    from cowhand.cli.compat.io.session import Session

_PREALLOCATION = ("off", "metadata", "falloc", "full")


def open_command(session: Session, words: Sequence[str]) -> bool:
    """Open an image."""
    positional: list[str] = []
    how = How()
    for key, value in parsing.options(words, "snCro:ki:t:d:U", positional):
        if key == "o":
            if session.image_opts:
                raise Complaint("--image-opts and 'open -o' are mutually exclusive")
            how.options.update(optionstrings.as_description(value, None))
        else:
            how.take(key, value)
    if len(positional) > 1:
        raise UsageComplaint
    if session.image_opts and positional:
        how.options.update(optionstrings.as_description(positional.pop(), None))
    if session.disk is not None:
        raise Failure("file open already, try 'help close'")
    session.open(positional[0] if positional else None, how)
    return True


def close(session: Session, words: Sequence[str]) -> bool:
    """Close the image."""
    session.close()
    return True


def reopen(session: Session, words: Sequence[str]) -> bool:
    """Change how the image is open."""
    positional: list[str] = []
    writable: bool | None = None
    cache: str | None = None
    options: dict[str, Any] = {}
    for key, value in parsing.options(words, "c:o:rw", positional):
        match key:
            case "c":
                if value not in CACHE_MODES:
                    raise Failure(f"Invalid cache option: {value}")
                cache = value
            case "o":
                options.update(optionstrings.as_description(value, None))
            case "r" | "w":
                if writable is not None:
                    raise Failure("Only one -r/-w option may be given")
                writable = key == "w"
    if positional:
        raise UsageComplaint
    if writable is not None and "read-only" in options:
        raise Failure("Cannot set both -r/-w and 'read-only'")
    if cache is not None and any(name.startswith("cache.") for name in options):
        raise Failure("Cannot set both -c and the cache options")
    _reopen(session, writable, cache, options)
    return True


def _reopen(session: Session, writable: bool | None, cache: str | None, options: dict[str, Any]) -> None:
    from cowhand.block.graph.reopen import reopen as reopen_disk

    node = session.image
    disk = the_disk(session)
    write_through = None
    if cache is not None:
        write_through, options["cache.direct"], options["cache.no-flush"] = CACHE_MODES[cache]
    if node is not disk.root and (writable is False or options.get("read-only") == "on"):
        raise Failure(f"Can't set node '{node.name}' to r/o with copy-on-read enabled")
    try:
        reopen_disk(disk, options, writable=writable, write_through=write_through, node=node)
    except CowhandError as error:
        raise Failure(error.qemu()) from error
    finally:
        session.background.show()


def flush(session: Session, words: Sequence[str]) -> bool:
    """Make what was written stable."""
    try:
        the_disk(session).flush()
    except CowhandError as error:
        number_of(error)
        return False  # as QEMU: the exit status tells, and nothing else
    finally:
        session.background.show()
    return True


def truncate(session: Session, words: Sequence[str]) -> bool:
    """Set the length of the disk."""
    positional: list[str] = []
    preallocation = "off"
    for _, value in parsing.options(words, "m:", positional):
        if value not in _PREALLOCATION:
            raise Failure(f"Invalid preallocation mode '{value}'")
        preallocation = value
    if not positional:
        raise UsageComplaint
    # QEMU names the first word in its complaint, which is the option where there is one.
    size = number(positional[0], shown=next((word for word in words[1:] if word.startswith("-m")), words[1]))
    try:
        the_disk(session).resize(size, preallocation=preallocation, shrink=True)
    except CowhandError as error:
        if not error.facts.get("fixed") or preallocation != "off":
            raise Failure(error.qemu()) from error
        if size > the_disk(session).size:
            raise Failure(error.qemu().replace("Cannot resize", "Cannot grow")) from error
        # A device: to QEMU it is enough that so much is there.
    return True


# -- breakpoints


def _debug_node(session: Session, what: str) -> BlkDebugNode:
    node = session.breakpoints()
    if node is None:
        raise Complaint(f"{what}: {os.strerror(errno.EOPNOTSUPP)}")
    return node


def break_command(session: Session, words: Sequence[str]) -> bool:
    """Suspend the next request that causes an event."""
    what = "Could not set breakpoint"
    try:
        _debug_node(session, what).breakpoint(words[1], words[2])
    except CowhandError as error:
        raise Complaint(f"{what}: {os.strerror(error.number)}") from error
    return True


def remove_break(session: Session, words: Sequence[str]) -> bool:
    """Remove a breakpoint and resume what it suspended."""
    what = f"Could not remove breakpoint {words[1]}"
    try:
        _debug_node(session, what).remove_breakpoint(words[1])
    except CowhandError as error:
        raise Complaint(f"{what}: {os.strerror(error.number)}") from error
    return True


def resume(session: Session, words: Sequence[str]) -> bool:
    """Resume a request."""
    what = "Could not resume request"
    try:
        _debug_node(session, what).resume(words[1])
    except CowhandError as error:
        raise Complaint(f"{what}: {os.strerror(error.number)}") from error
    return True


def wait_break(session: Session, words: Sequence[str]) -> bool:
    """Wait until a request is suspended."""
    node = session.breakpoints()
    if node is not None:
        session.background.wait(until=lambda: node.is_suspended(words[1]))
    return True


# -- waiting and ending


def sleep(session: Session, words: Sequence[str]) -> bool:
    """Wait for some milliseconds."""
    milliseconds = c_integer(words[1])
    if milliseconds is None or milliseconds < 0:
        raise Complaint(f"{words[1]} is not a valid number")
    session.background.wait(milliseconds / 1000)
    return True


def quit_command(session: Session, words: Sequence[str]) -> bool:
    """End the tool."""
    session.quitting = True
    return True


def abort(session: Session, words: Sequence[str]) -> bool:
    """End as a crash does: nothing is flushed, not even what was printed."""
    os.abort()


def sigraise(session: Session, words: Sequence[str]) -> bool:
    """Raise a signal in this process."""
    wanted = number(words[1])
    if wanted > signal.NSIG:
        raise Complaint(f"signal argument '{words[1]}' is too large to be a valid signal")
    sys.stdout.flush()
    if 0 < wanted < signal.NSIG:
        # A handler of the interpreter's own would turn SIGINT into an exception.
        if wanted not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(wanted, signal.SIG_DFL)
        signal.raise_signal(wanted)
    return True
