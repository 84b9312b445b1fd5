"""Time and randomness, through one function each, so that tests can hold them."""

from __future__ import annotations

import os
import time


def now() -> float:
    """Return seconds since 1970 (UTC). ``COWHAND_CLOCK`` fixes it, for tests and reproducible images."""
    fixed = os.environ.get("COWHAND_CLOCK")
    return float(fixed) if fixed else time.time()


def monotonic() -> float:
    """Return seconds on a clock that never goes back; only differences mean anything."""
    return time.monotonic()


def random_bytes(count: int) -> bytes:
    """Return *count* bytes of the system's randomness."""
    return os.urandom(count)
