"""A target that is a stream: standard output, by whatever name, or a named pipe."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cowhand.core.errors import InvalidArgument, from_os_error

if TYPE_CHECKING:
    from cowhand.cli.running import Context

_STDOUT = 1


def is_output(target: str) -> bool:
    """Tell whether *target* is standard output: "-", a device that leads to it, or the file that it was redirected to."""
    if target == "-":
        return True
    try:
        found, out = os.stat(target), os.fstat(_STDOUT)
    except (OSError, ValueError):
        return False
    leads = target.startswith(("/dev/", "/proc/")) or stat.S_ISREG(found.st_mode)
    return leads and os.path.samestat(found, out)


def is_stream(target: str) -> bool:
    """Tell whether *target* is written from its beginning to its end: standard output, or a pipe."""
    if is_output(target):
        return True
    try:
        return stat.S_ISFIFO(os.stat(target).st_mode)
    except (OSError, ValueError):
        return False


@contextmanager
def opened(target: str, format: str | None, context: Context) -> Iterator[int]:
    """Give the descriptor of the stream *target*; what is said besides goes to standard error from now on.

    Raises InvalidArgument where an image of *format* is no stream, or a terminal would get it.
    """
    if format not in (None, "raw"):
        raise InvalidArgument(
            f"'{target}' is a stream, and an image of format {format} cannot be written to one",
            hint="Write the image to a file, or write raw bytes: -O raw.",
        )
    output = is_output(target)
    try:
        descriptor = os.dup(_STDOUT) if output else os.open(target, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise from_os_error(error, target, doing="opening") from error
    try:
        if os.isatty(descriptor):
            raise InvalidArgument("an image cannot be written to a terminal", hint="Redirect standard output.")
        if output:
            sys.stdout.flush()
            context.out.give_way()
        yield descriptor
    finally:
        os.close(descriptor)
