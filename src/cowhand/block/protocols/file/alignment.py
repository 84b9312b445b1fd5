"""What direct I/O asks of offsets and lengths on a file or device, found by asking the system and, where it does not say, by trying.

Source: open(2), "O_DIRECT": alignment restrictions "vary by filesystem and kernel version", and there is no call that tells them all.
"""

from __future__ import annotations

import errno
import os

from cowhand.core import syscalls
from cowhand.core.buffers import aligned
from cowhand.core.errors import NotSupported

#: The largest alignment that is tried, and what is used where trying decides nothing. Larger sectors do not exist.
MAX_ALIGNMENT = 4096
_CANDIDATES = (512, 1024, 2048, 4096)


def probe(fd: int, path: str, *, device: bool) -> int:
    """Return the alignment of offset and length for *fd*, which was opened with O_DIRECT. Raises NotSupported when none works."""
    buffer = aligned(MAX_ALIGNMENT)
    told = _told(fd, device)
    for alignment in _CANDIDATES:
        if alignment >= told and _accepts(fd, buffer[:alignment]):
            if told or not _decides_nothing(fd, buffer):
                return alignment
            return MAX_ALIGNMENT
    raise NotSupported("Could not find working O_DIRECT alignment", hint="Try cache.direct=off", path=path)


def _told(fd: int, device: bool) -> int:
    """Return the logical sector size that the system tells, of the device itself or of the one below the file system; 0 if it does not."""
    try:
        if device:
            return syscalls.device_sector_size(fd)
        number = os.fstat(fd).st_dev
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/logical_block_size", "rb") as file:
            return int(file.read(16))
    except FileNotFoundError:
        return _told_of_partition(fd)
    except (OSError, ValueError):
        return 0


def _told_of_partition(fd: int) -> int:
    # A partition has no queue of its own; its directory lies inside that of the disk.
    number = os.fstat(fd).st_dev
    try:
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/../queue/logical_block_size", "rb") as file:
            return int(file.read(16))
    except (OSError, ValueError):
        return 0


def _accepts(fd: int, buffer: memoryview) -> bool:
    try:
        syscalls.preadv(fd, (buffer,), 0)
    except OSError as error:
        # A file system that errs in another way has at least looked at the request.
        return error.errno != errno.EINVAL
    return True


def _decides_nothing(fd: int, buffer: memoryview) -> bool:
    """Tell whether even a single byte can be read: at the end of an empty file, or in a hole, nothing is checked on some file systems."""
    return _accepts(fd, buffer[:1])
