"""Space of a regular file: where its holes are, how it is preallocated, and how a new one is made.

Sources: lseek(2) (SEEK_DATA, SEEK_HOLE), fallocate(2); QEMU's ``BlockdevCreateOptionsFile`` for what creation takes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any

from cowhand.block.node.node import ALL_PERMISSIONS, RESIZE, WRITE
from cowhand.core import syscalls
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, aligned
from cowhand.core.errors import InvalidArgument, IOFailed, NoSpace, NotSupported, from_os_error
from cowhand.core.extents import ALLOCATED, DATA, OFFSET, ZERO, ExtentBatch
from cowhand.core.units import format_size

PREALLOCATIONS = ("off", "falloc", "full")
#: XFS allocates space for a growing image in pieces of this size (QEMU's default).
EXTENT_SIZE_HINT = 1 << 20
#: What is written of a new file where it is that long: the largest block of direct I/O.
FIRST_BLOCK = 4096

_SEEK_DATA = getattr(os, "SEEK_DATA", 3)
_SEEK_HOLE = getattr(os, "SEEK_HOLE", 4)
_HOLE = ZERO | ALLOCATED | OFFSET
_DATA = DATA | ALLOCATED | OFFSET


def add_extents(batch: ExtentBatch, fd: int, node: Any, offset: int, length: int) -> None:
    """Append what the file system knows of ``[offset, offset + length)``, up to the limit of rows; past the end of the file is a hole.

    Where it knows nothing everything is data. A hole that another thread fills meanwhile may be told either way.
    """
    end = offset + length
    if end > syscalls.LAST_OFFSET:
        batch.add(offset, length, _HOLE, offset, node)  # behind the end of every file
        return
    try:
        while offset < end and not batch.full:
            try:
                data = min(os.lseek(fd, offset, _SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end  # no data from here on
            if data > offset:
                batch.add(offset, data - offset, _HOLE, offset, node)
            if data < end and not batch.full:
                hole = min(max(os.lseek(fd, data, _SEEK_HOLE), data + 1), end)
                batch.add(data, hole - data, _DATA, data, node)
                data = hole
            offset = data
    except OSError as error:
        if error.errno == errno.ENXIO:  # cut shorter between the two calls
            batch.add(offset, end - offset, _HOLE, offset, node)
        elif not batch.full:
            batch.add(offset, end - offset, _DATA, offset, node)


def write_zero_bytes(fd: int, offset: int, length: int) -> None:
    """Write *length* zero bytes. Raises OSError."""
    while length > 0:
        done = syscalls.pwritev(fd, (ZEROES[: min(length, ZEROES_SIZE)],), offset)
        offset += done
        length -= done


def set_size(fd: int, size: int, preallocation: str, path: str, *, flush: Callable[[int], None] | None = None) -> None:
    """Change the length of a regular file with nothing in flight; on an error the old length is restored.

    *preallocation* "falloc" reserves space for what is new, "full" writes it as well, "off" leaves a hole. *flush* makes what was written stable
    (os.fsync): the system tells of a failure once, so whoever keeps a file open has to hear of it.
    """
    if preallocation not in PREALLOCATIONS:
        raise NotSupported(f"Unsupported preallocation mode: {preallocation}", path=path)
    old = os.fstat(fd).st_size
    if size > syscalls.LAST_OFFSET:
        reason = os.strerror(errno.EFBIG)
        raise IOFailed(
            f"no file is {size} bytes long", qemu=f"Could not resize file: {reason}", path=path, errno=errno.EFBIG
        )
    if preallocation != "off" and size < old:
        raise InvalidArgument("Cannot use preallocation for shrinking files", errno=errno.ENOTSUP, path=path)
    doing = "resizing"
    try:
        if preallocation == "falloc" and size > old:
            doing = "preallocating"
            _check_free(fd, old, size, path)
            _reserve(fd, old, size - old)
        else:
            os.ftruncate(fd, size)
            if preallocation == "full":
                doing = "preallocating"
                _check_free(fd, old, size, path)
                write_zero_bytes(fd, old, size - old)
                (flush or os.fsync)(fd)
        if preallocation != "full" and not old:
            _fill_first_block(fd, size)
    except BaseException as error:
        with contextlib.suppress(OSError):
            # An interrupt, too, leaves the old length; what was cut off before it came does not come back.
            if os.fstat(fd).st_size > old or isinstance(error, OSError):
                os.ftruncate(fd, old)
        if not isinstance(error, OSError):
            raise
        raised = from_os_error(error, path, doing=doing)
        raise raised.within(
            qemu="Could not resize file" if doing == "resizing" else "Could not preallocate new data"
        ) from error


def _check_free(fd: int, old: int, size: int, path: str) -> None:
    """Raise NoSpace where a file of *old* bytes cannot get space up to *size*: to find out by taking it would leave none to anybody for a while."""
    if not hasattr(os, "fstatvfs"):
        return
    found = os.fstatvfs(fd)
    blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
    behind_end = max(0, os.fstat(fd).st_blocks * 512 - old)
    if found.f_blocks and size - old - behind_end > blocks * found.f_frsize:
        os.ftruncate(fd, size)  # what is too long for any file there is refused as that
        free = blocks * found.f_frsize
        needed = size - old - behind_end
        reason = os.strerror(errno.ENOSPC)
        raise NoSpace(
            f"preallocating failed: {reason}", qemu=reason, path=path,
            hint=f"{format_size(needed)} are needed and {format_size(free)} are free: {format_size(needed - free)} are missing.",
        )  # fmt: skip


def _fill_first_block(fd: int, size: int) -> None:
    """Give the first block of a file that was empty real bytes, as QEMU does: in a hole no trial tells what direct I/O asks for.

    Tests of scripts that count blocks know it, too.
    """
    count = FIRST_BLOCK if size >= FIRST_BLOCK else min(size, 512)
    with contextlib.suppress(OSError):  # a hint to who opens the file later
        syscalls.pwritev(fd, (aligned(count),), 0)


def _reserve(fd: int, offset: int, length: int) -> None:
    try:
        syscalls.allocate(fd, offset, length)
    except OSError as error:
        if not syscalls.is_unsupported(error):
            raise
        write_zero_bytes(fd, offset, length)


def create_file(
    path: str,
    size: int,
    *,
    preallocation: str = "off",
    nocow: bool = False,
    extent_size_hint: int | None = None,
    exclusive: bool = False,
    locking: bool = True,
) -> None:
    """Make *path* an empty file of *size* zero bytes; an existing one is emptied in place, if nobody uses it, unless *exclusive*.

    Raises ImageExists, ImageInUse, AccessDenied, NoSpace, IOFailed; a file that did not exist before is removed again on an error.
    """
    if preallocation not in PREALLOCATIONS:
        raise NotSupported(f"Unsupported preallocation mode: {preallocation}", path=path)
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    fd, made = _open_or_make(path, flags, exclusive)
    try:
        _fill_new(fd, path, size, preallocation, nocow, extent_size_hint, locking)
    except BaseException:
        if made:
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def _open_or_make(path: str, flags: int, exclusive: bool) -> tuple[int, bool]:
    try:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            if exclusive:
                raise
            # Not O_TRUNC: somebody may be using it, which only its locks tell.
            return os.open(path, flags | os.O_CREAT, 0o644), False
    except OSError as error:
        raised = from_os_error(error, path, doing="creating")
        raise raised.within(qemu=f"Could not create '{path}'") from error
    except ValueError as error:  # a NUL in the name
        raise InvalidArgument("a file name cannot contain a zero byte") from error


def _fill_new(
    fd: int, path: str, size: int, preallocation: str, nocow: bool, extent_size_hint: int | None, locking: bool
) -> None:
    from cowhand.block.locking import image_lock

    holder = None
    if locking:
        try:
            holder = image_lock.hold(fd, path, "a new image")
            holder.update(WRITE | RESIZE, ALL_PERMISSIONS & ~RESIZE)
        except NotSupported:
            pass  # no locks here: then nobody can be asked
        except BaseException:
            if holder is not None:
                holder.release()
            raise
    try:
        set_size(fd, 0, "off", path)
        _set_attributes(fd, nocow, extent_size_hint)
        set_size(fd, size, preallocation, path)
    finally:
        if holder is not None:
            holder.release()


def _set_attributes(fd: int, nocow: bool, extent_size_hint: int | None) -> None:
    # Both are hints for file systems that know them; the file is as good without.
    if nocow:
        try:
            syscalls.set_nocow(fd)
        except OSError:
            pass
    hint = EXTENT_SIZE_HINT if extent_size_hint is None else extent_size_hint
    if hint:
        try:
            syscalls.set_extent_size_hint(fd, hint)
        except OSError:
            pass
