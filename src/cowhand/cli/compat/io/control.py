"""``open``, ``close``, ``reopen``, ``flush``, ``truncate``, breakpoints, and how the tool waits and ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

from cowhand.block.options import NodeOptions, declared, parse
from cowhand.cli.compat import optionstrings
from cowhand.cli.compat.images import CACHE_MODES
from cowhand.cli.compat.io import parsing
from cowhand.cli.compat.io.opening import How
from cowhand.cli.compat.io.parsing import Complaint, UsageComplaint, c_integer, number
from cowhand.cli.compat.io.report import number_of
from cowhand.cli.compat.io.requests import the_disk
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.filters.blkdebug import BlkDebugNode
    from cowhand.block.node import BlockNode
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
    """Open the image anew with other options; with those that it had when they do not do."""
    positional: list[str] = []
    writable: bool | None = None
    cache: str | None = None
    options: dict[str, str] = {}
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


def _reopen(session: Session, writable: bool | None, cache: str | None, options: dict[str, str]) -> None:
    root = session.image
    options = _changes(root, options)
    before, name = session.how, session.name
    how = copy(before)
    how.format = None if "driver" in before.options or before.image_opts else root.driver
    how.cache = cache or before.cache
    if writable is not None:
        how.writable = writable
    elif "read-only" in options:
        how.writable = options["read-only"] not in ("on", "yes", "true", "y")
    join = type(root.options).join
    kept = join(options, how.options)
    how.options = {name: value for name, value in how.options.items() if name in kept}
    how.reopened = join({k: v for k, v in options.items() if k != "read-only"}, before.reopened)
    session.close()
    try:
        session.open(name, how, anew=True)
    except Failure:
        session.open(name, before, anew=True)
        raise


def _changes(node: BlockNode, options: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    """Return those of *options* that change something of *node* or its children. Raises Failure for what cannot be changed."""
    known = declared(type(node.options))
    own, out = {}, {}
    below: dict[str, dict[str, str]] = {}
    for option, value in options.items():
        head, dot, rest = option.partition(".")
        if dot and head in node.children:
            below.setdefault(head, {})[rest] = value
        elif option in ("driver", "node-name"):
            if value != (node.driver if option == "driver" else node.name):
                raise Failure(f"Cannot change the option '{option}'")
        elif option not in known and head not in known:
            raise Failure(f"Cannot change the option '{option}'")
        else:
            out[prefix + option] = value
            if option in declared(NodeOptions):
                own[option] = value
    try:
        parse(NodeOptions, own, driver=node.driver)
    except CowhandError as error:
        raise Failure(error.qemu()) from None
    for head, inner in below.items():
        out.update(_changes(node.children[head].node, inner, f"{prefix}{head}."))
    return out


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
    size = number(positional[0])
    try:
        the_disk(session).resize(size, preallocation=preallocation, shrink=True)
    except CowhandError as error:
        raise Failure(error.qemu()) from error
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
