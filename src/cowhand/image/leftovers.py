"""What interrupted runs left behind: recognised by its name, removed when nobody makes it any more.

Whoever makes a file holds a lock on one byte of it, which ends with the process however that ends. So a file without that lock, named as this
machine names them, belongs to nobody. Where there are no locks, or another machine made the file, it is only told of.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from typing import NamedTuple

from cowhand.core.unfinished import SUFFIX, is_unfinished, made_here

#: The byte that is locked: none of those that QEMU uses for images (from 100 and from 200 on).
MARK_BYTE = 300
_FLOCK = struct.Struct("hhqqi0q")
#: Image locks and the mark.
_FIRST, _COUNT = 100, MARK_BYTE - 100 + 1
_MOST_NAMES = 1 << 16


class Leftovers(NamedTuple):
    """Unfinished files of a folder: those that were removed, and those of which nothing is known but their names."""

    removed: list[str]
    kept: list[str]


def hold_mark(descriptor: int, path: str) -> bool:
    """Lock the mark of the new file *path* for as long as *descriptor* is open; False when the file was removed before that."""
    try:
        _lock(descriptor, MARK_BYTE, 1)
    except OSError as error:
        # Without locks nobody removes it either.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return _same(descriptor, path)


def sweep(folder: str, *, remove: bool = True) -> Leftovers:
    """Remove what interrupted runs of this machine left in *folder*; without *remove* only say what that would be.

    Never raises: there may be nothing to see, or nothing to be done.
    """
    found = Leftovers([], [])
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for number, entry in enumerate(entries):
            if number >= _MOST_NAMES:
                break
            if is_unfinished(entry.name):
                path = os.path.join(folder, entry.name)
                state = _remove_if_left(path, remove)
                if state is not None:
                    (found.removed if state else found.kept).append(path)
    return found


def _remove_if_left(path: str, remove: bool) -> bool | None:
    """Remove *path* if nobody makes it. True when it was removed, False when that is not known, None when it is being made."""
    if not path.endswith(SUFFIX):
        return False  # an image that stood aside is not ours to throw away
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError:
        return False
    try:
        _lock(descriptor, _FIRST, _COUNT)
        if not made_here(path) or not _same(descriptor, path):
            return False
        if remove:
            os.unlink(path)
        return True
    except OSError as error:
        return None if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOENT) else False
    finally:
        os.close(descriptor)


def _lock(descriptor: int, first: int, count: int) -> None:
    """Lock bytes for this descriptor alone. Raises OSError, ENOTSUP where the system has no such locks."""
    try:
        import fcntl

        command = fcntl.F_OFD_SETLK
    except (ImportError, AttributeError):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from None
    fcntl.fcntl(descriptor, command, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0))


def _same(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
