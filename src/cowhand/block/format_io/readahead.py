"""Reading what is not in the page cache: the kernel is asked for all of a batch before any of it is waited for.

One read after the other keeps one request in the medium's queue, and most media are many times faster with more. A first attempt that does not
wait (preadv2(2), RWF_NOWAIT) costs nothing where the bytes are cached, and says where they are not; then the rest is announced
(posix_fadvise(2), POSIX_FADV_WILLNEED), and read as it comes in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

#: Flag of a read that fails rather than wait; 0 where there is none, or nothing to announce reads with.
NOWAIT: int = getattr(os, "RWF_NOWAIT", 0) if hasattr(os, "posix_fadvise") and hasattr(os, "preadv") else 0
#: Bytes that are looked for in the cache to know of a longer stretch.
_PROBE = 512
#: What is announced at most at once: more would push out what was read ahead before.
MOST = 256

_probe = bytearray(_PROBE)


def announce(descriptor: int, places: Iterable[tuple[int, int]]) -> None:
    """Have the kernel begin to read *places*, (offset, length) each, of a file. A hint: nothing fails."""
    try:
        for offset, length in places:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    except (OSError, OverflowError):
        pass


def is_cold(descriptor: int, offset: int) -> bool:
    """Tell whether the byte at *offset* of a file would have to be waited for; False where that cannot be told."""
    if not NOWAIT:
        return False
    read: Any = os.preadv
    try:
        # All threads share the buffer: nobody looks at it.
        read(descriptor, (_probe,), offset, NOWAIT)
    except BlockingIOError:
        return True
    except (OSError, OverflowError):
        pass
    return False
