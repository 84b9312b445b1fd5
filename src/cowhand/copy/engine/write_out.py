"""Writing behind: the kernel is asked to begin writing what a copy has put into its cache, since a flush will want it on the medium soon.

The medium then works while the copy goes on, instead of when it has ended. Nothing is promised by it: the flush at the end is still the one that
makes things stable, and says what went wrong. Source: sync_file_range(2).
"""

from __future__ import annotations

from cowhand.copy.engine.allocate_ahead import MIN_TOTAL
from cowhand.core import syscalls


class WriteBehind:
    """Begins to write stretches of files out, for a copy of *total* bytes, until the system says that it cannot. Thread-safe."""

    def __init__(self, total: int) -> None:
        self.enabled = total >= MIN_TOTAL and syscalls.LINUX

    def begin(self, descriptor: int, offset: int, length: int) -> None:
        """Have the stretch written out, without waiting for it."""
        if not self.enabled or descriptor < 0:
            return
        try:
            syscalls.start_writing_out(descriptor, offset, length)
        except OSError:
            self.enabled = False  # a hint only: if something is wrong, the flush tells
