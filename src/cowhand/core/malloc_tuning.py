"""What the C library does with memory that is freed: for programs that move much data, giving it back at once costs more than the work itself.

Source: mallopt(3) of glibc. Decompressing with several threads spends three quarters of its system time in giving 64 KiB back to the system
and faulting it in again.
"""

from __future__ import annotations

import gc
import sys

#: mallopt(3): ``M_TRIM_THRESHOLD``, ``M_MMAP_THRESHOLD`` of ``malloc.h``
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
#: Bytes that each arena keeps at most, and from which on an allocation is one of its own (glibc's largest).
_KEEP = 32 << 20
_LARGE = 32 << 20
#: The same for work on large arrays that come and go: kept among others they would leave gaps that nothing fits.
_ARRAY = 256 << 10
#: Work on fewer bytes than these does not earn the loading of ctypes.
_MIN_BULK = 64 << 20

#: New objects between two searches for garbage: loading a tool makes some ten thousand, none of them garbage.
_GARBAGE = 20_000

_allowed = False


def own_process() -> None:
    """Say that the process is the caller's own: it looks for garbage more seldom, :func:`expect_bulk` may tune it. For tools, not for libraries."""
    global _allowed
    _allowed = True
    gc.set_threshold(_GARBAGE)


def expect_bulk(total: int) -> None:
    """Prepare for work on *total* bytes, in a process of our own: freed memory is kept from now on, up to 32 MiB for each thread.

    Where the C library is not glibc nothing happens.
    """
    if total >= _MIN_BULK:
        _tune({_TRIM_THRESHOLD: _KEEP, _MMAP_THRESHOLD: _LARGE})


def expect_arrays(total: int) -> None:
    """Prepare for work on arrays of *total* bytes, one after the other, in a process of our own: their memory is given back at once.

    Where the C library is not glibc nothing happens.
    """
    if total >= _MIN_BULK:
        _tune({_MMAP_THRESHOLD: _ARRAY})


def _tune(settings: dict[int, int]) -> None:
    global _allowed
    if not _allowed or not sys.platform.startswith("linux"):
        return
    _allowed = False  # once is enough
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)
