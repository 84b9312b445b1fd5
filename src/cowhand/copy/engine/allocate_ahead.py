"""Space before bytes: fallocate(2) what is about to be written.

The file system then allocates once for a MiB instead of block by block, which saves a third of the time of writing to its cache, and keeps the
file in one piece; and a full disk is found out before the bytes are on their way. The file's length does not change.
"""

from __future__ import annotations

import errno

from cowhand.core import syscalls
from cowhand.core.errors import from_os_error

#: A copy smaller than this does not earn back the loading of the system call.
MIN_TOTAL = 64 << 20
#: Shorter stretches are simply written: in a file that stays full of holes they would cost more than they save.
MIN_LENGTH = 1 << 20


class SpaceAhead:
    """Allocates stretches of a file for a copy of *total* bytes, until the file system says that it cannot. Thread-safe."""

    def __init__(self, total: int) -> None:
        self.enabled = total >= MIN_TOTAL and syscalls.LINUX

    def allocate(self, descriptor: int, offset: int, length: int, name: str) -> None:
        """Give the stretch space, if that is worth it and possible. Raises NoSpace naming the file *name*."""
        if not self.enabled or length < MIN_LENGTH or descriptor < 0:
            return
        try:
            syscalls.allocate(descriptor, offset, length, keep_size=True)
        except OSError as error:
            self.enabled = False
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raised = from_os_error(error, name, doing="writing")
                raised.offset = offset
                raise raised from error
            # Anything else only means that it does not work here: writing goes on, and tells if something is wrong.
